"""GRPO as an Algorithm of RLlib: the same weights as without it, checkpoints, callbacks, Tune."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from guessing import Letters
from playground import Playground, gone, on_fifo, small
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback

from stateset_ray.config import Config
from stateset_ray.errors import CheckpointError, ConfigError, LearnerLost, RunError
from stateset_ray.metrics import JsonLines
from stateset_ray.rllib import GRPO, GRPOConfig
from stateset_ray.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

STEPS = 3
SETTINGS = ("train.steps=3", "train.warm_start.steps=1", "run.seed=5", "train.updates_per_step=2")


def configured(config: Config, folder: Path) -> GRPOConfig:
    """An RLlib user's way to the same run, in a folder of its own."""
    path = folder / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return GRPOConfig.from_toml(path, [f'run.dir="{folder}"'])


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def inner(path: str | Path) -> Path:
    """The checkpoint of ours in one of RLlib's."""
    [found] = (Path(path) / "stateset").iterdir()
    return found


class Seen(RLlibCallback):
    """Writes down who called."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012

    def on_algorithm_init(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        self.calls.append(("init", algorithm.iteration))

    def on_train_result(self, *, algorithm: Algorithm, result: dict[str, Any], **kwargs: Any) -> None:
        self.calls.append(("result", result["training_iteration"]))
        result["of_mine"] = 1

    def on_evaluate_start(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        self.calls.append(("evaluate", algorithm.iteration))

    def on_evaluate_end(self, *, evaluation_metrics: dict[str, Any], **kwargs: Any) -> None:
        self.calls.append(("evaluated", evaluation_metrics["env_runners"]["num_episodes"]))

    def on_episode_end(self, *, episode: Any, metrics_logger: Any, **kwargs: Any) -> None:
        self.calls.append(("episode", episode))
        metrics_logger.log_value("said_nothing", float(not episode.get_actions(0)), reduce="mean")

    def on_sample_end(self, *, samples: list[Any], **kwargs: Any) -> None:
        self.calls.append(("sample", len(samples)))

    def on_checkpoint_loaded(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        self.calls.append(("loaded", algorithm.iteration))


class Trained:
    """An algorithm that was trained to its end, with a checkpoint on the way, and what was seen."""

    def __init__(self, folder: Path) -> None:
        Seen.calls = []
        config = configured(small(folder, *SETTINGS), folder)
        config.callbacks(Seen, on_train_result=lambda **_: Seen.calls.append(("function", None)))
        config.evaluation(evaluation_interval=2, evaluation_duration=3)
        self.algo = config.build_algo()
        self.early = folder / "early"
        self.results = [self.algo.train()]
        self.early_path = self.algo.save_to_path(self.early)
        self.results += [self.algo.train() for _ in range(STEPS - 1)]
        self.late = self.algo.save_to_path(folder / "late")
        self.calls = list(Seen.calls)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run without RLlib."""
    folder = tmp_path_factory.mktemp("plain")
    train(small(folder, *SETTINGS))
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    trained = Trained(tmp_path_factory.mktemp("rllib"))
    yield trained
    trained.algo.stop()


def test_the_same_seed_gives_the_same_curve_and_weights_as_train(plain: Path, trained: Trained) -> None:
    records = JsonLines(plain / "metrics.jsonl").read()
    assert len(records) == STEPS == len(trained.results)
    for record, result in zip(records, trained.results, strict=True):
        assert result["env_runners"]["episode_return_mean"] == pytest.approx(record["reward_mean"], abs=1e-12)
        for name in ("reward_mean", "reward_std", "equal_reward_share", "policy_version"):
            assert result["grpo"][name] == record[name], name
        learner = result["learners"]["default_policy"]
        assert learner["total_loss"] == record["loss"]
        assert learner["gradients_default_optimizer_global_norm"] == record["grad_norm"]
    last = plain / "checkpoints" / f"step-{STEPS:08d}"
    assert weights(inner(trained.late)) == weights(last)
    assert weights(inner(trained.early)) != weights(last)
    mine = JsonLines(trained.algo.folder / "metrics.jsonl").read()
    for record, theirs in zip(mine, records, strict=True):
        same = record.keys() - {"seconds", "rollout_tokens_per_second", "learner_tokens_per_second"}
        assert {k: record[k] for k in same - {"update"}} == {k: theirs[k] for k in same - {"update"}}


def test_results_are_in_rllibs_names(trained: Trained) -> None:
    for index, result in enumerate(trained.results):
        played = result["env_runners"]
        assert (played["num_episodes"], played["num_episodes_lifetime"]) == (8, 8 * (index + 1))
        assert played["episode_len_mean"] == played["episode_len_min"] == played["episode_len_max"] == 2
        assert played["num_env_steps_sampled"] == 16
        assert played["num_env_steps_sampled_lifetime"] == 16 * (index + 1)
        assert result["num_env_steps_sampled_lifetime"] == 16 * (index + 1)
        assert played["episode_return_min"] <= played["episode_return_mean"] <= played["episode_return_max"]
        learned = result["learners"]["__all_modules__"]
        assert learned["num_env_steps_trained"] == 2 * result["grpo"]["trajectories"]["trained"]
        assert result["learners"]["default_policy"]["weights_seq_no"] == result["grpo"]["policy_version"]
        assert math.isfinite(result["learners"]["default_policy"]["default_optimizer_learning_rate"])
        assert result["timers"]["rollout"] > 0
        assert result["training_iteration"] == index + 1
        assert result["config"]["grpo"]["group_size"] == 4
        assert json.dumps(result["grpo"])
    assert [result["done"] for result in trained.results] == [False] * (STEPS - 1) + [True]


def test_evaluation_comes_when_it_is_due_and_when_it_is_asked_for(trained: Trained) -> None:
    assert ["evaluation" in result for result in trained.results] == [False, True, False]
    due = trained.results[1]["evaluation"]
    assert due["env_runners"]["num_episodes"] == 3
    assert -1 <= due["env_runners"]["episode_return_mean"] <= 1
    first, second = trained.algo.evaluate(), trained.algo.evaluate()
    assert first["env_runners"] == second["env_runners"]
    assert first["num_failed"] == 0


def test_callbacks_are_called(trained: Trained) -> None:
    names = [name for name, _ in trained.calls]
    step = ["episode"] * 8 + ["sample"]
    end = ["result", "function"]
    assert names == ["init", *step, *end, *step, "evaluate", "evaluated", *end, *step, *end]
    assert [value for name, value in trained.calls if name == "sample"] == [8] * STEPS
    assert all(result["of_mine"] == 1 for result in trained.results)
    assert all(0 <= result["said_nothing"] <= 1 for result in trained.results)
    episodes = [value for name, value in trained.calls if name == "episode"]
    assert all(len(episode) == 2 and episode.is_terminated for episode in episodes)
    assert all(episode.get_observations(0).startswith("Say: ") for episode in episodes)
    returns = [episode.get_return() for episode in episodes[:8]]
    assert sum(returns) / 8 == pytest.approx(trained.results[0]["env_runners"]["episode_return_mean"])


def test_restoring_in_place_goes_on_exactly(trained: Trained) -> None:
    """Versions return with other weights, and lifetimes with the iteration."""
    with pytest.raises(RunError, match="come to its end"):
        trained.algo.train()
    damaged = trained.early.parent / "damaged"
    shutil.copytree(trained.early, damaged)
    with (inner(damaged) / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    for path, said in (
        (damaged, "model.safetensors has changed"),
        (trained.early.parent, "no checkpoint of"),
    ):
        with pytest.raises(CheckpointError, match=said):
            trained.algo.restore_from_path(path)
    Seen.calls = []
    trained.algo.restore(str(trained.early_path))
    assert Seen.calls == [("loaded", 1)]
    assert trained.algo.iteration == 1
    again = [trained.algo.train() for _ in range(STEPS - 1)]
    for mine, theirs in zip(again, trained.results[1:], strict=True):
        assert mine["training_iteration"] == theirs["training_iteration"]
        assert mine["env_runners"]["num_episodes_lifetime"] == theirs["env_runners"]["num_episodes_lifetime"]
        for name in ("episode_return_mean", "episode_return_max"):
            assert mine["env_runners"][name] == theirs["env_runners"][name]
        assert (
            mine["learners"]["default_policy"]["total_loss"]
            == (theirs["learners"]["default_policy"]["total_loss"])
        )
    assert weights(inner(trained.algo.save_to_path(trained.early.parent / "again"))) == (
        weights(inner(trained.late))
    )


def test_a_new_process_goes_on_exactly_and_stop_releases_everything(trained: Trained) -> None:
    with pytest.raises(ConfigError, match="as a whole"):
        trained.algo.restore_from_path(trained.early_path, component="learner_group")
    trained.algo.stop()  # room for the next
    with pytest.raises(RunError, match="was stopped"):
        trained.algo.train()
    algo = Algorithm.from_checkpoint(trained.early_path)
    try:
        assert type(algo) is GRPO
        assert algo.folder != trained.algo.folder
        results = [algo.train() for _ in range(STEPS - 1)]
        assert [r["training_iteration"] for r in results] == [2, 3]
        assert weights(inner(algo.save_to_path())) == weights(inner(trained.late))
        pids = [*algo._run.pool.pids, *algo._run.learners.pids]
        assert len(pids) == 2
    finally:
        algo.stop()
    assert gone(pids)
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states == {"REMOVED"}


def test_tune_runs_it_by_name_on_a_gymnasium_environment(tmp_path: Path) -> None:
    """In the room of its trial, in the folder of its trial, with checkpoints that hold the model."""
    tune.register_env("letters", lambda config: Letters(config))
    config = (
        configured(small(tmp_path), tmp_path)
        .environment("letters", env_config={"rounds": 1})
        .training(lr=tune.grid_search([1e-3]), train={"steps": 50})
    )
    tuner = tune.Tuner(
        "GRPO",
        param_space=config,
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"), stop={"training_iteration": 2}, verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
        ),
    )  # fmt: skip
    [result] = tuner.fit()
    assert result.error is None
    assert result.metrics["training_iteration"] == 2
    assert result.metrics["env_runners"]["num_episodes"] == 8
    assert result.metrics["env_runners"]["episode_len_max"] == 1
    assert result.metrics["grpo"]["stop_reasons"]["environment_limit"] == 8  # it truncates
    assert result.metrics["config"]["lr"] == 1e-3
    checkpoint = inner(result.checkpoint.path)
    assert checkpoint.name == "step-00000002"
    assert weights(checkpoint)
    assert ray.is_initialized()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import rllib_train

    return rllib_train.main


def test_the_example_runs(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = example(["--iterations", "2", "--runs", str(tmp_path), "--checkpoint", str(tmp_path / "saved")])
    said = capsys.readouterr().out
    assert re.search(r"iteration   1  return [+-]\d\.\d+  replies    128  '[abc]{3}' -> ", said)
    assert -1 <= found["heldout"] <= 1
    assert weights(inner(tmp_path / "saved"))
    assert (tmp_path / "parrot" / "metrics.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_learns(example: Any, tmp_path: Path) -> None:
    found = example(["--runs", str(tmp_path)])
    assert found["last"] > found["first"] + 0.3


PLAYGROUND = 'environment.path="playground:Playground"'


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_a_rank_that_dies_in_a_step_costs_time_and_nothing_else(tmp_path: Path) -> None:
    """Killed while the second step's conversations are played: built anew, and the step is taken again."""
    settings = (PLAYGROUND, "train.steps=3", "train.checkpoint_every=1", "learner.engine=torch")
    train(small(tmp_path / "plain", *settings))
    folder, fifo = tmp_path / "rllib", tmp_path / "fifo"
    folder.mkdir()
    Playground.plan = {3: {"fault": "knock", "fifo": str(fifo)}}
    algo = configured(small(folder, *settings), folder).build_algo()
    try:
        before = list(algo._run.learners.pids)
        with on_fifo(fifo, lambda _: os.kill(before[0], signal.SIGKILL)):
            results = [algo.train() for _ in range(3)]
        assert algo._run.learners.restarts == 1
        assert algo._run.learners.pids != before
        last = weights(inner(algo.save_to_path()))
    finally:
        Playground.plan = {}
        algo.stop()
    assert [result["training_iteration"] for result in results] == [1, 2, 3]
    assert [result["done"] for result in results] == [False, False, True]
    records = JsonLines(tmp_path / "plain/run/metrics.jsonl").read()
    for record, result in zip(records, results, strict=True):
        assert result["grpo"]["reward_mean"] == record["reward_mean"]
        assert result["learners"]["default_policy"]["total_loss"] == record["loss"]
    assert last == weights(tmp_path / "plain/run/checkpoints/step-00000003")


@pytest.mark.slow
def test_a_rank_that_dies_once_too_often_ends_the_iteration_with_the_reason(tmp_path: Path) -> None:
    settings = (PLAYGROUND, "train.steps=2", "learner.restarts=0", "learner.engine=torch")
    Playground.plan = {1: {"fault": "knock", "fifo": str(tmp_path / "fifo")}}
    algo = configured(small(tmp_path, *settings), tmp_path).build_algo()
    try:
        [rank] = algo._run.learners.pids
        with (
            on_fifo(tmp_path / "fifo", lambda _: os.kill(rank, signal.SIGKILL)),
            pytest.raises(LearnerLost, match="a learner rank"),
        ):
            algo.train()
    finally:
        Playground.plan = {}
        algo.stop()


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_rollouts_run_ahead_under_rllib_as_in_train_async(tmp_path: Path) -> None:
    """Which turn gets which weights depends on who is faster: no two such runs are equal bit for bit."""
    settings = ("train.steps=4", "train.max_staleness=1", "run.log_trajectories=2", "learner.engine=torch")
    algo = configured(small(tmp_path, *settings), tmp_path).build_algo()
    try:
        results = [algo.train() for _ in range(2)]
        saved = algo.save_to_path(tmp_path / "saved")
        results += [algo.train() for _ in range(2)]
        folder = algo.folder
        algo.restore_from_path(saved)
        again = [algo.train() for _ in range(2)]
    finally:
        algo.stop()
    stale = [result["grpo"]["staleness"]["max"] for result in [*results, *again]]
    assert (stale[0], stale[1]) == (0, 1), "the second step was begun with the weights of the first"
    assert all(value in (0, 1) for value in stale)
    assert [result["training_iteration"] for result in again] == [3, 4]
    for result in [*results, *again]:
        counts = result["grpo"]["trajectories"]
        # RLlib leaves out what is empty.
        lost = sum(sum(counts.get(name, {}).values()) for name in ("dropped", "aborted"))
        assert counts["dispatched"] == counts["trained"] + counts["filtered"] + lost
        assert result["env_runners"]["num_episodes"] == 8
    log = JsonLines(folder / "trajectories.jsonl").read()
    assert [line["trajectory"]["task"]["id"] for line in log] == [f"train-{i}" for i in range(8)]
