"""From a question to its answer, whatever happens to replicas on the way.

What was not begun is sent again: nobody has seen a token of it. What was begun is not: two replicas need not
go on alike. An answer that is not streamed is begun for the client only when it is complete.

Who waits for whom: a request for a policy replica with room (`policy.queued` of them at most), then for
tokens, each within its deadline. What is given up is cancelled, which frees its slot.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from stateset_ray.serving.events import Ask, Began, Ended, Event, Refused
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.settings import ServeSettings

__all__ = ["Policies", "PolicyBusy", "PolicyLost", "answered", "overloaded"]

_BACK_OFF = 0.05  # seconds before the first repetition; doubled for each further one
_LONGEST_BACK_OFF = 2.0


class PolicyBusy(Exception):
    """No policy replica has room, and too many requests wait already."""


class PolicyLost(Exception):
    """The replica died, or its engine failed, before the answer was complete."""


class Policies(Protocol):
    """The policy replicas, as the ingress sees them."""

    def ask(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """The events of one answer; closing it early cancels the answer.

        Raises:
            PolicyBusy: see there.
            PolicyLost: see there.
        """
        ...

    async def status(self) -> dict[str, Any]:
        """What one replica, any, holds and does."""
        ...

    async def statuses(self) -> list[dict[str, Any]]:
        """What each replica holds and does."""
        ...


def overloaded() -> ApiError:
    """The refusal for want of room."""
    return ApiError(429, "overloaded", "the policy has no room at the moment", retry_after=1.0)


async def answered(
    policies: Policies, ask: Ask, settings: ServeSettings, meters: Meters
) -> AsyncGenerator[tuple[Event, ...]]:
    """The events of one answer; a streamed one in pieces, else all of them at once.

    Raises:
        ApiError: it cannot be answered: 400 for what no replica can, 429 where there is no room, 503 where
            replicas die, 504 where a deadline passed.
    """
    end = time.monotonic() + settings.deadlines.total
    for attempt in range(settings.retries + 1):
        seen: list[Event] = []
        shown = False
        try:
            async with aclosing(_timed(policies, ask, settings, end)) as answer:
                async for events in answer:
                    if ask.stream:
                        shown = True
                        yield events
                    else:
                        seen += events
            if not ask.stream:
                yield tuple(seen)
            return
        except PolicyBusy:
            meters.add("shed", 1, reason="overloaded")
            raise overloaded() from None
        except PolicyLost:
            if shown:
                raise ApiError(
                    503, "replica_lost", "the replica was lost in the middle of its answer"
                ) from None
            if attempt == settings.retries:
                break
            meters.add("retries")
            ask = replace(ask, canary=False)  # it may have been the reason
            wait = min(_LONGEST_BACK_OFF, _BACK_OFF * 2**attempt) * random.uniform(0.5, 1.5)
            await asyncio.sleep(max(0.0, min(wait, end - time.monotonic())))
    raise ApiError(503, "replica_lost", "replicas were lost again and again", retry_after=5.0)


async def _timed(
    policies: Policies, ask: Ask, settings: ServeSettings, end: float
) -> AsyncGenerator[tuple[Event, ...]]:
    """The events within their deadlines.

    Raises:
        PolicyLost: they stop before every choice has ended; a replica that dies may look like that.
    """
    deadlines, began, running = settings.deadlines, False, ask.choices
    async with aclosing(policies.ask(ask)) as answer:
        while True:
            limit = deadlines.first_token
            if began:  # what is not streamed says nothing between its first token and its end
                limit = deadlines.idle if ask.stream else deadlines.total
            try:
                async with asyncio.timeout(max(0.0, min(limit, end - time.monotonic()))):
                    events = await anext(answer, None)
            except TimeoutError:
                what = "goes on too slowly" if began else "did not begin in time"
                raise ApiError(504, "deadline_exceeded", f"the answer {what}, and was given up") from None
            if events is None:
                if running > 0:
                    raise PolicyLost
                return
            began = began or any(isinstance(event, Began) for event in events)
            running -= sum(isinstance(event, Ended) for event in events)
            _raise_refusal(events)
            yield events


def _raise_refusal(events: tuple[Event, ...]) -> None:
    for event in events:
        if isinstance(event, Refused):
            raise event.error()
