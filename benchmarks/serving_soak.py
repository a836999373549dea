"""A soak of an endpoint: memory, descriptors and threads of its processes under load, and how they grow.

As many clients ask an ingress that only passes on (`benchmarks.serving_bare`), before the same policy: what
its processes grow by is Serve's and Ray's.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.serving_bare import BARE, TOKENS, bare
from benchmarks.serving_clients import crowd, summary
from benchmarks.serving_endpoint import PATIENCE, Endpoint

__all__ = ["soak", "theil_sen"]

_CLIENTS = 4  # of each
_EVERY = 2.0  # seconds between two samples
_PERIODS = 12  # after the warm-up, at least; each at most a minute long
_WARM_UP = 1 / 3  # of the time, which is left out: caches and pools fill


def soak(endpoint: Endpoint, seconds: float) -> dict[str, Any]:
    """Four clients ask each of the two for so long, of the endpoint each request in a session of its own.

    Slopes of each process are Theil-Sen's, per minute, with a 95 % confidence interval, of the medians of
    periods of time, after the first third. Samples a few seconds apart say nearly the same, and the interval
    of all of them would be far too narrow; of the medians it may still be.
    """
    samples: dict[tuple[str, int], list[tuple[float, float, int, int]]] = defaultdict(list)

    def watch() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for pid, (kind, process) in endpoint.processes().items():
                try:
                    row = process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()
                except psutil.Error:
                    continue
                samples[kind, pid].append((time.monotonic(), *row))
            time.sleep(_EVERY)

    with bare():
        load, passed_on = asyncio.run(_asked(endpoint, watch))
    return {
        "seconds": seconds,
        "load": load,
        "bare_requests": passed_on,
        "processes": {f"{kind} {pid}": _grown(rows) for (kind, pid), rows in sorted(samples.items())},
    }


async def _asked(endpoint: Endpoint, watch: Callable[[], None]) -> tuple[dict[str, Any], int]:
    """What clients of the endpoint were told, and how often the bare ingress answered, while `watch` runs."""
    over = asyncio.Event()

    async def one(web: aiohttp.ClientSession) -> int:
        done = 0
        while not over.is_set():
            async with web.post(endpoint.url + BARE, json={"stream": True}) as answer:
                answer.raise_for_status()
                await answer.read()
            done += 1
        return done

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as web:
        asking = [asyncio.create_task(one(web)) for _ in range(_CLIENTS)]
        try:
            told = await crowd(endpoint, _CLIENTS, watch, tokens=TOKENS, lasting=False)
        finally:
            over.set()
        return summary(told), sum(await asyncio.gather(*asking))


def _grown(rows: Sequence[tuple[float, float, int, int]]) -> dict[str, Any]:
    lasted = rows[-1][0] - rows[0][0]
    period = min(60.0, lasted * (1 - _WARM_UP) / _PERIODS)
    parts: dict[int, list[tuple[float, float, int, int]]] = defaultdict(list)
    for row in rows:
        parts[int((row[0] - rows[0][0]) / period)].append(row)
    every = [tuple(np.median(part, axis=0)) for part in parts.values()]
    kept = [row for row in every if row[0] >= rows[0][0] + _WARM_UP * lasted]
    minutes = [(row[0] - kept[0][0]) / 60 for row in kept]
    found: dict[str, Any] = {
        "samples": len(rows), "period_seconds": round(period, 1),
        "rss_mib_by_period": [round(float(row[1]), 1) for row in every],
    }  # fmt: skip
    for column, name in ((1, "rss_mib"), (2, "descriptors"), (3, "threads")):
        values = [float(row[column]) for row in kept]
        slope, low, high = theil_sen(minutes, values)
        found[name] = {
            "first": round(values[0], 1), "last": round(values[-1], 1),
            "slope_per_minute": round(slope, 4), "interval": [round(low, 4), round(high, 4)],
            "holds_zero": low <= 0 <= high,
        }  # fmt: skip
    return found


def theil_sen(times: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """The median of all pairwise slopes, and the bounds of its 95 % interval (Sen, 1968).

    Example:
        >>> [round(bound, 6) for bound in theil_sen(range(10), [2.0 * x for x in range(10)])]
        [2.0, 2.0, 2.0]
    """
    x, y = np.asarray(times, float), np.asarray(values, float)
    rows, columns = np.triu_indices(len(x), 1)
    slopes = np.sort((y[columns] - y[rows]) / (x[columns] - x[rows]))
    n = len(x)
    half = 1.96 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18) / 2
    low, high = round(len(slopes) / 2 - half), round(len(slopes) / 2 + half)
    return float(np.median(slopes)), float(slopes[max(0, low)]), float(slopes[min(len(slopes) - 1, high)])
