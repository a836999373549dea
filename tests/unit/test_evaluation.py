"""Held-out evaluation without Ray: a pool that pays by place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stateset_ray import checkpoint
from stateset_ray.actors.evaluation import evaluate_heldout
from stateset_ray.actors.flight import Collected, GroupHandle
from stateset_ray.actors.jobs import Counts, GroupJob, GroupReport
from stateset_ray.committed import trained_config
from stateset_ray.config import load_config
from stateset_ray.environments.base import Environment
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import CheckpointError
from stateset_ray.types import Split, Task


class OneTask(Echo):
    """Has a single task."""

    def task(self, split: Split, index: int) -> Task:
        return Task(f"{split}-only", 4 + (split == "heldout"), split)


class Pool:
    """Scores the k-th job with k, and loses those of `lost`."""

    def __init__(self, *lost: int) -> None:
        self.lost = lost
        self.jobs: list[GroupJob] = []

    def collect(self, jobs: Sequence[GroupJob], _: Callable[[], bool]) -> Collected:
        self.jobs = list(jobs)
        reports = [
            GroupReport(job, (float(place),), ("completed",), (), (), (1,), (2,), ({},))
            for place, job in enumerate(jobs)
            if place not in self.lost
        ]
        return Collected([GroupHandle(report, None) for report in reports], Counts(), 0)


def evaluated(environment: Environment, pool: Pool) -> dict[str, float | None]:
    config = load_config(None, ["evaluate.tasks=3"])
    return evaluate_heldout(pool, environment, config, lambda: False).rewards  # type: ignore[arg-type]


def test_every_task_has_its_reward_and_a_lost_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateset_ray.actors.evaluation._conversation", lambda *_: ())
    assert evaluated(Echo(), Pool(1)) == {"heldout-0": 0.0, "heldout-1": None, "heldout-2": 2.0}


def test_a_task_that_repeats_is_played_as_often_each_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateset_ray.actors.evaluation._conversation", lambda *_: ())
    pool = Pool()
    rewards = evaluated(OneTask(), pool)
    assert rewards == {"heldout-only": 0.0, "heldout-only#1": 1.0, "heldout-only#2": 2.0}
    assert len({job.seed for job in pool.jobs}) == 3


class OneOddTask(OneTask):
    """As that, and the second is called what the third would be numbered."""

    def task(self, split: Split, index: int) -> Task:
        task = super().task(split, index)
        return replace(task, id=f"{task.id}#2") if index == 1 else task


def test_no_task_takes_the_name_that_another_one_was_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateset_ray.actors.evaluation._conversation", lambda *_: ())
    rewards = evaluated(OneOddTask(), Pool())
    assert rewards == {"heldout-only": 0.0, "heldout-only#2": 1.0, "heldout-only#2#2": 2.0}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run of one checkpoint."""
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(load_config(None, ["run.seed=7"]).to_toml())
    checkpoint.save(folder / "checkpoints", 1, lambda at: _write(at / "weights"), meta={}, keep=1)
    return folder


def _write(path: Path) -> None:
    path.write_text("w")


@pytest.mark.parametrize(
    ("at", "given"),
    [
        ("", "runs/demo"),
        ("runs/demo/checkpoints", "step-00000001"),
        ("runs/demo/checkpoints/step-00000001", "."),
        ("runs/demo/checkpoints", "../checkpoints"),
        ("runs", "demo/checkpoints/step-00000001/../step-00000001"),
    ],
)
def test_a_checkpoint_has_the_configuration_of_its_run_from_wherever_it_is_named(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, given: str
) -> None:
    monkeypatch.chdir(tmp_path / at)
    (tmp_path / "config.toml").write_text("[run]\nseed = 1\n")  # of something else
    config = trained_config(given, [])
    assert (config.run.seed, config.model.name) == (7, str(saved / "checkpoints" / "step-00000001"))


def test_a_checkpoint_is_found_through_links(saved: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    (saved / "checkpoints").rename(large)
    (saved / "checkpoints").symlink_to(large)
    (tmp_path / "best").symlink_to(saved / "checkpoints" / "step-00000001")
    assert trained_config(str(saved), []).run.seed == 7
    (saved / "checkpoints").unlink()
    large.rename(saved / "checkpoints")
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to(saved / "checkpoints" / "step-00000001")
    assert trained_config(str(tmp_path / "best"), []).run.seed == 7


def test_a_checkpoint_that_lies_in_no_run_is_said_to(saved: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    (saved / "checkpoints" / "step-00000001").rename(alone)
    with pytest.raises(CheckpointError, match="lies in no run"):
        trained_config(str(alone), [])


def test_what_can_be_evaluated_is_said_where_it_is_not_there() -> None:
    with pytest.raises(CheckpointError) as caught:
        trained_config("smollm2", [])
    assert "TOML" in caught.value.mend
