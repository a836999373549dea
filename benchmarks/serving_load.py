"""Load on an endpoint, without faults: how quick, how much, what is refused, what is left behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing
from typing import Any

from benchmarks.serving_clients import Client, Told, crowd, percentiles, summary
from benchmarks.serving_endpoint import Endpoint

__all__ = ["affinity", "disconnects", "latency", "overhead", "overload"]

_SECONDS = 15.0  # of each measurement
_CONVERSATIONS = 8
_TURNS = 6


def latency(endpoint: Endpoint) -> dict[str, Any]:
    """By clients at a time: first token, between tokens, total; tokens a second."""
    return {
        str(clients): summary(asyncio.run(crowd(endpoint, clients, lambda: time.sleep(_SECONDS), tokens=40)))
        for clients in (1, 4, 16)
    }


def overhead(endpoint: Endpoint) -> dict[str, Any]:
    """The same greedy reply of 20 tokens from the engine directly and through the endpoint, one at a time."""
    from stateset_ray.config import ModelConfig
    from stateset_ray.models import choose_hardware
    from stateset_ray.serving.events import Ask
    from stateset_ray.serving.held_policy import load_policy
    from stateset_ray.serving.source import Source
    from stateset_ray.types import Message

    hardware = choose_hardware(ModelConfig(threads=1, device="cpu"), gpus=0)
    hardware.apply()
    source = Source(str(endpoint.run))
    context = source.config().rollout.max_context

    async def direct() -> list[float]:
        held = load_policy(source.first(), endpoint.settings, hardware, context, None)
        seconds = []
        for number in range(60):
            begun = time.monotonic()
            ask = Ask(str(number), "t", "", (Message("user", "hi"),), 20, 0.0, 1)
            async with aclosing(held.answer(ask)) as answer:
                async for _ in answer:
                    pass
            seconds.append(time.monotonic() - begun)
        await held.engine.close()
        return seconds

    async def through(stream: bool) -> list[float]:
        async with Client.of(endpoint) as client:
            asked = [await client.ask(tokens=20, temperature=0, stream=stream) for _ in range(60)]
        return [told.ended - told.begun for told, _ in asked]

    found = {
        "engine_ms": asyncio.run(direct()),
        "endpoint_ms": asyncio.run(through(stream=False)),
        "endpoint_streamed_ms": asyncio.run(through(stream=True)),
    }
    return {name: percentiles(seconds[10:]) for name, seconds in found.items()}  # the first ones warm up


def affinity(endpoint: Endpoint) -> dict[str, Any]:
    """Conversations that grow for some turns: time to the first token of each turn but the first."""
    words = endpoint.context // 64  # that are said in each turn

    async def talk(client: Client, number: int, session: str) -> list[float]:
        said = [{"role": "user", "content": _words(number, 0, words)}]
        firsts = []
        for turn in range(1, _TURNS + 1):
            told, text = await client.ask(said, tokens=8, session=session, seed=100 * number + turn)
            assert told.told == "answered", told.told
            if turn > 1 and told.first is not None:
                firsts.append(told.first - told.begun)
            said += [
                # A model of random weights may say nothing, or what no client may send back.
                {"role": "assistant", "content": text.replace("\0", " ").strip() or "."},
                {"role": "user", "content": _words(number, turn, words)},
            ]
        return firsts

    async def all_of(named: bool, offset: int, count: int = _CONVERSATIONS) -> list[float]:
        firsts = []
        async with Client.of(endpoint) as client:
            for place in range(0, count, 2):  # two at a time
                pair = [offset + place, offset + place + 1]
                found = await asyncio.gather(*(talk(client, n, f"c{n}" if named else "") for n in pair))
                firsts += [first for each in found for first in each]
        return firsts

    asyncio.run(all_of(True, 10_000, 2))  # warms up
    return {
        "conversations": _CONVERSATIONS,
        "turns": _TURNS,
        "words_each": words,
        "named_first_token_ms": percentiles(asyncio.run(all_of(True, 0))),
        "unnamed_first_token_ms": percentiles(asyncio.run(all_of(False, 1000))),
    }


def _words(number: int, turn: int, count: int) -> str:
    rng = random.Random(1000 * number + turn)
    return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(count))


def overload(endpoint: Endpoint) -> dict[str, Any]:
    """Requests arrive at ten times the rate that is answered at most; then at a calm one again."""
    peak, seconds = 0.0, 1.5 * endpoint.seconds
    _warm(endpoint)
    for clients in (2, 4, 8, 16):
        found = asyncio.run(
            crowd(endpoint, clients, lambda: time.sleep(endpoint.seconds), tokens=60, stream=False)
        )
        good = [t for t in found if t.told == "answered"]
        peak = max(peak, len(good) / (max(t.ended for t in found) - min(t.begun for t in found)))
    used = endpoint.cpu_seconds()
    storm = asyncio.run(_arrivals(endpoint, 10 * peak, seconds))
    used = {kind: round(seconds - used[kind], 1) for kind, seconds in endpoint.cpu_seconds().items()}
    good = [t for t in storm if t.told == "answered"]
    goodput = len([t for t in good if t.ended <= min(t.begun for t in storm) + seconds]) / seconds
    after = asyncio.run(_arrivals(endpoint, peak / 4, 5.0))
    return {
        "peak_answers_per_second": round(peak, 2),
        "arrivals_per_second": round(len(storm) / seconds, 1),
        "goodput_per_second": round(goodput, 2),
        "goodput_of_peak": round(goodput / peak, 3),
        "told": dict(Counter(t.told for t in storm)),
        "refused_without_retry_after": sum(t.told.startswith("429") and t.retry_after is None for t in storm),
        "storm_seconds": round(max(t.ended for t in storm) - min(t.begun for t in storm), 1),
        "cpu_seconds": used,
        "admitted_ms": percentiles([t.ended - t.begun for t in good]),
        "refused_ms": percentiles([t.ended - t.begun for t in storm if t.told.startswith("429")]),
        "afterwards": summary(after),
    }


def _warm(endpoint: Endpoint) -> None:
    """The first answers of a replica are slow, and would make the peak too low."""
    asyncio.run(crowd(endpoint, 8, lambda: time.sleep(3), tokens=60, stream=False))


async def _arrivals(endpoint: Endpoint, rate: float, seconds: float) -> list[Told]:
    async with Client.of(endpoint) as client:
        begun, asked = time.monotonic(), []
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            asked.append(asyncio.create_task(client.ask(tokens=60, stream=False)))
        return [told for told, _ in await asyncio.gather(*asked)]


def disconnects(endpoint: Endpoint, count: int = 1000) -> dict[str, Any]:
    """Streams whose client leaves at the first token, twenty at a time; then what is left of them."""

    def state() -> dict[str, Any]:
        processes = endpoint.processes().values()
        found = endpoint.replicas()
        return {
            "running": sum(r["running"] for r in found),
            "tokens_before_them": sum(r["tokens"] for r in found),
            "sampled": sum(r["sampled"] for r in found),
            "descriptors": sum(p.num_fds() for p in processes),
            "threads": sum(p.num_threads() for p in processes),
            "rss_mib": round(sum(p.memory_info().rss for p in processes) / 2**20, 1),
        }

    async def leave(number: int) -> list[Told]:
        async with Client.of(endpoint) as client:
            asked = (client.ask(tokens=400, session=f"d{i}", leave=True) for i in range(20))
            return [told for told, _ in await asyncio.gather(*asked)]

    asyncio.run(leave(0))
    _quiet(endpoint)
    before = state()
    told: list[Told] = []
    quiet = []
    for number in range(count // 20):
        told += asyncio.run(leave(number))
        quiet.append(_quiet(endpoint))
    after = state()
    return {
        "left": len(told),
        "told": dict(Counter(t.told for t in told)),
        "tokens_asked_for": 400 * len(told),
        "tokens_sampled": after["sampled"] - before["sampled"],
        "until_nothing_runs_ms": percentiles(quiet),
        "before": before,
        "after": after,
    }


def _quiet(endpoint: Endpoint) -> float:
    """Seconds until nothing runs."""
    begun = time.monotonic()
    endpoint.reaches(lambda found: all(r["running"] == 0 and r["tokens"] == 0 for r in found))
    return time.monotonic() - begun
