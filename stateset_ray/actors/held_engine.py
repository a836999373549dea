"""An engine and the version of the weights that it holds: what answers, wherever it sits."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

import ray

from stateset_ray.actors.publishing.transports import receiver
from stateset_ray.config import Config
from stateset_ray.errors import InfrastructureFault
from stateset_ray.models import choose_hardware, generation_stop_ids, load_model, load_tokenizer
from stateset_ray.policies.base import Engine, Policy, Reply, ReplyRequest
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.policies.vllm_engine import VllmEngine

__all__ = ["HeldEngine", "Inference", "renderer_of"]

_log = logging.getLogger(__name__)
_NO_WEIGHTS = -1


class Inference(Policy, Protocol):
    """A policy that can be told which weights must answer."""

    async def hold(self, version: int, weights: Mapping[str, Any]) -> None:
        """Answer with this version, or a newer one, from the next turn on.

        Args:
            version: of the policy.
            weights: what `PublishedWeights.told` tells; fetched only by who does not hold them yet.
        """
        ...

    def stats(self) -> dict[str, float]:
        """What was done so far."""
        ...


def renderer_of(config: Config) -> Renderer:
    """The renderer of the configured model."""
    name = config.model.name
    return Renderer(load_tokenizer(name), generation_stop_ids(name))


def _new_engine(config: Config, peers: int, renderer: Renderer) -> Engine:
    name, limits = config.model.name, config.rollout
    hardware = choose_hardware(config.model, len(ray.get_gpu_ids()), peers)
    hardware.apply()
    if limits.engine_kind == "vllm":
        return VllmEngine(
            name, renderer.stop_ids, slots=limits.slots, max_context=limits.max_context, hardware=hardware
        )
    return TransformersEngine(
        load_model(name, hardware), renderer.stop_ids,
        slots=limits.slots, max_context=limits.max_context, hardware=hardware,
    )  # fmt: skip


class HeldEngine:
    """An engine of the configured kind in this process; implements `Inference`.

    Args:
        config: of the run.
        peers: engines that share this machine's cores.
        renderer: whose stop tokens end a reply.
        engine: to hold instead of one that is built for the model.

    Raises:
        StatesetError: the model or the hardware is not as configured.
    """

    def __init__(self, config: Config, peers: int, renderer: Renderer, engine: Engine | None = None) -> None:
        self._engine = engine or _new_engine(config, peers, renderer)
        self._engine.version = _NO_WEIGHTS
        self._lineage = 0
        self._asleep = False
        self._receiver = receiver(config)
        self._loading = asyncio.Lock()
        self._taking: set[asyncio.Task[bool]] = set()

    async def hold(self, version: int, weights: Mapping[str, Any], *, forget: bool = True) -> None:
        """See `Inference.hold`.

        Args:
            forget: drop what is cached where the version is held already.
        """
        engine, lineage, handle = self._engine, weights["lineage"], weights["handle"]
        if not self._holds(version, lineage):  # who may be answered already need not wait for what comes
            # Who asked may leave (a limit of time, a dropped group); half of the weights must not stay.
            taking = asyncio.create_task(self._take(version, lineage, handle), name=f"weights {version}")
            self._taking.add(taking)
            taking.add_done_callback(self._taking.discard)
            if await asyncio.shield(taking):
                return
        # What is played must not depend, to the last bit, on what was played before with the same weights:
        # an evaluation, say, which a resumed run does not repeat.
        if forget:
            engine.forget()

    async def _take(self, version: int, lineage: int, handle: Any) -> bool:
        """Fetch and load a version; False if another request has done it meanwhile."""
        async with self._loading:
            # Who asks for weights of before the run went back to a checkpoint is not waited for any more.
            if lineage < self._lineage or self._holds(version, lineage):
                return False
            if handle is None:  # nothing was published: the weights it was built with
                if self._asleep:
                    raise InfrastructureFault(
                        "an engine fell asleep before any weights were published: it has none to wake with"
                    )
                self._engine.version = version
                return True
            arrived = await self._receiver.fetch(version, lineage, handle)
            await self._engine.load_weights(arrived.version, arrived.tensors)
            self._lineage, self._asleep = lineage, False
            return True

    async def sleep(self) -> None:
        """Give up the memory of weights and cache until `hold`, those that it was built with included."""
        async with self._loading:
            await self._engine.sleep()
            self._asleep, self._engine.version = True, _NO_WEIGHTS

    def _holds(self, version: int, lineage: int) -> bool:
        return self._lineage == lineage and self._engine.version >= version

    async def reply(self, request: ReplyRequest) -> Reply:
        """See `Policy.reply`."""
        try:
            return await self._engine.reply(request)
        finally:
            if self._engine.dead:
                _log.error("the engine of this process is dead; Ray builds both anew")
                os._exit(1)

    def release(self, conversation: str) -> None:
        """See `Policy.release`."""
        self._engine.release(conversation)

    def stats(self) -> dict[str, float]:
        """`EngineStats`."""
        return dict(vars(self._engine.stats))
