"""Held-out evaluation without Ray: a pool that pays by place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from stateset_ray.actors.evaluation import evaluate_heldout
from stateset_ray.actors.flight import Collected, GroupHandle
from stateset_ray.actors.jobs import Counts, GroupJob, GroupReport
from stateset_ray.config import load_config
from stateset_ray.environments.base import Environment
from stateset_ray.environments.echo import Echo
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
