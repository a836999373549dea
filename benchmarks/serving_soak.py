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
_Row = tuple[float, float, float, int, int]  # seconds, own and resident MiB, descriptors, threads


def soak(endpoint: Endpoint, seconds: float, warm_up: float | None = None) -> dict[str, Any]:
    """Four clients ask each of the two for so long, of the endpoint each request in a session of its own.

    Slopes of each process are Theil-Sen's, per minute, with a 95 % confidence interval, of the medians of
    periods of time, after a warm-up: samples a few seconds apart say nearly the same, and the interval of all
    of them would be far too narrow. `own_mib` is resident memory but for pages of files and of Ray's object
    store: code that runs for the first time is mapped then, and is not what a process holds.

    Args:
        warm_up: seconds that are left out, in which caches and pools fill; by default a third of all.
    """
    warm_up = seconds / 3 if warm_up is None else warm_up
    samples: dict[tuple[str, int], list[_Row]] = defaultdict(list)

    def watch() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for pid, (kind, process) in endpoint.processes().items():
                try:
                    memory = process.memory_info()
                    own, resident = (memory.rss - memory.shared) / 2**20, memory.rss / 2**20
                    row = own, resident, process.num_fds(), process.num_threads()
                except psutil.Error:
                    continue
                samples[kind, pid].append((time.monotonic(), *row))
            time.sleep(_EVERY)

    with bare():
        load, passed_on = asyncio.run(_asked(endpoint, watch))
    return {
        "seconds": seconds,
        "warm_up_seconds": warm_up,
        "load": load,
        "bare_requests": passed_on,
        "processes": {
            f"{kind} {pid}": _grown(rows, warm_up) for (kind, pid), rows in sorted(samples.items())
        },
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


def _grown(rows: Sequence[_Row], warm_up: float) -> dict[str, Any]:
    lasted = rows[-1][0] - rows[0][0]
    if lasted < 1.1 * warm_up or len(rows) < 2 * _PERIODS:  # one that was replaced, or has just come
        return {"samples": len(rows), "seconds": round(lasted, 1)}
    period = min(60.0, (lasted - warm_up) / _PERIODS)
    parts: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:  # below 0: in the warm-up
        parts[math.floor((row[0] - rows[0][0] - warm_up) / period)].append(row)
    parts.pop(round((lasted - warm_up) / period), None)  # less than half of one
    every = [tuple(np.median(part, axis=0)) for part in parts.values()]
    kept = [row for index, row in zip(parts, every, strict=True) if index >= 0]
    minutes = [(row[0] - kept[0][0]) / 60 for row in kept]
    found: dict[str, Any] = {
        "samples": len(rows), "period_seconds": round(period, 1),
        "own_mib_by_period": [round(float(row[1]), 2) for row in every],
    }  # fmt: skip
    for column, name in enumerate(("own_mib", "rss_mib", "descriptors", "threads"), 1):
        values = [float(row[column]) for row in kept]
        slope, low, high = theil_sen(minutes, values)
        found[name] = {
            "first": round(values[0], 2), "last": round(values[-1], 2),
            "slope_per_minute": round(slope, 4), "interval": [round(low, 4), round(high, 4)],
            "holds_zero": low <= 0 <= high,
        }  # fmt: skip
    return found


def theil_sen(times: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """The median of all pairwise slopes, and the bounds of its 95 % interval (Sen, 1968).

    Memory wanders: a minute begins where the last one ended. So the interval is widened as for a process of
    first order whose correlation is that of what the slope leaves over. Of drawn series that do not
    grow it holds 0 in 95 to 97 % if they do not wander either; where one value makes up 0.8 of the next, in
    90 % of those with 12 values and 93 % of those with 40.

    Args:
        times: evenly spaced.
        values: as many.

    Example:
        >>> [round(bound, 6) for bound in theil_sen(range(10), [2.0 * x for x in range(10)])]
        [2.0, 2.0, 2.0]
    """
    x, y = np.asarray(times, float), np.asarray(values, float)
    rows, columns = np.triu_indices(len(x), 1)
    slopes = np.sort((y[columns] - y[rows]) / (x[columns] - x[rows]))
    n, slope = len(x), float(np.median(slopes))
    correlation = _correlation(y - slope * x)
    variance = n * (n - 1) * (2 * n + 5) / 18 * (1 + correlation) / (1 - correlation)
    half = 1.96 * math.sqrt(variance) / 2
    low, high = round(len(slopes) / 2 - half) - 1, round(len(slopes) / 2 + half)
    return slope, float(slopes[max(0, low)]), float(slopes[min(len(slopes) - 1, high)])


def _correlation(rest: np.ndarray) -> float:
    """Of each value with the next, 0 to 0.95, without the bias that a fitted slope brings.

    What is computed here falls short by about (2 + 5 c) / n, of n values whose correlation is c: by
    (2 + 4 c) / n as least squares do around a line (Shaman and Stine, 1988, JASA 83), and by c / n since the
    sum below has one term more than the one above.
    """
    rest = np.round(rest - rest.mean(), 9)
    if not rest.any():
        return 0.0
    found, n = float(rest[1:] @ rest[:-1] / (rest @ rest)), len(rest)
    return min(0.95, max(0.0, (n * found + 2) / (n - 5))) if n > 5 else 0.95
