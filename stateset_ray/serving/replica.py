"""A replica of the policy: one engine, the requests of many clients, and the newest weights of its run.

New weights are taken over without a pause: they are loaded beside those that answer, verified byte by byte,
made to answer once, and then one reference is swapped. Whatever is wrong with them changes nothing but a
metric. A canary is a second version that is loaded in the same way and kept beside the first; it answers the
conversations that fall to it (`release.falls_to`) until it is promoted, taken back, or has failed too often.

Who waits for whom: a request for a slot of the engine; the watcher for the run's folder. Loading runs in a
thread, so that answers go on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import ray

from stateset_ray.errors import CheckpointError, InfrastructureFault, StatesetError
from stateset_ray.models import Hardware, choose_hardware
from stateset_ray.serving.autoscaling import METRIC
from stateset_ray.serving.events import Ask, Event
from stateset_ray.serving.held_policy import HeldPolicy, load_policy
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.redaction import RedactingFilter
from stateset_ray.serving.release import falls_to
from stateset_ray.serving.settings import ServeSettings
from stateset_ray.serving.source import Candidate, Source
from stateset_ray.serving.tally import Tallies
from stateset_ray.serving.verdicts import Verdicts
from stateset_ray.serving.verification import checked

__all__ = ["PolicyReplica"]

_log = logging.getLogger("ray.serve")  # what Serve writes as JSON, with the replica and the request


@dataclass
class _Canary:
    """A version that is tried, and how often it has failed here."""

    held: HeldPolicy
    share: float
    started: int
    """See `Source.canary_started`: what is started again is tried again."""
    failures: int = 0

    def takes(self, ask: Ask) -> bool:
        """Whether this conversation falls to it; what names none is drawn for each request."""
        name = f"step-{self.held.candidate.step:08d}"
        return ask.canary and falls_to(name, self.share, ask.lot or ask.session or ask.id)


class PolicyReplica:
    """Answers with the policy; wrapped as a deployment in `policy_deployment`.

    Args:
        settings: of the endpoint.
        meters: where it counts; by default Ray's metrics.
    """

    def __init__(self, settings: ServeSettings, meters: Meters | None = None) -> None:
        self._settings = settings
        self._meters = meters or Meters.of_ray()
        self._source = Source(settings.source)
        self._held: HeldPolicy | None = None
        self._canary: _Canary | None = None
        self._tallies = Tallies(self._meters)
        self._ending: list[HeldPolicy] = []  # retired, with answers under way
        self._verdicts = Verdicts()
        self._refused_canaries: set[tuple[str, int, int]] = set()  # until there is none any more
        self._problem = self._canary_problem = ""
        self._watch: asyncio.Task[None] | None = None
        if settings.redact:
            _log.addFilter(RedactingFilter())

    async def start(self) -> None:
        """Load the newest version that can answer, and watch for newer ones.

        Raises:
            StatesetError: there is none that can answer: the replica does not come up.
        """
        failure: Exception | None = None
        for candidate in await asyncio.to_thread(lambda: list(self._source.candidates())):
            try:
                self._held = await self._load(candidate)
                break
            except Exception as error:
                # As for those that come later: one that cannot answer takes nothing away but itself.
                self._refuse(candidate, error)
                failure = error
        if self._held is None:
            raise failure or CheckpointError("there is no checkpoint", given=self._settings.source)
        self._meters.set("policy_step", self._held.candidate.step)
        self._show_canary()
        await self._follow_canary()
        if self._source.run is not None and self._settings.swap.poll_seconds:
            self._watch = asyncio.create_task(self._follow(), name="checkpoints")

    async def answer(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """The events of one answer, all of them by the version that holds now.

        A canary that fails before its first token has not been noticed by anybody: the other version answers.
        """
        canary = self._canary
        self._meters.set("generations", self._running() + 1)
        try:
            if canary is not None and canary.takes(ask):
                began = False
                try:
                    async with aclosing(self._tallies.counted(canary.held, "canary", ask)) as answer:
                        async for events in answer:
                            began = True
                            self._meters.set("tokens_before", self._tokens())
                            yield events
                    return
                except Exception as error:  # whatever its model, tokenizer or template chose
                    fault = _fault(error)
                    await self._failed(canary, fault)
                    if began:
                        raise fault from error.__cause__
            async with aclosing(self._tallies.counted(self._policy(), "stable", ask)) as answer:
                async for events in answer:
                    self._meters.set("tokens_before", self._tokens())
                    yield events
        finally:
            self._meters.set("generations", self._running())
            self._meters.set("tokens_before", self._tokens())

    async def status(self) -> dict[str, Any]:
        """What this replica holds and does."""
        held, canary = self._policy(), self._canary
        return {
            "pid": os.getpid(),
            "version": held.candidate.label,
            "step": held.candidate.step,
            "running": self._running(),
            "sampled": held.sampled + (canary.held.sampled if canary else 0),
            "tokens": self._tokens(),
            "prompt_tokens": sum(each.engine.stats.prompt_tokens for each in self._all()),
            "prefill_tokens": sum(each.engine.stats.prefill_tokens for each in self._all()),
            "max_context": held.max_context,
            "problem": self._problem,
            "canary": {
                "version": canary.held.candidate.label,
                "step": canary.held.candidate.step,
                "share": canary.share,
                "failures": canary.failures,
            } if canary else None,
            "canary_problem": self._canary_problem,
            "versions": self._tallies.body(),
        }  # fmt: skip

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tokens before this replica; Serve asks for it."""
        return {METRIC: float(self._tokens())}

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._watch is not None and self._watch.done():
            raise InfrastructureFault("the watcher of checkpoints has ended")
        if self._held is not None and self._held.engine.dead:
            raise InfrastructureFault("the engine has died", mend="its log says why; Serve starts another")

    async def swap(self, candidate: Candidate) -> bool:
        """Let another version answer from the next request on; False if it may not.

        Never raises for what is wrong with the candidate: the version that answers stays.
        """
        started = time.monotonic()
        before, canary = self._policy(), self._canary
        if canary is not None and _same(candidate, canary.held.candidate):
            held, self._canary = canary.held, None  # promoted: it is loaded and has proved itself
        elif back := next((one for one in self._retired() if _same(candidate, one.candidate)), None):
            held = back  # as soon after it was replaced its answers still run
            held.retired = False
            self._ending.remove(held)
        else:
            try:
                held = await self._load(candidate)
            except Exception as error:
                # Readers of files, templates and models raise what their authors chose; none of it may take
                # away a replica that answers.
                self._refuse(candidate, error)
                return False
        self._held, self._problem = held, ""
        seconds = time.monotonic() - started
        self._meters.add("swaps", 1, outcome="done")
        self._meters.observe("swap_seconds", seconds)
        self._meters.set("policy_step", candidate.step)
        self._show_canary()
        _log.info("version %s answers, taken over in %.1f s", candidate.label, seconds)
        await self._retire(before)
        return True

    def _refuse(self, candidate: Candidate, error: Exception, started: int | None = None) -> None:
        """Note that a version cannot answer.

        Args:
            started: of a canary.
        """
        problem = f"{candidate.label}: {_sentence(error)}"
        if started is not None:
            self._refused_canaries.add((candidate.label, candidate.stamp, started))
            self._canary_problem = problem
        else:
            self._verdicts.note(candidate, error)
            self._problem = problem
        self._meters.add("swaps", 1, outcome="refused")
        _log.error("a checkpoint was refused: %s", problem)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.swap.poll_seconds)
            await self._drop_canary()  # first: a third model would have to be in memory as well
            await self._follow_stable()
            await self._follow_canary()

    async def _follow_stable(self) -> None:
        try:
            wanted, held = await asyncio.to_thread(lambda: (self._source.wanted(), self._source.is_held()))
        except StatesetError as error:
            self._problem = error.problem
            return
        if wanted is None or _same(wanted, self._policy().candidate):
            return
        loaded = any(_same(wanted, one.candidate) for one in self._all())
        # There is memory for two. Who holds the run at one may do so because what answers must not go on.
        room = len(self._retired()) <= held
        if loaded or (room and not self._verdicts.stands(wanted)):
            await self.swap(wanted)

    async def _drop_canary(self) -> None:
        """End a canary that is not tried any more, and was not promoted: that one is taken over as it is."""
        canary = self._canary
        if canary is None:
            return
        try:
            tried, stable = await asyncio.to_thread(lambda: (self._source.canary(), self._source.wanted()))
        except StatesetError:
            return  # it is told where they are followed
        wanted = (tried and tried[0], stable)
        if self._canary is canary and not any(one and _same(one, canary.held.candidate) for one in wanted):
            await self._end_canary(canary)

    async def _follow_canary(self) -> None:
        """Load, keep or end the canary, as the run's folder says; what is wrong with it changes nothing."""
        try:
            started, wanted = await asyncio.to_thread(
                lambda: (self._source.canary_started(), self._source.canary())
            )
        except StatesetError as error:
            self._canary_problem = error.problem
            return
        canary = self._canary
        if wanted is None:
            self._canary_problem = ""
            self._refused_canaries.clear()
            await self._drop_canary()
            return
        candidate, share = wanted
        if canary is not None and _same(candidate, canary.held.candidate):
            canary.share, canary.started = share, started
        elif (candidate.label, candidate.stamp, started) not in self._refused_canaries:
            if canary is not None:
                await self._end_canary(canary)
            if self._retired():
                return  # at a later look
            try:
                self._canary = _Canary(await self._load(candidate), share, started)
            except Exception as error:  # as in `swap`
                self._refuse(candidate, error, started)
                return
            self._canary_problem = ""
            _log.info("version %s answers a share of %g", candidate.label, share)
        self._show_canary()

    async def _failed(self, canary: _Canary, error: InfrastructureFault) -> None:
        canary.failures += 1
        _log.error("the canary %s failed: %s", canary.held.candidate.label, error.problem)
        if canary.failures >= self._settings.swap.canary_failures and self._canary is canary:
            self._refuse(canary.held.candidate, error, canary.started)
            await self._end_canary(canary)

    async def _end_canary(self, canary: _Canary) -> None:
        self._canary = None
        self._show_canary()
        await self._retire(canary.held)

    async def _retire(self, held: HeldPolicy) -> None:
        self._ending.append(held)
        await held.retire()
        self._retired()  # lets go of it if it has no answers: its weights are not to wait for the next one

    def _retired(self) -> list[HeldPolicy]:
        """Versions that answer nobody new, and have not ended all of their answers."""
        self._ending = [held for held in self._ending if held.running]
        return self._ending

    def _show_canary(self) -> None:
        canary = self._canary
        self._meters.set("canary_step", canary.held.candidate.step if canary else -1)
        self._meters.set("canary_share", canary.share if canary else 0.0)

    async def _load(self, candidate: Candidate) -> HeldPolicy:
        def load() -> HeldPolicy:
            config = self._source.config()
            room = checked(candidate, config, self._settings.policy.max_context)
            return load_policy(candidate, self._settings, self._hardware(), room, self._held)

        held = await _apart(load)
        try:
            await held.probe(self._settings.swap.probe)
        except BaseException:
            await held.engine.close()
            raise
        return held

    def _hardware(self) -> Hardware:
        config = self._source.config().model
        threads = self._settings.policy.threads or config.threads
        gpus = len(ray.get_gpu_ids()) if ray.is_initialized() else 0
        peers = 1 if self._settings.policy.gpus else self._settings.most_replicas
        hardware = choose_hardware(config.model_copy(update={"threads": threads}), gpus, peers)
        hardware.apply()
        return hardware

    def _running(self) -> int:
        return sum(held.running for held in self._all())

    def _tokens(self) -> int:
        return sum(held.tokens for held in self._all())

    def _all(self) -> list[HeldPolicy]:
        now = (self._held, self._canary and self._canary.held)
        return [*(held for held in now if held), *self._retired()]

    def _policy(self) -> HeldPolicy:
        if self._held is None:
            raise InfrastructureFault("this replica has not loaded its policy yet")
        return self._held


async def _apart(work: Callable[[], HeldPolicy]) -> HeldPolicy:
    """`work` in a thread that ends with it.

    OpenMP has a team of threads for every thread that multiplies. While there are several teams their members
    sleep between two products, and wake too late. A thread of the loop's own pool would never end.
    """
    pool = ThreadPoolExecutor(1, "load")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)


def _same(one: Candidate, other: Candidate) -> bool:
    return (one.label, one.stamp) == (other.label, other.stamp)


def _fault(error: Exception) -> InfrastructureFault:
    """The same as a failure of the engine; what others say may hold what a client said."""
    if isinstance(error, InfrastructureFault):
        return error
    return InfrastructureFault(f"it raised {type(error).__name__}")


def _sentence(error: Exception) -> str:
    return error.problem if isinstance(error, StatesetError) else f"{type(error).__name__}: {error}"
