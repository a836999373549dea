"""Steps whose groups are played before they are asked for, and how far ahead they may run.

Every step learns from the groups that the task stream deals to it, whichever were finished first: nothing
that was played is thrown away, and short conversations are not favoured. A conversation that does not end
holds its step no longer than `rollout.conversation_timeout`. With `train.oversample` a step plays more groups
than it learns from and leaves the slowest to the next step, once: there they are waited for, so that slow
tasks are learned from later, not less.

Who waits for whom: `take` waits for the groups of its step, and then until the learner's node holds them, so
that they outlive the nodes that played them; the groups of later steps are played meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from stateset_ray.actors.credit import informative
from stateset_ray.actors.flight import Collected, Flight
from stateset_ray.actors.jobs import Counts
from stateset_ray.actors.rollout_pool import RolloutPool
from stateset_ray.actors.task_stream import TaskStream
from stateset_ray.config import Config

__all__ = ["Lookahead", "may_start"]

_POLL = 0.02  # seconds between looks at work that is done beside the rollouts

_T = TypeVar("_T")


def may_start(
    *, capacity: int, staleness: int, steps: int, per_step: int, accepted: int, running: int
) -> int:
    """How many groups may be started now (the admission rule of AReaL).

    The k-th group ever started is learned from in step floor((k - 1) / per_step). Those that are allowed
    here are learned from at most `staleness` steps after the weights that begin to play them.

    Args:
        capacity: groups that can be played at once.
        staleness: steps that a group may lag behind; 0 is synchronous.
        steps: steps done.
        per_step: groups of a step.
        accepted: groups finished since the start of the run.
        running: groups that are being played.

    Example:
        >>> may_start(capacity=64, staleness=0, steps=3, per_step=4, accepted=12, running=0)
        4
        >>> may_start(capacity=6, staleness=1, steps=3, per_step=4, accepted=13, running=2)
        4
    """
    return max(0, min(capacity - running, (staleness + steps + 1) * per_step - (accepted + running)))


class Lookahead:
    """The flights of the next steps.

    Args:
        config: of the run.
        pool: plays the groups.
        tasks: deals them to steps.
        secure: brings payloads of finished groups to where they are learned from; returns the indices of
            those that were lost before.
    """

    def __init__(
        self, config: Config, pool: RolloutPool, tasks: TaskStream,
        secure: Callable[[Sequence[Any]], Sequence[int]],
    ) -> None:  # fmt: skip
        self._config = config
        self._pool = pool
        self._tasks = tasks
        self._secure = secure
        self._flights: dict[int, Flight] = {}
        self._admitted: dict[int, int] = {}
        self._due: dict[str, int] = {}  # the last step that may learn from a group, and has to wait for it
        self._open: Flight | None = None  # of the step that was taken and is not finished
        self._taken = 0  # the first step that was not taken yet
        self._in_vain = Counts()

    def admit(self, step: int, staleness: int) -> None:
        """Start what may be started while `step` steps are done."""
        train = self._config.train
        admitted = sum(self._admitted.values())
        running = min(admitted, sum(len(flight.unfinished) for flight in self._flights.values()))
        room = train.oversample + may_start(
            # A synchronous step is dealt out whole, whatever the workers can play at once.
            capacity=max(self._pool.capacity, train.tasks_per_step), staleness=staleness, steps=step,
            per_step=train.tasks_per_step, accepted=self._taken * train.tasks_per_step + admitted - running,
            running=running,
        )  # fmt: skip
        for ahead in range(self._taken, min(step + staleness + 1, train.steps)):
            self._begin(ahead)
            count = min(room, self._wanted(ahead, step) - self._admitted[ahead])
            if count > 0:
                self._admitted[ahead] += count
                room -= count
                self._start(ahead, count, step, staleness)

    def take(self, step: int, staleness: int, should_stop: Callable[[], bool]) -> Collected:
        """Wait for the groups of a step.

        Groups of equal rewards are replaced by further tasks, in up to `grpo.refills` rounds; what was
        replaced is in the result too, for the books. With `train.oversample` the slowest groups are left to
        the next step.

        Raises:
            StatesetError, KeyboardInterrupt: see `RolloutPool.collect`.
        """
        self._taken = step

        def admit() -> None:
            self.admit(step, staleness)

        def enough() -> bool:
            return self._missing(step) <= 0 and all(self._due[name] > step for name in flight.unfinished)

        # This begins all groups of the step, however few can be played at once: a later step has some only
        # where this one has its `tasks_per_step`, and there is room for those and for `oversample` more.
        admit()
        flight = self._flights[step]
        self._pool.wait(flight, should_stop, admit, enough)
        for _ in range(self._config.grpo.refills):
            if (missing := self._missing(step)) <= 0:
                break
            self._start(step, missing, step, staleness)
            self._pool.wait(flight, should_stop, admit, enough)
        while lost := self._secure([group.payload for group in flight.groups]):
            self._pool.replay(flight, [flight.groups[index] for index in lost], "payload_lost")
            self._pool.wait(flight, should_stop, admit, enough)
        self._leave_behind(step, staleness)
        for name in flight.order:
            del self._due[name]
        del self._flights[step], self._admitted[step]
        self._open = flight
        self._taken = step + 1
        collected = self._pool.collected(flight)
        collected.counts.dispatched += self._in_vain.dispatched
        collected.counts.aborted += self._in_vain.aborted
        self._in_vain = Counts()
        return collected

    def _begin(self, step: int) -> None:
        if step not in self._flights:
            self._tasks.begin(step)
            self._flights[step], self._admitted[step] = Flight(), 0

    def _wanted(self, step: int, now: int) -> int:
        """Groups that a step is to have begun while `now` steps are done."""
        train = self._config.train
        return train.tasks_per_step + (train.oversample if step == now else 0)

    def _missing(self, step: int) -> int:
        """Groups that a step can still use to learn from."""
        ended = [group.report for group in self._flights[step].groups]
        useful = (
            [informative(report, self._config) for report in ended] if self._config.grpo.refills else ended
        )
        return self._config.train.tasks_per_step - sum(map(bool, useful))

    def _start(self, step: int, count: int, now: int, staleness: int) -> None:
        """Play the next groups of a step while `now` steps are done."""
        jobs = self._tasks.draw(step, count)
        for job in jobs:
            # A step in turn may leave a task to the next one, which plays it again and waits for it.
            self._due[job.id] = now + (staleness or not self._tasks.redrawn(job.id))
        self._pool.dispatch(self._flights[step], jobs)

    def _leave_behind(self, step: int, staleness: int) -> None:
        """Hand what a step did not wait for to the next one."""
        flight, following = self._flights[step], step + 1
        names = frozenset(flight.unfinished)
        if not names:
            return
        if staleness and following < self._config.train.steps:
            self._begin(following)
            self._pool.move(flight, self._flights[following])
            self._admitted[following] += len(names)
        else:
            self._pool.drop(flight, "outrun")
        self._tasks.defer(step, names, playing=bool(staleness))

    def finish(self, step: int) -> None:
        """End a step: it was learned from, and its books are closed."""
        self._open = None
        self._tasks.finish(step)

    def meanwhile(self, step: int, staleness: int, work: Callable[[], _T]) -> _T:
        """Do something else that blocks, and keep the workers supplied until it is done.

        Raises:
            Exception: what `work` raised; StatesetError: see `RolloutPool.collect`.
        """
        if not self._flights:
            return work()
        with ThreadPoolExecutor(1, thread_name_prefix="meanwhile") as thread:
            done = thread.submit(work)
            while not done.done() and any(flight.unfinished for flight in self._flights.values()):
                if self._pool.advance(_POLL):
                    self.admit(step, staleness)
            return done.result()

    def clear(self) -> None:
        """Give up every flight: the run goes back to a checkpoint. Their books go to the next step's."""
        if self._flights:
            self._pool.abandon()
        for flight in [*([self._open] if self._open else []), *self._flights.values()]:
            lost = flight.abandoned("rewound")
            self._in_vain.dispatched += lost.dispatched
            self._in_vain.aborted += lost.aborted
        self._flights, self._admitted, self._open = {}, {}, None
        self._due = {}
