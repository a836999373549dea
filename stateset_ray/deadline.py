"""A limit on what is awaited, which costs nothing where nothing has to wait.

`asyncio.timeout` sets a timer and takes it back for every call, though most environments, scripts and
limits of a conversation end without ever waiting. Here the timer is set when the work first waits.
"""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Awaitable, Generator
from typing import Any, TypeVar

__all__ = ["DeadlinePassed", "within"]

_T = TypeVar("_T")


class DeadlinePassed(TimeoutError):
    """The limit of `within` itself, and no TimeoutError that the work raised."""


async def within(seconds: float, work: Awaitable[_T]) -> _T:
    """Await `work`, in the caller's own task, for at most so many seconds.

    Raises:
        DeadlinePassed: it took longer, and was cancelled. Work that computes without waiting cannot be
            interrupted, and counts as in time.

    Example:
        >>> async def answer():
        ...     return 42
        >>> asyncio.run(within(1.0, answer()))
        42
    """
    started = time.monotonic()
    steps = work.__await__()
    try:
        waits_for = steps.send(None)
    except StopIteration as done:
        value: _T = done.value
        return value
    clock = asyncio.timeout(started + seconds - time.monotonic())
    try:
        # Nothing is awaited between the first step and the rest, so what it waits for is not lost.
        async with clock:
            return await _rest(steps, waits_for)
    except TimeoutError:
        if clock.expired():
            raise DeadlinePassed(f"it took longer than {seconds} s") from None
        raise


@types.coroutine
def _rest(steps: Generator[Any, Any, _T], waits_for: Any) -> Generator[Any, Any, _T]:
    """The rest of a coroutine whose first step has been taken."""
    try:
        while True:
            try:
                sent = yield waits_for
            except BaseException as error:  # a cancellation, say, which is the work's to handle
                waits_for = steps.throw(error)
            else:
                waits_for = steps.send(sent)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
