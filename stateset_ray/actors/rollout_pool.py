"""All rollout workers: hands out groups, gathers reports, and loses nothing when a worker dies.

Groups that are collected together are a flight; several flights may be under way, each with its own books.
Who waits for whom: `wait` and `collect` wait for the workers' reports, a worker waits for its environments
and its engine. A dead worker is restarted by Ray; until it answers again the others take its groups. The
groups that were on it are suspects then: each is tried again alone on a worker, so that one task that kills
every worker it meets is found, given up after `rollout.retries`, and takes no other down with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from stateset_ray.actors.flight import Collected, Flight, GroupHandle
from stateset_ray.actors.inference_pool import InferencePool, inference_engines
from stateset_ray.actors.jobs import GroupJob, GroupReport
from stateset_ray.actors.placement import Placement
from stateset_ray.actors.publishing.base import PublishedWeights
from stateset_ray.actors.remote import cause_of, get, those_there
from stateset_ray.actors.roster import Roster, Stream, Worker, rollout_workers
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, WaitTimeout
from stateset_ray.types import StopReason

__all__ = ["RolloutPool", "rollout_pool"]

_POLL = 1.0  # seconds between looks at deadlines and at the caller's wish to stop


class RolloutPool:
    """Plays jobs on the workers that `rollout_pool` created.

    Args:
        config: of the run.
        roster: the workers.
        engines: those that answer them; without any, each worker has an engine of its own.
    """

    def __init__(self, config: Config, roster: Roster, engines: InferencePool | None = None) -> None:
        self._config = config
        self._engines = engines or InferencePool(config)
        self._roster = roster
        self._flights: dict[str, Flight] = {}
        """Of every group that has not ended."""
        self._suspects: deque[GroupJob] = deque()
        self._held: deque[GroupJob] = deque()
        """Groups for which there is no worker at the moment."""
        self._deaths = 0
        self._quiet_since = time.monotonic()
        self.weights: PublishedWeights | None = None

    @property
    def capacity(self) -> int:
        """Groups that all live workers together can play at once."""
        limits = self._config.rollout
        return max(1, len(self._roster.live) * limits.concurrency // self._config.grpo.group_size)

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        return [facts["pid"] for facts in self._ask([w.actor.ready.remote() for w in self._roster.live])]

    @property
    def engine_pids(self) -> list[int]:
        """Process ids of the engines that sit apart from the workers; waits for those that Ray restarts."""
        return self._engines.pids

    @property
    def receivers(self) -> list[Any]:
        """The actors that fetch weights: the engines apart, or the workers with an engine of their own."""
        return self._engines.actors or [w.actor for w in self._roster.live]

    def beat(self) -> None:
        """Restart what has not answered in time, workers that hold nothing included.

        Raises:
            ClusterError: see `Roster.beat`.
        """
        self._roster.beat(idle=True)
        self._engines.beat()

    def announce(self) -> None:
        """Let all engines apart fetch the published weights now; see `InferencePool.announce`."""
        assert self.weights is not None
        self._engines.announce(self.weights)

    def stats(self) -> list[dict[str, float]]:
        """What every live worker's engine has done, or its router: `EngineStats`, `Router.stats`."""
        return list(self._ask([w.actor.stats.remote() for w in self._roster.live]))

    def _ask(self, refs: list[Any]) -> list[Any]:
        limit = self._config.cluster.wait_seconds
        return list(get(refs, timeout=limit, waiting_for="the rollout workers' answers"))

    def collect(self, jobs: Sequence[GroupJob], should_stop: Callable[[], bool] = lambda: False) -> Collected:
        """Play every job once with the published weights, and wait for all of them.

        Args:
            jobs: groups to play; their ids are unique.
            should_stop: looked at about once a second.

        Raises:
            WaitTimeout: no report came for longer than a conversation may last.
            KeyboardInterrupt: `should_stop` said so; everything unfinished is abandoned.
            StatesetError: a worker raised an error that is not a conversation's (a bug, a bad environment).
        """
        flight = Flight()
        self.dispatch(flight, jobs)
        self.wait(flight, should_stop)
        return self.collected(flight)

    def collected(self, flight: Flight) -> Collected:
        """What a flight has brought so far, and how many workers died since this was last asked."""
        deaths, self._deaths = self._deaths, 0
        return flight.collected(deaths)

    def dispatch(self, flight: Flight, jobs: Sequence[GroupJob]) -> None:
        """Send groups to the workers, to the least loaded first; does not wait for them."""
        if not self._flights:
            self._quiet_since = time.monotonic()
        for job in jobs:
            flight.add(job.id)
            self._flights[job.id] = flight
        self._held.extend(jobs)
        if not self._roster.live:
            self._roster.await_any()
        self._tend()

    def wait(
        self, flight: Flight, should_stop: Callable[[], bool] = lambda: False,
        meanwhile: Callable[[], None] = lambda: None, enough: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """Wait until every group of a flight has ended, and take what comes for the others too.

        Args:
            meanwhile: called after everything that came.
            enough: whether what has ended is enough.

        Raises:
            StatesetError, KeyboardInterrupt: see `collect`.
        """
        while flight.unfinished and not enough():
            if should_stop():
                self.abandon()
                raise KeyboardInterrupt
            if self.advance(_POLL):
                meanwhile()

    def advance(self, seconds: float) -> bool:
        """Wait for whatever comes next, at most so long, and take it; False if nothing came.

        Raises:
            StatesetError: see `collect`.
        """
        waits = self._roster.waits()
        if not waits:
            raise ClusterError("no rollout worker is left", mend="look at the workers' logs")
        # Not fetched: the first half of what a stream gives is a payload, which stays where it is.
        ready, _ = ray.wait(list(waits), num_returns=1, timeout=seconds, fetch_local=False)
        if ready:  # a look at all of them costs as much as a look at one: take everything that is there
            ready = those_there(list(waits))
        came = False
        while ready:
            halves = []
            for item in ready:
                worker = waits[item]
                if item not in worker.streams:
                    came |= self._roster.answered(worker, item)
                elif self._report(worker, item):
                    came = True
                else:
                    halves.append(item)
            # A report mostly is there with its payload; one that is not may never come.
            ready = those_there(halves)
        self._roster.beat()
        self._engines.beat()
        if came:
            self._quiet_since = time.monotonic()
            self._tend()
        limit = self._config.rollout.conversation_timeout + self._config.cluster.wait_seconds
        if self._flights and time.monotonic() - self._quiet_since > limit:
            raise WaitTimeout(
                f"the controller got no report from any rollout worker for {limit:.0f} s",
                given={worker.index: worker.playing for worker in self._roster.workers},
                mend="look at the workers' logs; something hangs without a limit of its own",
            )
        return came

    def move(self, source: Flight, target: Flight) -> None:
        """Let the groups of a flight that have not ended be collected with another one."""
        for name in list(source.unfinished):
            source.unfinished.discard(name)
            target.add(name)
            self._flights[name] = target
        for job in self._playing(target):
            if job.id in source.order:
                source.counts.dispatched -= job.size
                target.counts.dispatched += job.size
        for name in target.unfinished & source.order.keys():
            del source.order[name]

    def drop(self, flight: Flight, reason: str) -> None:
        """Give up the groups of a flight that have not ended."""
        names = set(flight.unfinished)
        for worker in self._roster.workers:
            for stream in worker.streams.values():
                mine = [stream.jobs.pop(name) for name in names & stream.jobs.keys()]
                if mine:
                    flight.counts.aborted[reason] += sum(job.size for job in mine)
                    worker.actor.drop.remote([job.id for job in mine])
        self._suspects = deque(job for job in self._suspects if job.id not in names)
        self._held = deque(job for job in self._held if job.id not in names)
        for name in names:
            self._end(name)
        self._tend()

    def replay(self, flight: Flight, lost: Sequence[GroupHandle], reason: str) -> None:
        """Play groups once more that had ended; those that have no retry left are given up."""
        for handle in lost:
            job = handle.report.job.again()
            flight.groups.remove(handle)
            flight.counts.aborted[reason] += job.size
            if job.attempt <= self._config.rollout.retries:
                flight.unfinished.add(job.id)
                self._flights[job.id] = flight
                self._held.append(job)
        self._tend()

    def abandon(self) -> None:
        """Give up everything that is under way, in every flight."""
        for worker in self._roster.workers:
            for stream in worker.streams:
                ray.cancel(stream)
            worker.clear()
        self._flights.clear()
        self._suspects.clear()
        self._held.clear()

    def _playing(self, flight: Flight) -> list[GroupJob]:
        """Groups of a flight that are on a worker."""
        streams = [stream for worker in self._roster.workers for stream in worker.streams.values()]
        return [job for stream in streams for job in stream.jobs.values() if self._flights[job.id] is flight]

    def _end(self, name: str) -> Flight:
        """A group has ended, one way or the other; the flight that it belongs to."""
        flight = self._flights.pop(name)
        flight.unfinished.discard(name)
        return flight

    def _tend(self) -> None:
        """Give suspects workers of their own, and all other groups the least loaded of the rest."""
        live = self._roster.live
        for worker in live:
            if not worker.streams and self._suspects:
                self._play(worker, [self._suspects.popleft()], suspect=True)
            # What is left of others' work on a worker that a suspect waited for is no reason any more.
            waits = worker.alone and bool(self._suspects)
            worker.alone = waits or any(stream.suspect for stream in worker.streams.values())
        if self._suspects and live and not any(w.alone for w in live):
            # Nobody is idle: one is left to finish what it has, so that a suspect's turn will come.
            min(live, key=lambda w: (w.load, w.index)).alone = True
        takers = [w for w in live if not w.alone]
        if not takers:
            return
        hands: dict[int, list[GroupJob]] = {worker.index: [] for worker in takers}
        while self._held:
            worker = min(takers, key=lambda w: (w.load + len(hands[w.index]), w.index))
            hands[worker.index].append(self._held.popleft())
        for worker in takers:
            if jobs := hands[worker.index]:
                self._play(worker, jobs)

    def _play(self, worker: Worker, jobs: Sequence[GroupJob], *, suspect: bool = False) -> None:
        weights = self.weights or PublishedWeights(0)
        for job in jobs:
            self._flights[job.id].counts.dispatched += job.size
        stream = worker.actor.play.options(num_returns="streaming").remote(
            weights.version, weights.told, list(jobs)
        )
        worker.streams[stream] = Stream({job.id: job for job in jobs}, suspect)

    def _report(self, worker: Worker, item: Any) -> bool:
        """Take what is there of a worker's stream; False if it was a payload, whose report is to follow.

        Only one reference: a worker that fell silent between the two would hold up the controller for ever.
        """
        stream = worker.streams[item]
        try:
            if stream.payload is None:
                stream.payload = next(item)
                return False
            payload, stream.payload = stream.payload, None
            # After a death the stream's last reference is what raises it: then there is no report.
            report: GroupReport = ray.get(next(item, payload), timeout=self._config.cluster.wait_seconds)
        except StopIteration:
            del worker.streams[item]
            for unreported in stream.jobs.values():
                self._retry(unreported, "unreported")
            return True
        except (RayActorError, ObjectLostError, GetTimeoutError) as death:
            self._lost(worker, death)
            return True
        except RayTaskError as error:
            if not worker.guest:
                raise cause_of(error) from None
            for left in self._roster.dismiss(worker, cause_of(error)):
                self._retry(left, "worker_died", guilty=False)
            return True
        job = stream.jobs.pop(report.job.id, None)
        failed = StopReason.INFRASTRUCTURE_ERROR.value in report.stop_reasons
        if job is None:  # it was dropped, and had ended before the worker knew
            pass
        elif failed and job.attempt < self._config.rollout.retries:
            self._retry(job, "infrastructure_error")
        else:
            self._end(job.id).groups.append(GroupHandle(report, payload))
        return True

    def _lost(self, worker: Worker, death: Exception) -> None:
        """A worker died: its unfinished groups become suspects, or are given up."""
        self._deaths += 1
        jobs = self._roster.lost(worker, death)
        for job in jobs:
            # Only a group that was alone on the worker is known to have been there when it died.
            self._retry(job, "worker_died", guilty=len(jobs) == 1)

    def _retry(self, job: GroupJob, reason: str, *, guilty: bool = True) -> None:
        """A group was played in vain: it is a suspect, or given up if it is guilty too often."""
        self._flights[job.id].counts.aborted[reason] += job.size
        again = job.again() if guilty else job
        if again.attempt > self._config.rollout.retries:
            self._end(job.id)
        else:
            self._suspects.append(again)


@contextmanager
def rollout_pool(config: Config, placement: Placement) -> Iterator[RolloutPool]:
    """Create engines and workers, wait until they can work, and end them afterwards.

    Raises:
        StatesetError: one of them could not be built (its model, its template); the cause is passed on.
        WaitTimeout: not ready within `cluster.wait_seconds`.
    """
    with (
        inference_engines(config, placement) as engines,
        rollout_workers(config, placement, engines) as roster,
    ):
        yield RolloutPool(config, roster, InferencePool(config, engines))
