"""One rollout worker: a Ray actor that plays many conversations at once.

An engine of its own answers them, or engines elsewhere do, which it reaches through a router.

It never speaks of weights it does not have: every `play` names the version it wants and carries its
handle, so that a restarted worker heals itself before it answers anything.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from stateset_ray.actors.held_engine import HeldEngine, Inference, renderer_of
from stateset_ray.actors.jobs import GroupJob, GroupPayload, GroupReport, report_on
from stateset_ray.actors.publishing.folder import sees
from stateset_ray.actors.router import Router
from stateset_ray.config import Config
from stateset_ray.environments.base import construct, load_environment
from stateset_ray.environments.boundary import ask_expert
from stateset_ray.environments.threads import THREADS
from stateset_ray.errors import InfrastructureFault, StatesetError
from stateset_ray.policies.base import Policy
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.rollout import rollout
from stateset_ray.types import StopReason, Trajectory, TrajectoryGroup

__all__ = ["RolloutWorker"]


class RolloutWorker:
    """Plays groups of conversations; wrapped as a Ray actor by `RolloutPool`.

    Args:
        config: of the run.
        index: of this worker in the pool.
        peers: workers that share this machine's cores.
        import_paths: where the environment's module is found, besides the installed packages.
        engines: actors that answer; without any, an engine of this worker's own.
    """

    def __init__(
        self, config: Config, index: int, peers: int, import_paths: Sequence[str],
        engines: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self._config = config
        self._index = index
        self._peers = peers
        self._import_paths = import_paths
        self._engines = engines
        self._inference: Inference | None = None
        self._groups: dict[str, asyncio.Task[tuple[GroupReport, GroupPayload]]] = {}
        self._setting_up = asyncio.Lock()
        self._places = asyncio.Semaphore(config.rollout.concurrency)

    def __repr__(self) -> str:  # names the actor in Ray's logs and dashboard
        return f"{self._config.run.name}/rollout-{self._index}"

    async def ready(self) -> dict[str, Any]:
        """Load everything on the first call (a constructor could not report its errors); facts about it.

        Raises:
            StatesetError: the model, its template or the hardware is not as configured.
        """
        async with self._setting_up:
            if self._inference is None:
                self._set_up()
                # What is loaded stays: looking through it again would be a tenth of a busy worker's time.
                gc.collect()
                gc.freeze()
        return {"pid": os.getpid(), "rewrites_history": self._renderer.rewrites_history}

    def _set_up(self) -> None:
        sys.path[:0] = [p for p in self._import_paths if p not in sys.path]
        # What an async environment sends to a thread itself must not starve the others either.
        asyncio.get_running_loop().set_default_executor(THREADS)
        section = self._config.environment
        self._environment = load_environment(section.path, section.options)
        self._renderer = renderer_of(self._config)
        if self._engines:
            self._inference = Router(self._engines)
        else:
            self._inference = HeldEngine(self._config, self._peers, self._renderer)

    async def play(
        self, version: int, weights: Mapping[str, Any], jobs: Sequence[GroupJob]
    ) -> AsyncIterator[GroupReport | GroupPayload]:
        """Play groups with one version of the weights.

        Args:
            version: the oldest version that may answer; a newer one may come while they are played, and
                takes over between two turns of a conversation.
            weights: what `PublishedWeights.told` tells; fetched only if this worker does not hold them yet.
            jobs: what to play.

        Yields:
            For each group that was not dropped, in the order they finish: its payload, then its report.
        """
        await self.ready()  # Ray may have restarted it while nobody looked
        inference = self._loaded()
        if any(not job.expert for job in jobs):
            await inference.hold(version, weights)
        groups = {job.id: asyncio.create_task(self._group(job)) for job in jobs}
        self._groups |= groups
        playing = set(groups.values())
        try:
            while playing:
                ended, playing = await asyncio.wait(playing, return_when=asyncio.FIRST_COMPLETED)
                for group in ended:
                    if group.cancelled():  # dropped
                        continue
                    report, payload = group.result()
                    # In this order: who holds the report knows that the payload arrived whole.
                    yield payload
                    yield report
        finally:
            for name, group in groups.items():
                group.cancel()
                if self._groups.get(name) is group:
                    del self._groups[name]

    async def drop(self, names: Sequence[str]) -> None:
        """Give up groups that nobody waits for any more; those that have ended are not touched."""
        for name in names:
            if group := self._groups.get(name):
                group.cancel()

    async def sleep(self) -> None:
        """Let an engine of this worker's own give up weights and cache until the next `play`."""
        if isinstance(self._inference, HeldEngine):
            await self._inference.sleep()

    def stats(self) -> dict[str, float]:
        """What the engine has done so far, or the router; see `EngineStats` and `Router.stats`."""
        return self._loaded().stats()

    def sees(self, root: str, token: str) -> tuple[bool, str]:
        """See `publishing.folder.sees`."""
        return sees(root, token)

    def _loaded(self) -> Inference:
        if self._inference is None:
            raise InfrastructureFault("this rollout worker was asked to play before it was ready")
        return self._inference

    async def _group(self, job: GroupJob) -> tuple[GroupReport, GroupPayload]:
        played = await asyncio.gather(*[self._one(job, sample) for sample in range(job.size)])
        return report_on(job, TrajectoryGroup(job.task, tuple(played)))

    async def _one(self, job: GroupJob, sample: int) -> Trajectory:
        async with self._places:
            name = f"{job.id}/{sample}/{job.attempt}"
            try:
                environment = construct(self._environment, self._config.environment.options)
            except StatesetError as error:  # it could be built where the run was started
                failed = StopReason.ENVIRONMENT_ERROR
                return Trajectory(name, job.task, sample, (), (), failed, error=str(error))
            policy: Policy = self._loaded()
            if job.expert:
                policy = ScriptedPolicy(self._renderer, lambda _: ask_expert(environment))
            return await rollout(
                environment, job.task, policy, self._renderer, self._config.rollout,
                id=name, seed=job.seed, sample=sample,
                temperature=job.temperature,
            )  # fmt: skip
