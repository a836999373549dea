"""Which engine answers a turn: the one that has answered the conversation, else the least loaded.

Who waits for whom: `reply` waits for an engine; with none alive, for the first that comes back, within the
caller's `rollout.turn_timeout`. A request carries every token of its conversation and the seed of its reply,
so that another engine takes over where one has died, without a finished turn being sampled again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from stateset_ray.actors.remote import cause_of
from stateset_ray.policies.base import Reply, ReplyRequest

__all__ = ["Router"]

_log = logging.getLogger(__name__)
_RETRY = 0.5  # seconds between looks at an engine that does not come back


class Router:
    """Spreads the conversations of one rollout worker over all engines; implements `Inference`.

    Args:
        engines: handles of `InferenceEngine` actors.
    """

    def __init__(self, engines: Sequence[Any]) -> None:
        self._engines = list(engines)
        self._load = [0] * len(engines)
        """Tokens of the requests that are with each engine."""
        self._alive = [True] * len(engines)
        self._back = asyncio.Condition()
        self._watches: set[asyncio.Task[None]] = set()
        self._home: dict[str, int] = {}
        self._version = 0
        self._weights: Mapping[str, Any] = {"handle": None, "lineage": 0}
        self._requests = self._moved = 0

    async def hold(self, version: int, weights: Mapping[str, Any]) -> None:
        """See `Inference.hold`; every later request names this version."""
        if weights["lineage"] != self._weights["lineage"] or version >= self._version:
            self._version, self._weights = version, weights

    async def reply(self, request: ReplyRequest) -> Reply:
        """See `Policy.reply`.

        Raises:
            StatesetError: the engine cannot answer. That an engine died is no reason to raise.
        """
        self._requests += 1
        cost = len(request.prompt_ids) + request.max_tokens
        request = replace(request, messages=())  # engines look at ids only: words need not travel
        while True:
            index = await self._choose(request.conversation)
            self._load[index] += cost
            call = self._engines[index].reply.remote(self._version, self._weights, request)
            try:
                reply: Reply = await call
            except RayTaskError as error:
                raise cause_of(error) from None
            except RayActorError:
                self._lost(index)
                continue
            except asyncio.CancelledError:
                ray.cancel(call)  # nobody waits for it any more: the engine drops the turn
                raise
            finally:
                self._load[index] -= cost
            return reply

    def release(self, conversation: str) -> None:
        """See `Policy.release`."""
        index = self._home.pop(conversation, None)
        if index is not None and self._alive[index]:
            self._engines[index].release.remote(conversation)

    def stats(self) -> dict[str, float]:
        """`requests`, and how many of the conversations were `moved` to another engine."""
        return {"requests": self._requests, "moved": self._moved}

    async def _choose(self, conversation: str) -> int:
        async with self._back:
            await self._back.wait_for(lambda: any(self._alive))
        home = self._home.get(conversation)
        if home is not None and self._alive[home]:
            return home
        living = [index for index, alive in enumerate(self._alive) if alive]
        index = min(living, key=lambda i: (self._load[i], i))
        self._moved += home is not None
        self._home[conversation] = index
        return index

    def _lost(self, index: int) -> None:
        if not self._alive[index]:
            return  # another conversation has noticed
        self._alive[index] = False
        watch = asyncio.create_task(self._await_return(index), name=f"engine {index} comes back")
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _await_return(self, index: int) -> None:
        """Ray restarts a dead engine; its first answer says that it is back."""
        while True:
            try:
                await self._engines[index].ready.remote()
            except RayError as error:  # it died again, or could not be built: its memory may not be free yet
                _log.warning("inference engine %d is not back yet: %s", index, error)
                await asyncio.sleep(_RETRY)
                continue
            async with self._back:
                self._alive[index] = True
                self._back.notify_all()
            return
