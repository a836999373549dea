"""How far rollouts may run ahead: the admission rule, and which step gets which tasks."""

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.actors.credit import _chosen
from stateset_ray.actors.flight import Collected, Flight, GroupHandle
from stateset_ray.actors.jobs import GroupJob, GroupReport, SampleSize
from stateset_ray.actors.lookahead import Lookahead, may_start
from stateset_ray.actors.task_stream import TaskStream
from stateset_ray.config import Config, corrected, load_config
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import ConfigError
from stateset_ray.train import train
from stateset_ray.types import Split, Task


@given(
    staleness=st.integers(0, 4), per_step=st.integers(1, 5), capacity=st.integers(1, 20),
    seconds=st.lists(st.integers(1, 30), min_size=1, max_size=40),
)  # fmt: skip
def test_bug_23_24_no_group_is_staler_than_allowed_and_none_waits_for_ever(
    staleness: int, per_step: int, capacity: int, seconds: list[int]
) -> None:
    """A simulation of the loop: groups take any time, a step takes the groups that were dealt to it."""
    total = len(seconds) - len(seconds) % per_step
    running: dict[int, int] = {}  # group -> when it ends
    played_with: list[int] = []
    finished: set[int] = set()
    now = steps = 0
    while steps * per_step < total:
        room = may_start(
            capacity=max(capacity, per_step), staleness=staleness, steps=steps, per_step=per_step,
            accepted=len(finished), running=len(running),
        )  # fmt: skip
        for _ in range(min(room, total - len(played_with))):
            running[len(played_with)] = now + seconds[len(played_with)]
            played_with.append(steps)
        assert len(running) <= max(capacity, per_step)
        mine = set(range(steps * per_step, (steps + 1) * per_step))
        if mine <= finished:
            assert all(steps - played_with[group] <= staleness for group in mine)
            steps += 1
            continue
        assert running, "nothing is played and the step is not complete: a deadlock"
        now = min(running.values())
        finished |= {group for group, end in running.items() if end <= now}
        running = {group: end for group, end in running.items() if end > now}
    assert len(played_with) == total


def test_bug_23_after_a_resume_there_is_no_burst() -> None:
    started = may_start(capacity=999, staleness=2, steps=50, per_step=4, accepted=50 * 4, running=0)
    assert started == 3 * 4


class _Played:
    """A pool whose groups take a given time; time goes by only when it is waited for."""

    def __init__(self, seconds: list[int]) -> None:
        self.capacity = 6
        self.seconds, self.now = seconds, 0
        self.ends: dict[str, int] = {}
        self.flights: dict[str, Flight] = {}
        self.jobs: dict[str, GroupJob] = {}
        self.step = 0
        self.least = 0
        self.begun: dict[str, int] = {}

    @property
    def dealt(self) -> set[str]:
        return set(self.begun)

    def dispatch(self, flight: Flight, jobs: list[GroupJob]) -> None:
        for job in jobs:
            flight.add(job.id)
            flight.counts.dispatched += job.size
            self.flights[job.id], self.jobs[job.id] = flight, job
            self.begun[job.task.id] = self.step
            index = job.id.rpartition("-")[2].rpartition("#")[2]
            self.ends[job.id] = self.now + self.seconds[int(index.replace("only", "0")) % len(self.seconds)]

    def advance(self, _: float) -> bool:
        name = min(self.ends, key=lambda n: (self.ends[n], n))
        self.now = max(self.now, self.ends.pop(name))
        flight = self.flights.pop(name)
        flight.unfinished.discard(name)
        flight.groups.append(GroupHandle(_report(self.jobs[name]), None))
        return True

    def wait(self, flight: Flight, _: Any, meanwhile: Any, enough: Any) -> None:
        assert len(flight.order) >= self.least
        while flight.unfinished and not enough():
            self.advance(1)
            meanwhile()

    def move(self, source: Flight, target: Flight) -> None:
        for name in list(source.unfinished):
            source.unfinished.discard(name)
            del source.order[name]
            target.add(name)
            self.flights[name] = target
            source.counts.dispatched -= self.jobs[name].size
            target.counts.dispatched += self.jobs[name].size

    def drop(self, flight: Flight, reason: str) -> None:
        for name in list(flight.unfinished):
            flight.unfinished.discard(name)
            flight.counts.aborted[reason] += self.jobs[name].size
            del self.ends[name], self.flights[name]

    def collected(self, flight: Flight) -> Collected:
        return flight.collected()


def _report(job: GroupJob) -> GroupReport:
    size = SampleSize(0, 0, 4, 2)
    played = ("completed",) * 2
    return GroupReport(job, (0.0, 1.0), played, (), (size,), (1, 1), (2, 2), ({}, {}), oldest=(0, 0))


@given(
    oversample=st.integers(0, 3), staleness=st.integers(0, 3), capacity=st.integers(1, 20),
    seconds=st.lists(st.integers(1, 40), min_size=1, max_size=24),
)  # fmt: skip
def test_bug_27_every_task_is_learned_from_once_and_what_was_outrun_in_the_next_step(
    oversample: int, staleness: int, capacity: int, seconds: list[int]
) -> None:
    """Groups take any time: the slowest are left behind, but once, and never beyond their staleness."""
    config = load_config(None, [
        "grpo.group_size=2", "train.steps=8", "train.tasks_per_step=3", f"train.oversample={oversample}",
        f"train.max_staleness={staleness}",
    ])  # fmt: skip
    pool = _Played(seconds)
    pool.capacity = capacity
    pool.least = 3 + oversample  # however few can be played at once, a step that is waited for is all begun
    ahead = Lookahead(config, pool, TaskStream(config, Echo()), lambda _: ())  # type: ignore[arg-type]
    learned: list[str] = []
    waited: set[str] = set()
    for pool.step in range(8):
        collected = ahead.take(pool.step, staleness, lambda: False)
        chosen, left_out = _chosen(collected.groups, config)
        assert not left_out  # what has ended is learned from
        names = [group.report.job.task.id for group in chosen]
        assert 3 <= len(names) <= 3 + oversample
        assert collected.counts.dispatched == 2 * len(names) + collected.counts.aborted.total()
        assert all(pool.step - pool.begun[name] <= staleness for name in names)
        assert waited <= set(names)
        learned += names
        ahead.finish(pool.step)
        waited = pool.dealt - set(learned) if not staleness else set()
    assert len(learned) == len(set(learned))
    assert len(pool.dealt - set(learned)) <= oversample  # those that the last step has outrun
    if not oversample:
        assert learned == [f"train-{index}" for index in range(24)]


def test_a_straggler_holds_only_one_of_two_steps() -> None:
    settings = ["grpo.group_size=2", "train.steps=4", "train.tasks_per_step=3"]
    waits: dict[int, list[int]] = {}
    for oversample in (0, 1):
        config = load_config(None, [*settings, f"train.oversample={oversample}"])
        pool = _Played([9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
        ahead = Lookahead(config, pool, TaskStream(config, Echo()), lambda _: ())  # type: ignore[arg-type]
        for pool.step in range(4):
            ahead.take(pool.step, 0, lambda: False)
            ahead.finish(pool.step)
            waits.setdefault(oversample, []).append(pool.now)
    assert waits == {0: [9, 10, 11, 12], 1: [1, 10, 11, 12]}  # played again, and waited for


def test_what_was_outrun_is_waited_for_also_after_a_resume() -> None:
    settings = ["grpo.group_size=2", "train.steps=4", "train.tasks_per_step=3", "train.oversample=1"]
    config = load_config(None, settings)
    first, again = TaskStream(config, Echo()), TaskStream(config, Echo())
    pool = _Played([9] + [1] * 30)
    ahead = Lookahead(config, pool, first, lambda _: ())  # type: ignore[arg-type]
    ahead.take(0, 0, lambda: False)
    ahead.finish(0)
    again.rewind(first.state())
    resumed = Lookahead(config, _Played(pool.seconds), again, lambda _: ())  # type: ignore[arg-type]
    for going_on in (ahead, resumed):
        learned = [g.report.job.task.id for g in going_on.take(1, 0, lambda: False).groups]
        assert "train-0" in learned


class OneTask(Echo):
    """Has a single task."""

    def task(self, split: Split, index: int) -> Task:
        return Task(f"{split}-only", 4 + (split == "heldout"), split)


def test_a_task_that_repeats_is_a_job_of_its_own_each_time() -> None:
    tasks = TaskStream(load_config(None, ["grpo.group_size=2"]), OneTask())
    tasks.begin(0)
    state = tasks.state()
    jobs = tasks.draw(0, 2) + tasks.draw(0, 2)
    assert len({job.id for job in jobs}) == len({job.seed for job in jobs}) == 4
    tasks.rewind(state)
    tasks.begin(0)
    assert tasks.draw(0, 4) == jobs
    warm = tasks.expert(0)
    assert len({job.id for job in warm}) == len(warm) > 1
    pool, config = _Played([3, 1, 2]), load_config(None, ["grpo.group_size=2", "train.tasks_per_step=3"])
    collected = Lookahead(config, pool, tasks, lambda _: ()).take(0, 0, lambda: False)  # type: ignore[arg-type]
    assert (len(collected.groups), collected.counts.dispatched) == (3, 6)


@pytest.fixture
def tasks() -> TaskStream:
    return TaskStream(load_config(None, ["grpo.group_size=2", "train.warm_start.steps=0"]), Echo())


def _ids(jobs: object) -> list[str]:
    return [job.task.id for job in jobs]  # type: ignore[attr-defined]


def test_steps_under_way_draw_the_same_tasks_again_after_a_rewind(tasks: TaskStream) -> None:
    tasks.begin(0)
    zero = _ids(tasks.draw(0, 2))
    tasks.begin(1)
    one = _ids(tasks.draw(1, 2))
    refill = _ids(tasks.draw(0, 1))
    assert len({*zero, *one, *refill}) == 5
    tasks.finish(0)
    state = tasks.state()
    later = _ids(tasks.draw(2, 2))
    tasks.rewind(state)
    tasks.begin(1)
    assert _ids(tasks.draw(1, 2)) == one
    tasks.begin(2)
    assert _ids(tasks.draw(2, 2)) == later


def test_an_unfinished_step_draws_its_tasks_again_and_then_new_ones(tasks: TaskStream) -> None:
    tasks.begin(0)
    first = _ids(tasks.draw(0, 3))
    tasks.begin(0)
    again = deque(_ids(tasks.draw(0, 2)) + _ids(tasks.draw(0, 2)))
    assert [again.popleft() for _ in range(3)] == first
    assert again[0] not in first


def test_a_checkpoint_of_a_run_in_turn_knows_only_the_next_task(tasks: TaskStream) -> None:
    tasks.begin(0)
    tasks.draw(0, 4)
    tasks.finish(0)
    assert tasks.state() == {"next_task": 4, "spare": [], "drawn": {}}


def test_what_a_step_needs_no_more_is_played_in_a_later_one(tasks: TaskStream) -> None:
    tasks.begin(0)
    first = _ids(tasks.draw(0, 4))
    tasks.begin(0)
    assert _ids(tasks.draw(0, 3)) == first[:3]
    tasks.finish(0)
    state = tasks.state()
    assert _ids(tasks.draw(1, 2))[0] == first[3]
    tasks.rewind(state)
    assert _ids(tasks.draw(1, 2))[0] == first[3]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ("sampler", "none")),
        (["train.max_staleness=1"], ("proximal", "tis")),
        (["train.max_staleness=1", "grpo.trust='sampler'"], ("sampler", "none")),
        (["train.max_staleness=1", "grpo.trust='proximal'", "grpo.correction='none'"], ("proximal", "none")),
        (["train.max_staleness=1", "grpo.preset='gspo'"], ("proximal", "tis")),
        (["train.max_staleness=1", "grpo.preset='dppo'"], ("sampler", "none")),
    ],
)
def test_stale_samples_are_corrected_unless_it_says_how(
    settings: list[str], expected: tuple[str, str]
) -> None:
    objective = corrected(load_config(None, settings)).grpo
    assert (objective.trust, objective.correction) == expected


def test_what_was_corrected_stays_so_when_it_is_read_again() -> None:
    once = corrected(load_config(None, ["train.max_staleness=2"]))
    again = Config.model_validate(once.model_dump())
    assert corrected(again) == once


def test_the_loop_in_turn_refuses_to_run_ahead() -> None:
    with pytest.raises(ConfigError, match="lets no rollout run ahead"):
        train(load_config(None, ["train.max_staleness=1"]))
