"""How much one key may ask for: requests in a time (moving window), and requests at a time.

Who waits for whom: a request for Redis, where requests are counted there, half a second at most. What is too
much is refused at once, with the seconds after which it is not.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import limits
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from stateset_ray.errors import ConfigError
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

    Raises:
        ConfigError: they cannot be counted there.
    """

    def __init__(self, settings: RateSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed = limits.parse(settings.requests)
        self._own = _Window(self._allowed.amount, self._allowed.get_expiry(), clock)
        self._shared: MovingWindowRateLimiter | None = None
        if not settings.storage.startswith("memory:"):
            options: dict[str, Any] = {
                "implementation": "redispy",  # the client that the conversations have as well
                "wrap_exceptions": True,
                "socket_timeout": _REDIS_SECONDS,
                "socket_connect_timeout": _REDIS_SECONDS,
            }
            try:
                storage = storage_from_string(f"async+{with_password(settings.storage)}", **options)
            except ConfigurationError as error:
                raise ConfigError(
                    "rates.storage cannot be used, or needs a package that is not installed",
                    given=settings.storage.partition(":")[0],  # more of it may be a password
                    mend="give redis://HOST:6379, and pip install 'stateset-ray[redis]'",
                ) from error
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
                await self._count_shared(self._shared, caller)
                return
            except StorageError as error:
                self._not_before = self._clock() + _REDIS_AGAIN
                kind = type(error.storage_error).__name__
                _log.error(
                    "rates are counted in each ingress: Redis does not answer (%s); see rates.storage", kind
                )
        wait = self._own.hit(caller)
        if wait is not None:
            raise _too_often(wait)

    async def _count_shared(self, limiter: MovingWindowRateLimiter, caller: str) -> None:
        if not await limiter.hit(self._allowed, caller):
            window = await limiter.get_window_stats(self._allowed, caller)
            raise _too_often(window.reset_time - time.time())

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


class _Window:
    """Counts in this process what was asked for in the last seconds, by caller.

    The library's own memory copies a caller's whole window and wakes another thread for every request.

    Args:
        most: requests that one caller may begin within `seconds`.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._begun: dict[str, deque[float]] = {}
        self._swept = clock()

    def hit(self, caller: str) -> float | None:
        """Count one request; or else after how many seconds there is room for it."""
        now = self._clock()
        self._sweep(now)
        begun = self._begun.setdefault(caller, deque())
        while begun and begun[0] <= now - self._seconds:
            begun.popleft()
        if len(begun) >= self._most:
            return begun[0] + self._seconds - now if begun else self._seconds
        begun.append(now)
        return None

    def _sweep(self, now: float) -> None:
        """Forget callers who have stayed away; once in a window, since it looks at each of them."""
        if now - self._swept >= self._seconds:
            self._swept = now
            self._begun = {
                caller: begun
                for caller, begun in self._begun.items()
                if begun and begun[-1] > now - self._seconds
            }


def _too_often(wait: float) -> ApiError:
    wait = min(_LONGEST_WAIT, max(1.0, wait))
    return ApiError(429, "rate_limited", "this key asks too often", retry_after=wait)
