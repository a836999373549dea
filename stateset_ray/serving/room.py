"""Whether asking the policy can be of use, and the refusal if not: at the door, for next to nothing.

Serve's router refuses late: the body was read and checked, and the question sent on its way. In a storm that
takes as much as answering does. So an ingress replica notes how many of its questions were under way when one
was refused, and while there are as many, refuses the next before it is looked at.

Who waits for whom: nobody.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

from stateset_ray.serving.dispatch import Policies, PolicyBusy, overloaded
from stateset_ray.serving.events import Ask, Event

__all__ = ["Refusals", "RoomyPolicies"]

_TRY_AFTER = 0.5  # seconds after which some are let through: there may be room again, or more replicas
_FORGOTTEN = 5.0  # seconds after which a refusal tells nothing any more
_TELL_EVERY = 1.0  # seconds
_log = logging.getLogger("ray.serve")


class RoomyPolicies:
    """Policies that know when they have no room; implements `Policies`.

    Args:
        policies: what answers.
        clock: seconds, for tests.
    """

    def __init__(self, policies: Policies, clock: Callable[[], float] = time.monotonic) -> None:
        self._policies = policies
        self._clock = clock
        self._under_way = 0
        self._fit = math.inf  # questions that may be under way, as far as is known
        self._tries = 1  # let through at the next try; twice as many each time, until one is refused
        self._next_try = self._forget = math.inf

    def full(self) -> bool:
        """Whether one more question would be refused, as far as the last refusals tell."""
        now = self._clock()
        if now >= self._forget:
            self._fit, self._forget = math.inf, math.inf
        if self._under_way < self._fit:
            return False
        if now < self._next_try:
            return True
        # Counted and not timed: where the event loop is late, half a second may be one turn of it.
        self._fit, self._next_try = self._under_way + self._tries, now + _TRY_AFTER
        self._tries *= 2
        return False

    async def ask(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """See `Policies.ask`."""
        self._under_way += 1
        busy = False
        try:
            async with aclosing(self._policies.ask(ask)) as answer:
                async for events in answer:
                    yield events
        except PolicyBusy:
            busy = True
            raise
        finally:
            self._under_way -= 1
            if busy:  # of many that are refused together the last one has the number that fits
                self._fit, self._tries, now = self._under_way, 1, self._clock()
                self._next_try, self._forget = now + _TRY_AFTER, now + _FORGOTTEN

    async def status(self) -> dict[str, Any]:
        """See `Policies.status`."""
        return await self._policies.status()

    async def statuses(self) -> list[dict[str, Any]]:
        """See `Policies.statuses`."""
        return await self._policies.statuses()


class Refusals:
    """Refuses for want of room, in bytes that were made once; says so once a second, and not each time."""

    def __init__(self) -> None:
        error = overloaded()
        self._body = json.dumps(error.body(), separators=(",", ":")).encode()
        headers = error.headers() | {
            "content-type": "application/json",
            "content-length": str(len(self._body)),
        }
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._untold, self._told = 0, float("-inf")

    async def send(self, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
        """The whole response."""
        await send({"type": "http.response.start", "status": 429, "headers": [*self._headers]})
        await send({"type": "http.response.body", "body": self._body})
        self._untold += 1
        if time.monotonic() - self._told >= _TELL_EVERY:
            _log.warning("refused for want of room: %d requests since the last such line", self._untold)
            self._untold, self._told = 0, time.monotonic()
