"""Whether a policy replica answers: what is asked of it tells, and so does what it answers others.

Who waits for whom: who wants to know waits for a replica, for a few seconds; many wait for one look.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stateset_ray.serving.dispatch import Policies
from stateset_ray.serving.events import Ask, Began, Event

__all__ = ["Pulse"]

_log = logging.getLogger("ray.serve")
_PULSE_SECONDS = 1.0  # for which an answer to whether anybody is ready holds
_BUSY_SECONDS = 20.0  # for which replicas that do not answer are taken to be busy
_READY_SECONDS = 5.0


class Pulse:
    """Policies of which is known whether one answers; implements `Policies`.

    It is asked once for all who want to know, since they need no key.
    """

    def __init__(self, policies: Policies) -> None:
        self._policies = policies
        self._version: str | None = None
        self._asked = self._answered = -math.inf
        self._asking = asyncio.Lock()

    async def version(self) -> str | None:
        """What a replica answers with; None if none has answered anything for a while.

        The question waits behind those of clients. Replicas that are busy with these are ready.
        """
        async with self._asking:
            if time.monotonic() - self._asked > _PULSE_SECONDS:
                try:
                    async with asyncio.timeout(_READY_SECONDS):
                        self._version = str((await self._policies.status())["version"])
                    self._answered = time.monotonic()
                except Exception as error:  # whatever it is, the answer is the same
                    _log.debug("no policy replica said what it holds: %s", error)
                self._asked = time.monotonic()
        return self._version if time.monotonic() - self._answered < _BUSY_SECONDS else None

    async def ask(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """See `Policies.ask`."""
        async with aclosing(self._policies.ask(ask)) as answer:
            async for events in answer:
                self._answered = time.monotonic()
                if self._version is None:
                    self._version = next((e.version for e in events if isinstance(e, Began)), None)
                yield events

    async def status(self) -> dict[str, Any]:
        """See `Policies.status`."""
        return await self._policies.status()

    async def statuses(self) -> list[dict[str, Any]]:
        """See `Policies.statuses`."""
        return await self._policies.statuses()
