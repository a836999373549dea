"""One inference engine: a Ray actor that answers the conversations of many rollout workers.

It never speaks with weights that it does not have: every request names the version that must answer and
carries its handle, so that a restarted engine heals itself before it answers anything.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from stateset_ray.actors.held_engine import HeldEngine, renderer_of
from stateset_ray.actors.publishing.folder import sees
from stateset_ray.config import Config
from stateset_ray.policies.base import Reply, ReplyRequest

__all__ = ["InferenceEngine"]


class InferenceEngine:
    """Answers requests of any conversation; wrapped as a Ray actor by `inference_engines`.

    Args:
        config: of the run.
        index: of this engine.
    """

    def __init__(self, config: Config, index: int) -> None:
        self._config = config
        self._index = index
        self._setting_up = asyncio.Lock()
        self._held: HeldEngine | None = None

    def __repr__(self) -> str:  # names the actor in Ray's logs and dashboard
        return f"{self._config.run.name}/engine-{self._index}"

    async def ready(self) -> dict[str, Any]:
        """Load everything on the first call (a constructor could not report its errors); facts about it.

        Raises:
            StatesetError: the model, its template or the hardware is not as configured.
        """
        await self._engine()
        return {"pid": os.getpid()}

    async def hold(self, version: int, weights: Mapping[str, Any]) -> None:
        """Fetch a version now, before somebody asks for a reply with it; see `Inference.hold`."""
        # Other conversations may be between two turns: what they have cached stays.
        await (await self._engine()).hold(version, weights, forget=False)

    async def reply(self, version: int, weights: Mapping[str, Any], request: ReplyRequest) -> Reply:
        """Sample one reply with this version of the weights, or a newer one; see `Policy.reply`."""
        await self.hold(version, weights)
        return await (await self._engine()).reply(request)

    async def sleep(self) -> None:
        """Give up the memory of weights and cache until somebody asks for a version of them."""
        await (await self._engine()).sleep()

    def sees(self, root: str, token: str) -> tuple[bool, str]:
        """See `publishing.folder.sees`."""
        return sees(root, token)

    async def release(self, conversation: str) -> None:
        """See `Policy.release`."""
        (await self._engine()).release(conversation)

    async def _engine(self) -> HeldEngine:
        async with self._setting_up:
            if self._held is None:
                peers = self._config.rollout.engines
                self._held = HeldEngine(self._config, peers, renderer_of(self._config))
        return self._held
