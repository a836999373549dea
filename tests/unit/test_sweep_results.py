"""What is made of a sweep's trials: read, ranked, drawn, handed over. Without Ray."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stateset_ray import checkpoint
from stateset_ray.config import Config, load_config
from stateset_ray.errors import CheckpointError, ConfigError, RunError
from stateset_ray.sweep.driver import _open_folder, run_sweep
from stateset_ray.sweep.handover import Pointer, hand_over, take_up
from stateset_ray.sweep.picture import Curve, picture
from stateset_ray.sweep.plan import Plan, read_plan
from stateset_ray.sweep.results import Outcome, Reports, best_of, read_outcome, write_results
from stateset_ray.sweep.show import SweepProgress, table
from stateset_ray.sweep.space import varied

SPACE = """
    [sweep]
    metric = "reward_mean"
    [space]
    "learner.learning_rate" = { loguniform = [1e-6, 1e-2] }
    "grpo.loss" = { choice = ["ppo", "cispo"] }
    "grpo.clip_low" = { uniform = [0.1, 0.3], when = { "grpo.loss" = "ppo" } }
    """


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = tmp_path / "space.toml"
    path.write_text(SPACE)
    return read_plan(load_config(None, ["train.steps=4", f'run.dir="{tmp_path}"']), path)


def outcome(name: str, steps: int, value: float, status: Any = "finished", **values: Any) -> Outcome:
    values = {"learner.learning_rate": 1e-4, "grpo.loss": "cispo"} | {
        key.replace("__", "."): value for key, value in values.items()
    }
    return Outcome(name, status, steps, value, values, [(s, value * s / steps) for s in range(1, steps + 1)])


def noted(reports: Reports, trial: str, step: int, value: float, values: Any, done: bool = False) -> None:
    result = {"training_iteration": step, "config": {"values": values}, "in_force": values, "done": done}
    reports.append(trial, result | {"reward_mean": value}, "reward_mean")


def test_the_best_is_of_those_that_went_furthest() -> None:
    trials = [
        outcome("early", 2, 0.9, "ended early"),
        outcome("worse", 4, 0.3),
        outcome("better", 4, 0.4),
        outcome("unknown", 4, math.nan),
        outcome("failed", 4, 1.0, "failed"),
    ]
    assert best_of(trials, "max") is trials[2]
    assert best_of(trials, "min") is trials[1]
    assert best_of(trials[3:], "max") is None


def test_what_was_taken_over_and_what_was_done_again_is_read_as_it_ended(tmp_path: Path, plan: Plan) -> None:
    old, new = {"learner.learning_rate": 1e-3}, {"learner.learning_rate": 1e-4}
    lines = [(1, 0.1, old), (2, 0.2, old), (3, 0.9, old), (3, 0.3, new), (4, math.nan, new)]
    reports = Reports(tmp_path)
    reports.begin()
    for step, value, values in lines:
        noted(reports, "a", step, value, values, done=step == 4)
        noted(reports, "other", step, 1.0, values)
        with (tmp_path / "reports.jsonl").open("a") as file:  # by a driver that died
            file.write('{"trial": "a", "st')
        Reports(tmp_path).begin()
    found = read_outcome(reports, "a", plan, new)
    assert found.curve[:3] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert (found.status, found.steps, found.changes, found.in_force) == ("finished", 4, [(3, new)], new)
    assert math.isnan(found.value)
    assert read_outcome(reports, "a", plan, new, error="boom").status == "failed"
    assert read_outcome(reports, "none", plan, new).status == "unfinished"
    noted(reports, "b", 2, 0.5, old, done=True)
    assert read_outcome(reports, "b", plan, old).status == "ended early"
    noted(reports, "c", 2, 0.5, old)
    assert read_outcome(reports, "c", plan, old).status == "unfinished"


def test_reports_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "reports.jsonl").mkdir()
    with pytest.raises(RunError, match="what a trial reported cannot be written: Is a directory"):
        Reports(tmp_path).begin()


def test_the_best_configuration_is_whole_and_trains(tmp_path: Path, plan: Plan) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    trials = [
        outcome("a", 4, 0.3, grpo__loss="ppo", grpo__clip_low=0.15),
        outcome("b", 4, 0.2),
        outcome("c", 2, math.nan, "failed"),
    ]
    best = write_results(folder, plan, trials)
    stored = load_config(folder / "best.toml")
    assert stored == best == varied(plan.config, trials[0].values | {"run.name": "mine-best"})
    assert (stored.grpo.clip_low, stored.run.dir) == (0.15, tmp_path)
    told = json.loads((folder / "results.json").read_text())
    assert told["best"] == "a"
    assert told["trials"][2]["value"] is None, "JSON has no word for not a number"
    assert told["space"]["grpo.clip_low"] == "uniform [0.1, 0.3] when grpo.loss is ppo"
    assert ET.fromstring((folder / "sweep.svg").read_text()).tag.endswith("svg")


def test_without_a_best_trial_there_is_no_best_configuration(tmp_path: Path, plan: Plan) -> None:
    assert write_results(tmp_path, plan, [outcome("c", 2, math.nan, "failed")]) is None
    assert not (tmp_path / "best.toml").exists()
    assert json.loads((tmp_path / "results.json").read_text())["best"] is None


def drawn(plan: Plan, trials: list[Curve]) -> Any:
    root = ET.fromstring(picture(plan.space, trials, "reward_mean", "a <b> & c"))
    return root, [e for e in root.iter() if e.tag.endswith("polyline")]


def test_a_trial_is_a_line_through_its_values_and_a_curve(plan: Plan) -> None:
    low = {"learner.learning_rate": 1e-6, "grpo.loss": "cispo"}
    high = {"learner.learning_rate": 1e-2, "grpo.loss": "ppo", "grpo.clip_low": 0.3}
    middle = {"learner.learning_rate": 1e-4, "grpo.loss": "ppo", "grpo.clip_low": 0.1}
    root, lines = drawn(
        plan,
        [
            Curve(high, [(1, 0.0), (2, 1.0)], 1.0, best=True),
            Curve(low, [(1, 0.5), (2, 0.0)], 0.0, best=False),
            Curve(middle, [(1, math.nan), (2, 0.5)], 0.5, best=False),
        ],
    )
    across = [[float(p.partition(",")[2]) for p in line.attrib["points"].split()] for line in lines[:3]]
    bottom, half, top = across  # the best is drawn last, so that nothing covers it
    assert lines[2].attrib["class"] == "best"
    assert [len(points) for points in across] == [4, 4, 4]
    assert half[0] == pytest.approx((bottom[0] + top[0]) / 2), "halfway by the logarithm"
    assert bottom[0] > half[0] > top[0]
    assert bottom[2] > half[2] > top[2], "what is not set lies below the lowest value"
    assert bottom[3] > half[3] > top[3]
    assert len(lines) == 5, "two curves of two points"
    assert sum(e.tag.endswith("circle") for e in root.iter()) == 1, "one of a single point"
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert "a <b> & c" in texts and "not set" in texts and "cispo" in texts


@pytest.mark.parametrize("values", [[], [math.nan], [0.5], [0.5, 0.5]])
def test_a_picture_of_little_is_a_picture(plan: Plan, values: list[float]) -> None:
    low = {"learner.learning_rate": 1e-6, "grpo.loss": "cispo"}
    drawn(plan, [Curve(low, [(1, v)], v, best=i == 0) for i, v in enumerate(values)])


def test_the_table_has_the_best_first_and_the_failed_last(plan: Plan) -> None:
    console = Console(file=io.StringIO(), width=160)
    trials = [outcome("a", 2, 0.9, "ended early"), outcome("b", 4, 0.3), outcome("c", 4, 0.412345)]
    trials.append(outcome("d", 1, math.nan, "failed", grpo__loss="ppo", grpo__clip_low=0.2))
    console.print(table(plan, trials))
    rows = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert rows[0] == ["learning_rate", "loss", "clip_low", "reward_mean", "steps", "ended"]
    assert rows[1] == ["3", "0.0001", "cispo", "-", "0.4123", "4", "finished"]
    assert [row[0] for row in rows[1:]] == ["3", "2", "1", "4"]
    assert rows[4] == ["4", "0.0001", "ppo", "0.2", "-", "1", "failed"]


def test_progress_says_a_line_per_event() -> None:
    console = Console(file=io.StringIO(), width=200)
    show = SweepProgress(4, console)
    about = {"trial": "x", "number": 0, "trials": 2}
    show({"event": "sweep_opened", "folder": "runs/s", "notes": ["1 draw was refused"]})
    show({"event": "trial_started", "values": {"grpo.loss": "ppo"}, **about})
    show({"event": "trial_step", "step": 2, "value": 0.25, "metric": "reward_mean", **about})
    show({"event": "trial_recovers", "failures": 1, "error": "a\x1b\nb", **about})
    show({"event": "trial_ended", "step": 2, **about})
    show({"event": "trial_failed", "failures": 3, "error": "boom", **about})
    show({"event": "sweep_waits", "seconds": 30, "free": "CPU 0 of 8"})
    show({"event": "something new"})
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "sweep  runs/s",
        "  1 draw was refused",
        "trial 1 (x)  grpo.loss = ppo",
        "trial 1 (x)  step 2/4  reward_mean 0.25",
        "trial 1 (x)  failed, and goes on from its last checkpoint: a·",
        "trial 1 (x)  ended after 2 steps, early",
        "trial 1 (x)  failed 3 times and is given up: boom",
        "no trial got room for 30 s; free: CPU 0 of 8",
    ]


def saved(trials: Path, trial: str, step: int, text: str) -> Pointer:
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text)

    checkpoint.save(trials / trial / "checkpoints", step, write, meta={"run": trial}, keep=1)
    return Pointer(trial, step)


def test_what_is_handed_over_outlives_the_giver_and_costs_no_copy(tmp_path: Path) -> None:
    given = saved(tmp_path, "giver", 2, "good")
    saved(tmp_path, "taker", 2, "bad")
    hand_over(tmp_path, given, "taker")
    inode = (given.lies_in(tmp_path / "giver" / "checkpoints") / "model/weights").stat().st_ino
    saved(tmp_path, "giver", 4, "better")
    assert not given.lies_in(tmp_path / "giver" / "checkpoints").exists(), "the giver went on"
    take_up(tmp_path, given, "taker")
    found = checkpoint.latest(tmp_path / "taker" / "checkpoints")
    assert found is not None and (found.step, found.meta["run"]) == (2, "giver")
    assert (found.path / "model/weights").read_text() == "good"
    assert (found.path / "model/weights").stat().st_ino == inode


def test_a_trial_goes_back_to_the_step_that_tune_knows(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_text("x")

    for step in (2, 4):
        checkpoint.save(tmp_path / "t" / "checkpoints", step, write, meta={}, keep=2)
    take_up(tmp_path, Pointer("t", 2), "t")
    found = checkpoint.latest(tmp_path / "t" / "checkpoints")
    assert found is not None and found.step == 2


def test_a_damaged_checkpoint_is_not_handed_over(tmp_path: Path) -> None:
    given = saved(tmp_path, "giver", 2, "good")
    (given.lies_in(tmp_path / "giver" / "checkpoints") / "model/weights").write_text("evil")
    with pytest.raises(CheckpointError, match="content of model/weights has changed"):
        hand_over(tmp_path, given, "taker")
    with pytest.raises(CheckpointError, match=r"manifest|No such file"):
        take_up(tmp_path, Pointer("taker", 3), "taker")


def test_a_pointer_is_read_as_it_was_written(tmp_path: Path) -> None:
    Pointer("a", 3).write(tmp_path)
    assert Pointer.read(tmp_path) == Pointer("a", 3)
    (tmp_path / "pointer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint of a trial"):
        Pointer.read(tmp_path)


def test_a_trial_asks_for_one_group_with_all_its_run_needs(tmp_path: Path) -> None:
    from stateset_ray.sweep import trainable

    config = load_config(None, ["rollout.engines=1", "cluster.worker_cpus=0.5", "cluster.strategy=SPREAD"])
    asked = trainable(config, folder=tmp_path, trial_cpus=2).default_resource_request({"learner.ranks": 2})
    assert asked.bundles == [{"CPU": 2.0}, {"CPU": 0.5}, *[{"CPU": 1.0}] * 3]
    assert asked.strategy == "SPREAD"


def test_the_newest_heldout_reward_is_what_is_reported() -> None:
    from stateset_ray.sweep.trial import _heldout, _numbers

    assert _heldout({}) == {}
    results = {"heldout_before": 0.1, "heldout_step_10": 0.4, "heldout_step_9": 0.3, "warm_started": 3}
    assert _heldout(results) == {"heldout_reward": 0.4}
    assert _heldout(results | {"heldout_after": 0.2}) == {"heldout_reward": 0.2}
    found = _numbers(
        {"step": 3, "loss": 1, "update": {"kl": 0.5}, "flag": True, "text": "x", "grad_norm": None}
    )
    assert math.isnan(found.pop("reward_mean"))
    assert found == {"loss": 1.0, "update.kl": 0.5}


def test_a_configuration_varied_by_nothing_is_itself() -> None:
    assert varied(Config(), {}) == Config()


@pytest.mark.parametrize("name", ["my sweep", "../x", "-x"])
def test_a_name_that_no_run_can_have_is_refused_before_anything_is_made(
    tmp_path: Path, plan: Plan, name: str
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"run\.name"):
        run_sweep(plan, name=name, resume=False, on_event=lambda _: None)
    assert sorted(tmp_path.iterdir()) == before


def test_results_are_written_even_where_the_best_configuration_cannot_be(tmp_path: Path, plan: Plan) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    wrong = outcome("a", 4, 0.5, learner__learning_rate=-1.0)
    with pytest.raises(ConfigError):
        write_results(folder, plan, [wrong])
    assert json.loads((folder / "results.json").read_text())["best"] == "a"


def resumed(plan: Plan, *changes: str) -> Path:
    from dataclasses import replace

    (plan.config.run.dir / "s" / "tune").mkdir(exist_ok=True)
    return _open_folder(replace(plan, config=plan.config.with_overrides(list(changes))), "s", resume=True)


def test_a_sweep_is_resumed_on_another_cluster_and_not_as_another_sweep(tmp_path: Path, plan: Plan) -> None:
    folder = _open_folder(plan, "s", resume=False)
    assert resumed(plan, 'cluster.address="head:6379"') == folder
    for change in ("learner.learning_rate=0.1", "train.steps=9", "evaluate.tasks=3"):
        with pytest.raises(ConfigError, match=change.partition("=")[0]):
            resumed(plan, change)
    (folder / "space.toml").unlink()
    with pytest.raises(RunError, match=r"space\.toml of the sweep cannot be read"):
        resumed(plan)


def test_what_a_trial_was_handed_earlier_does_not_fill_the_disk(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        hand_over(tmp_path, saved(tmp_path, "giver", step, "x"), "taker")
    inherited = sorted(path.name for path in (tmp_path / "taker" / "inherited").glob("step-*"))
    assert inherited == ["step-00000006", "step-00000008"]


def test_a_trial_has_no_mirror_and_keeps_its_configuration_whole(tmp_path: Path) -> None:
    from stateset_ray.sweep import trainable

    config = load_config(None, ["run.mirror=memory://x"])
    trial = object.__new__(trainable(config, folder=tmp_path))
    trial._trial_info = type("Info", (), {"trial_id": "t"})()
    trial._take({})
    assert (trial._settings.run.mirror, trial._settings.run.name) == ("", "t")


def test_nobody_is_told_of_a_sweep_that_is_over(tmp_path: Path) -> None:
    from stateset_ray.sweep import tuning

    tuning._watching[str(tmp_path)] = lambda _: None
    tuning.unwatched(tmp_path)
    assert str(tmp_path) not in tuning._watching
