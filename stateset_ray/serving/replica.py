"""A replica of the policy: one engine, the requests of many clients, and the newest weights of its run.

New weights are taken over without a pause: they are loaded beside those that answer, verified byte by byte,
made to answer once, and then one reference is swapped. Whatever is wrong with them changes nothing but a
metric.

Who waits for whom: a request for a slot of the engine; the watcher for the run's folder. Loading runs in a
thread, so that answers go on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
from ray import serve

from stateset_ray.errors import CheckpointError, InfrastructureFault, StatesetError
from stateset_ray.models import Hardware, choose_hardware
from stateset_ray.serving.autoscaling import METRIC
from stateset_ray.serving.events import Ask, Event
from stateset_ray.serving.held_policy import HeldPolicy, load_policy
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.redaction import RedactingFilter
from stateset_ray.serving.settings import ServeSettings
from stateset_ray.serving.source import Candidate, Source
from stateset_ray.serving.verification import checked

__all__ = ["PolicyReplica", "policy_deployment"]

_log = logging.getLogger("ray.serve")  # what Serve writes as JSON, with the replica and the request


class PolicyReplica:
    """Answers with the policy; wrapped as a deployment by `policy_deployment`.

    Args:
        settings: of the endpoint.
        meters: where it counts; by default Ray's metrics.
    """

    def __init__(self, settings: ServeSettings, meters: Meters | None = None) -> None:
        self._settings = settings
        self._meters = meters or Meters.of_ray()
        self._source = Source(settings.source)
        self._held: HeldPolicy | None = None
        self._refused: set[tuple[str, int]] = set()
        self._problem = ""
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
        if self._source.run is not None and self._settings.swap.poll_seconds:
            self._watch = asyncio.create_task(self._follow(), name="checkpoints")

    async def answer(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """The events of one answer, all of them by the version that holds now."""
        held = self._policy()
        sampled = held.sampled
        self._meters.set("generations", held.running + 1)
        try:
            async with aclosing(held.answer(ask)) as answer:
                async for events in answer:
                    self._meters.set("tokens_before", held.tokens)
                    yield events
        finally:
            self._meters.add("sampled_tokens", held.sampled - sampled)
            self._meters.set("generations", held.running)
            self._meters.set("tokens_before", held.tokens)

    async def status(self) -> dict[str, Any]:
        """What this replica holds and does."""
        held = self._policy()
        return {
            "pid": os.getpid(),
            "version": held.candidate.label,
            "step": held.candidate.step,
            "running": held.running,
            "sampled": held.sampled,
            "tokens": held.tokens,
            "max_context": held.max_context,
            "problem": self._problem,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tokens before this replica; Serve asks for it."""
        return {METRIC: float(self._held.tokens if self._held else 0)}

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._watch is not None and self._watch.done():
            raise InfrastructureFault("the watcher of checkpoints has ended")

    async def swap(self, candidate: Candidate) -> bool:
        """Let another version answer from the next request on; False if it may not.

        Never raises for what is wrong with the candidate: the version that answers stays.
        """
        started = time.monotonic()
        before = self._policy()
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
        _log.info("version %s answers, taken over in %.1f s", candidate.label, seconds)
        await before.retire()
        return True

    def _refuse(self, candidate: Candidate, error: Exception) -> None:
        self._refused.add((candidate.label, candidate.stamp))
        self._problem = f"{candidate.label}: {_sentence(error)}"
        self._meters.add("swaps", 1, outcome="refused")
        _log.error("a checkpoint was refused: %s", self._problem)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.swap.poll_seconds)
            try:
                wanted = await asyncio.to_thread(self._source.wanted)
            except StatesetError as error:
                self._problem = error.problem
                continue
            current = self._policy().candidate
            if wanted is None or (wanted.label, wanted.stamp) == (current.label, current.stamp):
                continue
            if (wanted.label, wanted.stamp) not in self._refused:
                await self.swap(wanted)

    async def _load(self, candidate: Candidate) -> HeldPolicy:
        def load() -> HeldPolicy:
            config = self._source.config()
            room = checked(candidate, config, self._settings.policy.max_context)
            return load_policy(candidate, self._settings, self._hardware(), room, self._held)

        held = await asyncio.to_thread(load)
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

    def _policy(self) -> HeldPolicy:
        if self._held is None:
            raise InfrastructureFault("this replica has not loaded its policy yet")
        return self._held


def _sentence(error: Exception) -> str:
    return error.problem if isinstance(error, StatesetError) else f"{type(error).__name__}: {error}"


class _Policy(PolicyReplica):
    """What Serve builds; its constructor ends when the policy can answer."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__(settings)
        await self.start()


def policy_deployment(settings: ServeSettings) -> Any:
    """The deployment of the policy, with all that the settings say of it."""
    policy, scaling = settings.policy, settings.autoscaling
    options: dict[str, Any] = {"num_replicas": policy.replicas}
    if scaling.max_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": scaling.min_replicas,
                "initial_replicas": min(max(policy.replicas, scaling.min_replicas), scaling.max_replicas),
                "max_replicas": scaling.max_replicas,
                "upscale_delay_s": scaling.upscale_delay,
                "downscale_delay_s": scaling.downscale_delay,
                "metrics_interval_s": scaling.interval,
                "look_back_period_s": max(2 * scaling.interval, 4.0),
                "policy": {
                    "policy_function": "stateset_ray.serving.autoscaling:TokensPerReplica",
                    "policy_kwargs": {"target": scaling.target_tokens},
                },
            }
        }
    return serve.deployment(
        _Policy,
        name="Policy",
        ray_actor_options={"num_cpus": policy.cpus, "num_gpus": policy.gpus},
        max_ongoing_requests=policy.ongoing,
        max_queued_requests=policy.queued,
        graceful_shutdown_timeout_s=settings.deadlines.drain,
        request_router_config={
            "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
            # Where a conversation's own replica is full or dead, the next on the ring answers it.
            "request_router_kwargs": {"num_fallback_replicas": max(2, settings.most_replicas)},
        },
        **options,
    )
