"""How much one key may ask for: requests in a time (moving window), and requests at a time.

Who waits for whom: nobody. What is too much is refused at once, with the seconds after which it is not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import limits
from limits.aio.strategies import MovingWindowRateLimiter
from limits.storage import storage_from_string

from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.security import with_password
from stateset_ray.serving.settings import RateSettings

__all__ = ["Rates"]

_LONGEST_WAIT = 120.0  # seconds; OpenAI's client does not come back at all after a longer one


class Rates:
    """The counters of one ingress replica.

    Args:
        settings: the limits, and where requests are counted.
    """

    def __init__(self, settings: RateSettings) -> None:
        self._allowed = limits.parse(settings.requests)
        storage = storage_from_string(f"async+{with_password(settings.storage)}")
        self._limiter = MovingWindowRateLimiter(storage)
        self._concurrent = settings.concurrent
        self._running: Counter[str] = Counter()

    async def count(self, caller: str) -> None:
        """Count one request.

        Raises:
            ApiError: 429; the request is not counted.
        """
        if await self._limiter.hit(self._allowed, caller):
            return
        window = await self._limiter.get_window_stats(self._allowed, caller)
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
