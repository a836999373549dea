"""How much one key may ask for: requests in a time (moving window), and requests at a time.

Who waits for whom: a request for Redis, where requests are counted there, half a second at most. What is too
much is refused at once, with the seconds after which it is not.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import limits
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.security import with_password
from stateset_ray.serving.settings import RateSettings

__all__ = ["Rates"]

_LONGEST_WAIT = 120.0  # seconds; OpenAI's client does not come back at all after a longer one
_REDIS_SECONDS = 0.5  # for an answer of Redis
_REDIS_AGAIN = 5.0  # seconds after which one that did not answer is asked again
_log = logging.getLogger("ray.serve")


class Rates:
    """The counters of one ingress replica.

    Where requests are counted in Redis and it cannot be reached, they are counted here meanwhile, as they are
    with `memory://`: who may ask should not depend on one more server.

    Args:
        settings: the limits, and where requests are counted.
        clock: seconds, for tests.
    """

    def __init__(self, settings: RateSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed = limits.parse(settings.requests)
        self._own = MovingWindowRateLimiter(storage_from_string("async+memory://"))
        self._shared: MovingWindowRateLimiter | None = None
        if not settings.storage.startswith("memory:"):
            options: dict[str, Any] = {
                "implementation": "redispy",  # the client that the conversations have as well
                "wrap_exceptions": True,
                "socket_timeout": _REDIS_SECONDS,
                "socket_connect_timeout": _REDIS_SECONDS,
            }
            storage = storage_from_string(f"async+{with_password(settings.storage)}", **options)
            self._shared = MovingWindowRateLimiter(storage)
        self._clock = clock
        self._not_before = float("-inf")
        self._concurrent = settings.concurrent
        self._running: Counter[str] = Counter()

    async def count(self, caller: str) -> None:
        """Count one request.

        Raises:
            ApiError: 429; the request is not counted.
        """
        if self._shared is not None and self._clock() >= self._not_before:
            try:
                await self._counted(self._shared, caller)
                return
            except StorageError as error:
                self._not_before = self._clock() + _REDIS_AGAIN
                kind = type(error.storage_error).__name__
                _log.error(
                    "rates are counted in each ingress: Redis does not answer (%s); see rates.storage", kind
                )
        await self._counted(self._own, caller)

    async def _counted(self, limiter: MovingWindowRateLimiter, caller: str) -> None:
        if await limiter.hit(self._allowed, caller):
            return
        window = await limiter.get_window_stats(self._allowed, caller)
        wait = min(_LONGEST_WAIT, max(1.0, window.reset_time - time.time()))
        raise ApiError(429, "rate_limited", "this key asks too often", retry_after=wait)

    @contextmanager
    def running(self, caller: str) -> Iterator[None]:
        """Hold one of the caller's places while a request is answered.

        Raises:
            ApiError: 429; all places are taken.
        """
        if self._running[caller] >= self._concurrent:
            raise ApiError(
                429, "too_many_requests", "this key has too many requests under way", retry_after=1.0
            )
        self._running[caller] += 1
        try:
            yield
        finally:
            self._running[caller] -= 1
            if not self._running[caller]:
                del self._running[caller]
