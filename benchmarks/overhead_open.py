"""Part `open` of `benchmarks.overhead`: many conversations whose environment waits, open in one process.

Every answer of the environment takes a uniformly drawn time, `wait` seconds on average. Conversations begin
spread over the length of one; who ends is replaced. Meanwhile a probe asks to be woken every 10 ms: the
lag is how much later than asked it is. Memory is that of conversations that have two turns behind them, by
traced allocations: all of Python's, and not those of libraries in C.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
import tracemalloc
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from stateset_ray.config import RolloutConfig
from stateset_ray.environments.echo import Echo
from stateset_ray.models import load_tokenizer
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.rollout import rollout
from stateset_ray.types import Message, Step, Task

__all__ = ["measure"]

_TURNS = 3
_PROBE = 0.01  # seconds


class _Waiting(Echo):
    """Echo that takes its time, or until it is told to go on."""

    def __init__(self, wait: float = 0.0, gate: asyncio.Event | None = None) -> None:
        super().__init__(turns=_TURNS)
        self._wait, self._gate = wait, gate

    async def step(self, message: Message) -> Step:
        if self._gate is None:
            await asyncio.sleep(random.uniform(0, 2 * self._wait))
        elif self._turn == _TURNS - 1:
            await self._gate.wait()
        return await super().step(message)


def measure(numbers: Sequence[int], wait: float, seconds: float) -> list[dict[str, Any]]:
    """Lag and memory for each number of conversations."""
    renderer = Renderer(load_tokenizer("tiny"))
    gc.collect()
    gc.freeze()  # as a worker does
    try:
        return [
            {
                "conversations": number,
                "mean_wait_seconds": wait,
                **asyncio.run(_lag(renderer, number, wait, seconds)),
                **asyncio.run(_memory(renderer, number)),
            }
            for number in numbers
        ]
    finally:
        gc.unfreeze()


async def _lag(renderer: Renderer, number: int, wait: float, seconds: float) -> dict[str, Any]:
    ended, failed, length = 0, 0, _TURNS * wait
    lags: list[float] = []
    numbers = count()

    async def lane(delay: float) -> None:
        nonlocal ended, failed
        await asyncio.sleep(delay)
        while True:
            index = next(numbers)
            played = await _play(renderer, _Waiting(wait), index)
            ended, failed = ended + 1, failed + (played is None)

    lanes = [asyncio.create_task(lane(length * i / number)) for i in range(number)]
    loop = asyncio.get_running_loop()
    await asyncio.sleep(length)
    before, busy, start = ended, time.process_time(), loop.time()
    while loop.time() < start + seconds:
        asked = loop.time() + _PROBE
        await asyncio.sleep(_PROBE)
        lags.append(loop.time() - asked)
    spent, busy = loop.time() - start, time.process_time() - busy
    rate = (ended - before) / spent
    for task in lanes:
        task.cancel()
    await asyncio.gather(*lanes, return_exceptions=True)
    if failed:
        raise RuntimeError(f"{failed} of {ended} conversations failed")
    p50, p99 = np.percentile(lags, [50, 99])
    return {
        "lag_ms": {
            "p50": round(float(p50) * 1e3, 2), "p99": round(float(p99) * 1e3, 2),
            "max": round(max(lags) * 1e3, 2), "probes": len(lags),
        },
        "conversations_per_second": round(rate, 1),
        "processor_share": round(busy / spent, 3),
    }  # fmt: skip


async def _memory(renderer: Renderer, number: int) -> dict[str, Any]:
    """Bytes of an open conversation before its last answer."""
    tracemalloc.start()
    try:
        held = await _opened(renderer, min(number, 1_000))
    finally:
        tracemalloc.stop()
    return {"bytes_per_conversation": round(held)}


async def _opened(renderer: Renderer, number: int) -> float:
    gate = asyncio.Event()
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    talks = [asyncio.create_task(_play(renderer, _Waiting(gate=gate), i), name="talk") for i in range(number)]
    await asyncio.sleep(0)  # each goes as far as it can
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    gate.set()
    if None in await asyncio.gather(*talks):
        raise RuntimeError("a conversation failed")
    return (after - before) / number


async def _play(renderer: Renderer, environment: Echo, index: int) -> float | None:
    task = Task(f"train-{index}", index)
    policy = ScriptedPolicy(renderer, lambda _: environment.expert())
    room = RolloutConfig(max_turns=_TURNS, max_context=512, max_turn_tokens=48)
    trajectory = await rollout(environment, task, policy, renderer, room, id=f"r/0/{index}/0/0", seed=index)
    return trajectory.reward
