"""Who plays what next, decided without Ray: workers are lists of the groups they were given."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from stateset_ray.actors.flight import Flight, GroupHandle
from stateset_ray.actors.heartbeat import Heartbeat
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


class Answers:
    """What a call of `play` gives: only what is there, or the controller would wait for ever."""

    def __init__(self) -> None:
        self.there: list[Any] = []

    def __next__(self) -> Any:
        assert self.there, "the controller waits for what may never come"
        if isinstance(said := self.there.pop(0), StopIteration):
            raise said
        return said


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each look of the controller at what is there."""
    found: list[float] = []

    def wait(refs: list[Any], *, timeout: float, **_: Any) -> tuple[list[Any], list[Any]]:
        found.append(timeout)
        return [ref for ref in refs if getattr(ref, "there", [])], []

    def get(ref: Any, timeout: float) -> Any:
        if isinstance(ref, RayActorError):  # the reference that tells of a death
            raise ref
        return ref

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", lambda stream: None)
    monkeypatch.setattr(Heartbeat, "missed", lambda *_: False)
    return found


def playing(pool: RolloutPool, index: int) -> Answers:
    """The one call that a worker plays."""
    worker, answers = pool._roster.workers[index], Answers()
    [stream] = worker.streams.values()
    worker.streams = {answers: stream}
    return answers


def report(name: str) -> Any:
    return SimpleNamespace(job=SimpleNamespace(id=name), stop_reasons=("terminated",))


def test_a_payload_whose_report_does_not_come_holds_up_nobody(pool: RolloutPool, looks: list[float]) -> None:
    """Its worker may have been stopped between the two: others are heard, and its silence is noticed."""
    pool.dispatch(flight := Flight(), jobs("a", "b"))
    silent, other = playing(pool, 0), playing(pool, 1)
    silent.there = ["payload of a"]
    assert pool.advance(1.0) is False
    other.there = ["payload of b", report("b"), StopIteration()]
    assert pool.advance(1.0) is True
    assert (flight.unfinished, pool._roster.workers[0].load) == ({"a"}, 1)  # still asked for a heartbeat
    silent.there = [report("a")]
    pool.wait(flight)
    assert [handle.payload for handle in flight.groups] == ["payload of b", "payload of a"]


def test_a_report_that_is_there_with_its_payload_is_not_waited_for(
    pool: RolloutPool, looks: list[float]
) -> None:
    pool.dispatch(flight := Flight(), jobs("a"))
    playing(pool, 0).there = ["payload of a", report("a")]
    pool.wait(flight)
    assert [seconds for seconds in looks if seconds] == [1.0]


@pytest.mark.parametrize("lost", ["RayActorError", "abandoned"])
def test_a_payload_that_lost_its_report_is_taken_for_no_other_groups(
    pool: RolloutPool, looks: list[float], lost: str
) -> None:
    pool.dispatch(flight := Flight(), jobs("a", "b"))
    answers = playing(pool, 0)
    answers.there = ["payload of a"]
    pool.advance(1.0)
    if lost == "abandoned":
        pool.abandon()
        pool.dispatch(flight := Flight(), jobs("a"))
    else:
        answers.there = [RayActorError()]
        pool.advance(1.0)
        assert flight.counts.aborted == {"worker_died": 4}
        comes_back(pool, 0)  # and plays the suspect
    playing(pool, 0).there = ["another payload", report("a")]
    pool.advance(1.0)
    assert [handle.payload for handle in flight.groups] == ["another payload"]


def test_a_group_that_was_dropped_leaves_its_payload_to_no_other(
    pool: RolloutPool, looks: list[float]
) -> None:
    pool._roster.workers.pop()
    pool.dispatch(dropped := Flight(), jobs("a"))
    kept = Flight()
    pool.dispatch(kept, jobs("b"))
    worker = pool._roster.workers[0]
    first, second = worker.streams.values()
    second.jobs |= first.jobs  # both are of one call
    worker.streams = {first: second}
    worker.actor.drop = SimpleNamespace(remote=lambda names: None)
    answers = playing(pool, 0)
    answers.there = ["payload of a"]
    pool.advance(1.0)
    pool.drop(dropped, "outrun")
    answers.there = [report("a"), "payload of b", report("b")]
    pool.wait(kept)
    assert [handle.payload for handle in kept.groups] == ["payload of b"]


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
