"""Who plays what next, decided without Ray: workers are lists of the groups they were given."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from stateset_ray.actors.flight import Flight, GroupHandle
from stateset_ray.actors.jobs import GroupJob
from stateset_ray.actors.rollout_pool import RolloutPool
from stateset_ray.actors.roster import Roster, Worker
from stateset_ray.config import load_config
from stateset_ray.types import Task


class Actor:
    """Takes every call and never answers."""

    def __init__(self) -> None:
        self.played: list[str] = []
        self.play = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._play))
        self.ready = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=object))

    def _play(self, version: int, weights: Any, jobs: list[GroupJob]) -> object:
        self.played += [job.id for job in jobs]
        return object()


@pytest.fixture
def pool() -> RolloutPool:
    config = load_config()
    workers = [Worker(index, Actor()) for index in range(2)]
    return RolloutPool(config, Roster(config, workers, lambda index: Actor()))


def jobs(*names: str) -> list[GroupJob]:
    return [GroupJob(name, Task(name, 0), 0, 4, 1.0) for name in names]


def played(pool: RolloutPool) -> list[list[str]]:
    return [worker.actor.played for worker in pool._roster.workers]


def dies(pool: RolloutPool, index: int) -> None:
    pool._lost(pool._roster.workers[index], RayActorError())
    pool._tend()


def comes_back(pool: RolloutPool, index: int) -> None:
    pool._roster.workers[index].ping = None
    pool._tend()


def test_a_worker_kept_free_for_a_suspect_plays_nothing_new_until_then(pool: RolloutPool) -> None:
    pool.dispatch(Flight(), jobs("a", "b"))
    dies(pool, 0)
    pool.dispatch(Flight(), jobs("c"))
    assert played(pool) == [["a"], ["b"]]
    pool._roster.workers[1].streams.clear()  # `b` ended
    pool._tend()
    assert played(pool) == [["a"], ["b", "a"]]  # the suspect, and nothing beside it


def test_a_worker_kept_free_for_a_suspect_that_another_took_comes_back(pool: RolloutPool) -> None:
    pool.dispatch(Flight(), jobs("a", "b"))
    dies(pool, 0)
    comes_back(pool, 0)  # idle, so that it takes the suspect at once; worker 1 still plays `b`
    assert played(pool) == [["a", "a"], ["b"]]
    pool.dispatch(Flight(), jobs("c", "d"))
    assert played(pool) == [["a", "a"], ["b", "c", "d"]]


def test_a_worker_kept_free_for_a_suspect_that_was_given_up_comes_back(pool: RolloutPool) -> None:
    pool.dispatch(lost := Flight(), jobs("a"))
    pool.dispatch(Flight(), jobs("b"))
    dies(pool, 0)
    pool.drop(lost, "outrun")
    pool.dispatch(Flight(), jobs("c"))
    assert played(pool) == [["a"], ["b", "c"]]


def ends(pool: RolloutPool, index: int, with_: Exception | None = None) -> None:
    """The call that a worker plays ends without a report, or with an error."""
    worker = pool._roster.workers[index]
    [stream] = worker.streams.values()

    def nothing() -> Iterator[Any]:
        if with_ is not None:
            raise with_
        yield from ()

    worker.streams = {nothing(): stream}
    pool._report(worker, next(iter(worker.streams)))
    pool._tend()


def test_a_group_that_was_never_reported_is_played_again_and_given_up_in_the_end(pool: RolloutPool) -> None:
    pool.dispatch(flight := Flight(), jobs("a"))
    for _ in range(pool._config.rollout.retries):
        ends(pool, 0)
        assert flight.unfinished == {"a"}
    ends(pool, 0)
    assert not flight.unfinished
    assert flight.counts.dispatched == flight.counts.aborted["unreported"] == 4 * 3


def test_a_guest_that_cannot_play_is_dismissed_and_another_worker_takes_over(
    pool: RolloutPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    guest = pool._roster.workers[0]
    guest.guest = True
    pool.dispatch(flight := Flight(), jobs("a"))
    ends(pool, 0, RayTaskError("play", "no such folder", OSError("no such folder")))
    assert killed == [guest.actor]
    assert guest not in pool._roster.workers
    assert played(pool) == [["a"]]
    assert (flight.counts.dispatched, flight.counts.aborted) == (8, {"worker_died": 4})


def test_groups_that_were_lost_after_they_ended_are_played_again_or_given_up(pool: RolloutPool) -> None:
    pool.dispatch(flight := Flight(), jobs("a", "b"))
    retries = pool._config.rollout.retries
    for name, attempt in ("a", 0), ("b", retries):
        pool._end(name)
        job = replace(jobs(name)[0], attempt=attempt)
        flight.groups.append(GroupHandle(SimpleNamespace(job=job), None))  # type: ignore[arg-type]
    pool.replay(flight, list(flight.groups), "payload_lost")
    assert flight.unfinished == {"a"}
    assert not flight.groups
    assert flight.counts.aborted == {"payload_lost": 8}
    assert flight.counts.dispatched == 12
