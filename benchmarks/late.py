"""An environment that answers late: `echo` behind a partner or a tool of long-tailed latency."""

from __future__ import annotations

import asyncio
import math
import random

from stateset_ray.environments.echo import Echo
from stateset_ray.types import Message, Step, Task

__all__ = ["Late"]

_P99 = 2.326347874  # standard deviations


class Late(Echo):
    """Waits before each of its answers, without computing.

    Args:
        median: seconds of half of all answers.
        tail: how many times as long the slowest hundredth takes at least. Latencies are log-normal, and
            drawn anew for every answer.
    """

    def __init__(self, median: float = 0.05, tail: float = 20.0) -> None:
        super().__init__()
        self._median, self._sigma = median, math.log(tail) / _P99

    async def reset(self, task: Task, seed: int) -> Step:
        self._clock = random.Random()
        return await super().reset(task, seed)

    async def step(self, message: Message) -> Step:
        await asyncio.sleep(self._median * math.exp(self._clock.gauss(0, self._sigma)))
        return await super().step(message)
