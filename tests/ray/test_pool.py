"""The pool's books, with scripted workers: retries, deaths at the worst moment, errors that are bugs."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import scripted_worker
from playground import small

from stateset_ray.actors.flight import Flight
from stateset_ray.actors.jobs import GroupJob
from stateset_ray.actors.placement import import_paths
from stateset_ray.actors.rollout_pool import RolloutPool
from stateset_ray.actors.roster import Roster, Worker
from stateset_ray.errors import ClusterError, ModelError
from stateset_ray.types import Task

pytestmark = pytest.mark.ray

# Ray loads an actor's class before the actor could be told where to import it from.
ray.cloudpickle.register_pickle_by_value(scripted_worker)

Make = Callable[..., RolloutPool]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Make]:
    """Makes a pool of scripted workers."""
    workers: list[Any] = []

    def make(count: int = 1, *overrides: str, guests: int = 0) -> RolloutPool:
        config = small(tmp_path, *overrides)
        cls = ray.remote(max_restarts=-1, max_task_retries=0)(scripted_worker.ScriptedWorker)

        def one(index: int) -> Any:
            return cls.options(num_cpus=0, max_concurrency=64).remote(config, index, count, import_paths())

        workers.extend(Worker(i, one(i)) for i in range(count))
        ray.get([w.actor.ready.remote() for w in workers], timeout=60)
        roster = Roster(config, workers, one, guests)
        workers.extend(roster.workers[count:])
        return RolloutPool(config, roster)

    yield make
    for worker in workers:
        ray.kill(worker.actor)


def jobs(*faults: dict[str, Any]) -> list[GroupJob]:
    return [GroupJob(f"r/0/t{i}", Task(f"t{i}", i, data=d), i, 4, 1.0) for i, d in enumerate(faults)]


def test_groups_come_back_once_each_and_in_order(pool: Make) -> None:
    wanted = jobs(*[{}] * 7)
    collected = pool(3).collect(wanted)
    assert [g.report.job for g in collected.groups] == wanted
    assert [ray.get(g.payload).group.task for g in collected.groups] == [j.task for j in wanted]
    assert (collected.counts.dispatched, collected.counts.aborted, collected.restarts) == (28, {}, 0)


def test_a_failed_policy_is_tried_again(pool: Make) -> None:
    collected = pool(1, "rollout.retries=2").collect(jobs({}, {"fail": 2}, {}))
    assert [g.report.job.attempt for g in collected.groups] == [0, 2, 0]
    assert collected.groups[1].report.rewards == (0.5,) * 4
    assert ray.get(collected.groups[1].payload).group.trajectories[3].id == "r/0/t1/3/2"
    assert collected.counts.aborted == {"infrastructure_error": 8}
    assert collected.counts.dispatched == 12 + 8


def test_a_policy_that_always_fails_is_reported_after_the_last_retry(pool: Make) -> None:
    collected = pool(1, "rollout.retries=1").collect(jobs({"fail": 99}, {}))
    assert collected.groups[0].report.rewards == (None,) * 4
    assert collected.groups[0].report.job.attempt == 1
    assert collected.groups[1].report.rewards == (0.5,) * 4
    assert collected.counts.aborted == {"infrastructure_error": 4}


def test_a_death_between_payload_and_report_loses_no_group(pool: Make, tmp_path: Path) -> None:
    """A report whose trajectories died with the worker must not be taken: the learner would miss them."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    collected = pool(1).collect(jobs({"dies": fifo}))
    assert os.path.exists(fifo + ".done")
    assert collected.restarts == 1
    assert collected.counts.aborted == {"worker_died": 4}
    [group] = collected.groups
    assert ray.get(group.payload, timeout=30).group.task.id == "t0"


def test_what_no_retry_can_mend_is_raised(pool: Make) -> None:
    with pytest.raises(ModelError, match="no such weights"):
        pool(2).collect(jobs({}, {"raises": "no such weights"}))


def test_a_bug_is_raised_with_its_place(pool: Make) -> None:
    """Not by Ray's own error, which nobody catches: with where it was raised and what it said."""
    with pytest.raises(ClusterError, match=r"ScriptedWorker\.play failed: ValueError: off by one") as caught:
        pool(1).collect(jobs({"bug": "off by one"}))
    assert "scripted_worker.py" in str(caught.value)


@pytest.mark.parametrize("how", ["blocks", "stops", "halts"])
def test_a_silent_worker_is_restarted_and_its_groups_are_played_again(
    pool: Make, tmp_path: Path, how: str
) -> None:
    collected = pool(2, "rollout.heartbeat_timeout=2").collect(jobs({}, {how: str(tmp_path / "mark")}, {}))
    assert [group.report.job.task.id for group in collected.groups] == ["t0", "t1", "t2"]
    assert collected.restarts == 1
    assert collected.counts.aborted["worker_died"] == collected.counts.dispatched - 12 > 0


def test_groups_that_are_dropped_are_booked_and_hold_nobody(pool: Make, tmp_path: Path) -> None:
    workers, flight, rest = pool(1), Flight(), Flight()
    workers.dispatch(flight, jobs({"waits": str(tmp_path / "mark")}, {}, {}))
    workers.wait(flight, enough=lambda: len(flight.groups) == 2)
    workers.drop(flight, "outrun")
    assert not flight.unfinished
    assert (flight.counts.dispatched, flight.counts.aborted) == (12, {"outrun": 4})
    workers.dispatch(rest, jobs({"waits": str(tmp_path / "mark")}))  # the same name, and now it ends
    workers.wait(rest)
    assert [group.report.job.task.id for group in rest.groups] == ["t0"]


def test_groups_that_are_moved_are_booked_where_they_end(pool: Make, tmp_path: Path) -> None:
    workers, first, second = pool(1), Flight(), Flight()
    os.mkfifo(gate := tmp_path / "gate")
    workers.dispatch(first, jobs({}, {"gate": str(gate)}))
    workers.wait(first, enough=lambda: len(first.groups) == 1)
    workers.move(first, second)
    gate.write_text("go")
    workers.wait(second)
    for flight, name in (first, "t0"), (second, "t1"):
        collected = workers.collected(flight)
        assert [group.report.job.task.id for group in collected.groups] == [name]
        assert (collected.counts.dispatched, collected.counts.aborted) == (4, {})


def test_guests_join_while_others_play_and_may_leave(pool: Make, tmp_path: Path) -> None:
    workers = pool(1, guests=1)
    assert workers.capacity == 4
    while len(workers.pids) < 2:
        workers.advance(1)
    assert workers.capacity == 8
    os.kill(workers.pids[1], signal.SIGKILL)
    collected = workers.collect(jobs({}, {}, {}, {}))
    assert len(collected.groups) == 4
    assert collected.restarts <= 1
