"""A rollout worker without Ray and without a model: its engines are elsewhere, or the expert plays."""

import asyncio
import gc
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from stateset_ray.actors.flight import Flight
from stateset_ray.actors.jobs import GroupJob, GroupReport
from stateset_ray.actors.rollout_pool import RolloutPool
from stateset_ray.actors.rollout_worker import RolloutWorker
from stateset_ray.actors.roster import Roster, Worker, calls_at_once
from stateset_ray.config import load_config
from stateset_ray.environments.echo import Echo
from stateset_ray.types import Step, Task

TASK = Echo().task("train", 0)


def play_expert(size: int) -> GroupReport:
    """A group of the expert's conversations."""

    async def main() -> list[GroupReport]:
        worker = RolloutWorker(load_config(None, ["model.name=tiny"]), 0, 1, [], [object()])
        job = GroupJob("r/0/t", TASK, 0, size, 1.0, expert=True)
        played = worker.play(0, {"handle": None, "lineage": 0}, [job])
        return [item async for item in played if isinstance(item, GroupReport)]

    try:
        [report] = asyncio.run(main())
    finally:
        gc.unfreeze()
    return report


def test_a_worker_that_was_restarted_while_nobody_looked_plays_all_the_same() -> None:
    """Nobody asks it whether it is ready: the first that it hears is a group to play."""
    report = play_expert(2)
    assert report.rewards == (1.0, 1.0)


def test_an_environment_that_cannot_be_built_here_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(self: Echo) -> None:
        raise ConnectionError("the database is away")

    monkeypatch.setattr(Echo, "__init__", away)
    report = play_expert(1)
    assert (report.stop_reasons, report.rewards) == (("environment_error",), (None,))
    assert "the database is away" in report.errors[0]


@pytest.mark.parametrize(
    ("said", "error"),
    [(lambda: {}["refund"], "raised KeyError: 'refund'"), (lambda: None, "must return a text")],
)
def test_an_expert_that_fails_is_data(monkeypatch: pytest.MonkeyPatch, said: Any, error: str) -> None:
    monkeypatch.setattr(Echo, "expert", lambda self: said())
    report = play_expert(1)
    assert report.stop_reasons == ("environment_error",)
    assert error in report.errors[0]


class Hangs(Echo):
    """Does not answer in conversations with an odd seed."""

    answers = threading.Event()

    def reset(self, task: Task, seed: int) -> Any:
        if task.seed % 2:
            self.answers.wait()
        return super().reset(task, seed)


class HangsElsewhere(Hangs):
    """The same, in a thread that it asks asyncio for itself."""

    async def reset(self, task: Task, seed: int) -> Step:
        return await (await asyncio.to_thread(super().reset, task, seed))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Hangs, HangsElsewhere])
def test_environments_that_hang_take_no_thread_from_those_that_come_after(kind: type[Hangs]) -> None:
    settings = [
        "model.name=tiny", "rollout.concurrency=2", "rollout.environment_timeout=2",
        f"environment.path={__name__}:{kind.__name__}",
    ]  # fmt: skip

    async def main() -> list[GroupReport]:
        worker = RolloutWorker(load_config(None, settings), 0, 1, [], [object()])
        reports = []
        for seed in (1, 3, 2):
            job = GroupJob(f"r/{seed}/t", replace(TASK, seed=seed), 0, 2, 1.0, expert=True)
            played = worker.play(0, {"handle": None, "lineage": 0}, [job])
            reports += [item async for item in played if isinstance(item, GroupReport)]
        return reports

    Hangs.answers.clear()
    try:
        reports = asyncio.run(main())  # returns, though threads hang
    finally:
        Hangs.answers.set()
        gc.unfreeze()
    assert [set(report.stop_reasons) for report in reports[:2]] == [{"environment_error"}] * 2
    assert reports[2].rewards == (1.0, 1.0)


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    program = """
import asyncio, threading
from stateset_ray.deadline import within
from stateset_ray.environments.base import call
asyncio.run(within(0.1, call(threading.Event().wait)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stderr.strip().endswith("DeadlinePassed: it took longer than 0.1 s")


class Actor:
    """Takes every call and never answers."""

    def __init__(self) -> None:
        self.running = 0
        self.play = self.options = self
        self.ready = self

    def remote(self, *_: object) -> object:
        self.running += 1
        return object()

    def __call__(self, **_: object) -> "Actor":
        return self


@pytest.mark.parametrize("concurrency", [1, 64])
def test_a_worker_that_plays_all_that_may_be_under_way_can_still_answer_a_heartbeat(concurrency: int) -> None:
    config = load_config(
        None,
        [
            "train.tasks_per_step=100", "train.max_staleness=2", "train.oversample=9",
            f"rollout.concurrency={concurrency}", "grpo.group_size=2",
        ],
    )  # fmt: skip
    actor = Actor()
    pool = RolloutPool(config, Roster(config, [Worker(0, actor)], lambda _: actor))
    for index in range(3 * 100 + 9):  # as the tasks of steps ahead are admitted: one by one
        name = f"r/0/{index}"
        pool.dispatch(Flight(), [GroupJob(name, Echo().task("train", index), 0, 2, 1.0)])
    assert actor.running == 309
    assert actor.running < calls_at_once(config)
