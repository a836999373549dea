"""Sweeps on a real cluster: what a trial was given is what its learner works with, whatever happens to it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from playground import small

from stateset_ray.config import load_config
from stateset_ray.errors import ClusterError, RunError
from stateset_ray.metrics import JsonLines
from stateset_ray.sweep import sweep
from stateset_ray.sweep.plan import Plan, read_plan

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ENGINE = "learner.engine=torch"  # starts a little sooner


def planned(folder: Path, space: str, *overrides: str) -> Plan:
    path = folder / "space.toml"
    path.write_text(space)
    return read_plan(small(folder / "runs", *overrides), path)


def learner_ranks() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("LearnerRank" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


POPULATION = """
    [sweep]
    samples = 4
    metric = "learning_rate"            # known beforehand, so that it is known who takes over from whom
    scheduler = "pbt"
    pbt = { interval = 1, synchronous = true, resample = 0.0, factors = [0.5] }

    [space]
    "learner.learning_rate" = { loguniform = [1e-4, 1e-2] }
    "learner.betas" = { choice = [[0.9, 0.95], [0.8, 0.9]] }
    "learner.weight_decay" = { uniform = [0.01, 0.1] }
    "grpo.clip_high" = { uniform = [0.2, 0.4] }
    "grpo.kl_coef" = { uniform = [0.01, 0.1] }
    """


def test_a_population_learns_with_what_was_perturbed(tmp_path: Path) -> None:
    """Four trials in the room of two; the worst takes over from the best, and varies what it brought."""
    check_population(tmp_path, ENGINE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_population_of_deepspeed_ranks_learns_with_what_was_perturbed(tmp_path: Path) -> None:
    """Its optimizer keeps values of its own, which a checkpoint brings along: each of two ranks is asked."""
    check_population(tmp_path, "learner.engine=deepspeed", "learner.ranks=2")


def check_population(tmp_path: Path, *overrides: str) -> None:
    plan = planned(tmp_path, POPULATION, *overrides, "train.steps=2")
    swept = sweep(plan, name="pbt")

    assert [outcome.status for outcome in swept.outcomes] == ["finished"] * 4
    [taker] = [outcome for outcome in swept.outcomes if outcome.changes]
    [(step, values)] = taker.changes
    assert step == 2, "after one comparison"
    rates = {o.trial: o.values["learner.learning_rate"] for o in swept.outcomes if o is not taker}
    giver = max(rates, key=rates.__getitem__)
    before = next(o.values for o in swept.outcomes if o.trial == giver)
    assert values == taker.values
    assert values["learner.learning_rate"] == max(1e-4, 0.5 * before["learner.learning_rate"])
    assert values["learner.weight_decay"] == max(0.01, 0.5 * before["learner.weight_decay"])
    assert values["learner.betas"] != before["learner.betas"], "the other of two options"
    # What every rank really works with, read from its optimizer and its objective after the second step.
    assert taker.in_force == taker.values

    runs = swept.folder / "trials"
    records = JsonLines(runs / taker.trial / "metrics.jsonl").read()
    assert records[1]["learning_rate"] == values["learner.learning_rate"]
    assert records[1]["policy_version"] == 2, "it goes on from the giver's weights"
    stored = load_config(runs / taker.trial / "config.toml")
    assert stored.grpo.clip_high == values["grpo.clip_high"]
    # It took the giver's checkpoint, not its own of the same step, and owns it now.
    inherited = json.loads((runs / taker.trial / "inherited/step-00000001/manifest.json").read_text())
    assert inherited["meta"]["run"] == giver
    assert not learner_ranks(), "every actor has ended with its trial"


HALVING = """
    [sweep]
    metric = "learning_rate"
    scheduler = "asha"
    max_concurrent = 1                  # in this order: those that are worse come later, and are ended early
    asha = { grace = 1, reduction = 2 }

    [space]
    "learner.learning_rate" = { grid = [1e-2, 1e-3, 1e-4, 1e-5] }
    """


def test_a_sweep_outlives_a_dead_rank_and_an_interruption(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "1000")  # and is not made anew before the trial goes on
    overrides = [ENGINE, "train.steps=2", "train.checkpoint_every=1", "learner.restarts=0"]
    plan = planned(tmp_path, HALVING, *overrides)
    events: list[dict[str, Any]] = []

    def on_event(event: Any) -> None:
        events.append(dict(event))
        if event["event"] == "trial_step" and len(events) < 4:  # the first step of the first trial
            # Tune's copy of what the trial reported is older than that: it began when the trial did.
            (tmp_path / "runs/asha/tune" / event["trial"] / "result.json").write_text("")
            for rank in learner_ranks():
                rank.kill()
        if event["event"] == "trial_ended":
            signal.raise_signal(signal.SIGINT)  # Ctrl-C

    first = sweep(plan, name="asha", on_event=on_event)
    [recovery] = [e for e in events if e["event"] == "trial_recovers"]
    assert recovery["number"] == 0
    assert "a learner rank failed during" in recovery["error"]
    assert first.outcomes[0].status == "finished"
    assert [step for step, _ in first.outcomes[0].curve] == [1, 2]
    assert first.interrupted
    assert len(first.outcomes) == 1 or {o.status for o in first.outcomes[1:]} == {"unfinished"}

    events.clear()
    swept = sweep(plan, name="asha", resume=True, on_event=events.append)
    assert swept.folder == first.folder
    # The first one after the interruption is compared with nobody: Tune forgets what was reported before.
    assert [o.status for o in swept.outcomes] == ["finished"] * 2 + ["ended early"] * 2
    assert [o.steps for o in swept.outcomes] == [2, 2, 1, 1]
    assert not [e for e in events if e["event"] == "trial_step" and e["number"] == 0], "what has ended stays"
    for outcome, rate in zip(swept.outcomes, (1e-2, 1e-3, 1e-4, 1e-5), strict=True):
        assert outcome.in_force == {"learner.learning_rate": rate} == outcome.values

    told = json.loads((swept.folder / "results.json").read_text())
    assert told["best"] == swept.outcomes[0].trial
    best = load_config(swept.folder / "best.toml")
    assert best == swept.best
    assert best.learner.learning_rate == 1e-2
    assert (swept.folder / "sweep.svg").read_text().startswith("<svg")
    assert not learner_ranks()


def test_a_sweep_that_cannot_note_what_is_reported_ends_before_its_first_trial(tmp_path: Path) -> None:
    def on_event(event: Any) -> None:
        assert event["event"] == "sweep_opened"
        (Path(event["folder"]) / "reports.jsonl").mkdir()

    with pytest.raises(RunError, match="what a trial reported cannot be written"):
        sweep(planned(tmp_path, HALVING, ENGINE, "train.steps=2"), name="unwritable", on_event=on_event)


def test_what_can_never_be_placed_is_said_at_once(tmp_path: Path) -> None:
    space = '[space]\n"learner.weight_decay" = { grid = [0.0, 0.1] }'
    with pytest.raises(ClusterError, match="CPU: 102 wanted, 8 there"):
        sweep(planned(tmp_path, space, "cluster.learner_cpus=100"))
    with pytest.raises(ClusterError, match="GPU: 1 wanted, 0 there"):
        sweep(planned(tmp_path, space, "cluster.learner_gpus=1"))
    with pytest.raises(ClusterError, match="nodes: 3 wanted, one for each bundle, 1 there"):
        sweep(planned(tmp_path, space, "cluster.strategy=STRICT_SPREAD"))
    varying = '[space]\n"learner.ranks" = { grid = [1, 8] }\n'  # the largest trial is what counts
    with pytest.raises(ClusterError, match="CPU: 10 wanted, 8 there"):
        sweep(planned(tmp_path, varying))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_is_the_run_that_its_configuration_trains(tmp_path: Path) -> None:
    """Restored by Tune in its middle, and trained in one go: the same rewards and losses, bit for bit."""
    from ray import tune

    from stateset_ray.sweep import trainable
    from stateset_ray.train import train

    config = small(tmp_path / "runs", "train.steps=4", "train.checkpoint_every=2")
    cls = trainable(config, folder=tmp_path / "trials")

    class Interrupted(cls):  # type: ignore[misc, valid-type]
        def step(self) -> Any:
            if self.iteration == 3 and not (self.folder / "once").exists():
                (self.folder / "once").touch()
                raise RuntimeError("interrupted on purpose")
            return super().step()

    Interrupted.__module__ = "__main__"
    grid = tune.Tuner(
        Interrupted,
        param_space={"learner.learning_rate": tune.grid_search([2e-3])},
        tune_config=tune.TuneConfig(metric="reward_mean", mode="max"),
        run_config=tune.RunConfig(
            name="own", storage_path=str(tmp_path), verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=2),
        ),
    ).fit()  # fmt: skip
    assert not grid.errors
    [trial] = [p for p in (tmp_path / "trials").iterdir() if p.is_dir()]
    train(load_config(trial / "config.toml", [f'run.dir="{tmp_path}"', "run.name=plain"]))
    swept, plain = (JsonLines(f / "metrics.jsonl").read() for f in (trial, tmp_path / "plain"))
    told = [[(r["step"], r["reward_mean"], r["loss"], r["grad_norm"]) for r in rs] for rs in (swept, plain)]
    assert told[0] == told[1]
    assert len(told[0]) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_of_the_documents(tmp_path: Path, monkeypatch: Any) -> None:
    from typer.testing import CliRunner

    from stateset_ray import cli

    root = Path(__file__).parents[2]
    [line] = [s for s in (root / "docs/sweeps.md").read_text().splitlines() if s.endswith("--name first")]
    monkeypatch.chdir(root)
    done = CliRunner().invoke(cli.app, [*line.split()[1:], "--set", f'run.dir="{tmp_path}"'])
    assert done.exit_code == 0, done.output
    assert "best configuration" in done.output
    best = load_config(tmp_path / "first" / "best.toml")
    assert best.run.name == "first-best"
    assert best.train.steps == 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_searcher_chooses_one_by_one(tmp_path: Path) -> None:
    space = """
        [sweep]
        samples = 3
        searcher = "optuna"
        max_concurrent = 1
        [space]
        "learner.learning_rate" = { loguniform = [1e-4, 1e-2] }
        "grpo.loss" = { choice = ["ppo", "cispo"] }
        "grpo.clip_low" = { uniform = [0.1, 0.3], when = { "grpo.loss" = "ppo" } }
        """
    swept = sweep(planned(tmp_path, space, ENGINE, "train.steps=1", "evaluate.tasks=4"), name="optuna")
    assert [outcome.status for outcome in swept.outcomes] == ["finished"] * 3
    for outcome in swept.outcomes:
        assert outcome.in_force == outcome.values
        assert ("grpo.clip_low" in outcome.values) == (outcome.values["grpo.loss"] == "ppo")
        assert outcome.curve[-1][1] == outcome.value, "the held-out reward after the last step"
