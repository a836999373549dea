"""What an endpoint adds to its engine, layer by layer: the same question, asked of each of them.

| layer      | what answers                                                                             |
|------------|------------------------------------------------------------------------------------------|
| `engine`   | the engine, in this process                                                              |
| `handle`   | the policy deployment, through a handle of Serve's                                       |
| `bare`     | Serve's proxy and an ingress that knows nothing but this question, before the policy     |
| `endpoint` | Serve's proxy and the endpoint's ingress, before the policy                              |

`bare` is what any ingress costs, whatever it does: what `endpoint` takes beyond it is the ingress's own
(`ingress_ms`). All but the engine are asked in turns, so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import aiohttp
from ray import serve

from benchmarks.serving_bare import BARE, TOKENS, asked, bare, question
from benchmarks.serving_clients import HI, percentiles
from benchmarks.serving_endpoint import PATIENCE, Endpoint

__all__ = ["overhead"]

_LAYERS = ("handle", "bare", "endpoint")
_TIMES = 100  # that each layer is asked, one question at a time
_LONGEST = 10  # times as long as the other measurements, and it is cut; for models that take seconds
_WARM_UP = 5
_ROUNDS = 3  # of each layer under load
_CLIENTS = 8

_Once = Callable[[], Awaitable[Any]]


def overhead(endpoint: Endpoint) -> dict[str, Any]:
    """A greedy reply of 20 tokens by each layer: milliseconds one at a time, and answers a second of many."""
    with bare():
        return asyncio.run(_measured(endpoint))


async def _measured(endpoint: Endpoint) -> dict[str, Any]:
    return {**await _one_at_a_time(endpoint), **await _many(endpoint)}


async def _one_at_a_time(endpoint: Endpoint) -> dict[str, Any]:
    found = {"engine": await _of_engine(endpoint)}
    async with _web() as web:
        layers = {
            layer + "_streamed" * stream: _once(web, endpoint, layer, stream)
            for layer in _LAYERS
            for stream in (False, True)
        }
        found |= {name: [] for name in layers}
        end = time.monotonic() + _LONGEST * endpoint.seconds
        for number in range(_WARM_UP + _TIMES):
            if number >= 2 * _WARM_UP and time.monotonic() > end:
                break
            for name, once in layers.items():
                begun = time.monotonic()
                await once()
                found[name].append(time.monotonic() - begun)
    told = {f"{name}_ms": percentiles(seconds[_WARM_UP:]) for name, seconds in found.items()}
    medians = {name: cuts[0] for name, cuts in told.items() if cuts}

    def beyond(layer: str, other: str) -> float:
        return round(medians[f"{layer}_ms"] - medians[f"{other}_ms"], 1)

    return told | {
        "ingress_ms": beyond("endpoint", "bare"),
        "ingress_streamed_ms": beyond("endpoint_streamed", "bare_streamed"),
        "serve_ms": beyond("bare", "handle"),
        "serve_streamed_ms": beyond("bare_streamed", "handle_streamed"),
    }


async def _many(endpoint: Endpoint) -> dict[str, Any]:
    """Clients that ask without a pause, of each layer in turns."""
    answers = dict.fromkeys(_LAYERS, 0)
    seconds, used = dict.fromkeys(answers, 0.0), {layer: dict[str, float]() for layer in answers}
    async with _web() as web:
        for _ in range(_ROUNDS):
            for layer in answers:
                before, begun = endpoint.cpu_seconds(), time.monotonic()
                done = await _crowd(_once(web, endpoint, layer, False), begun + endpoint.seconds / 2)
                answers[layer] += done
                seconds[layer] += time.monotonic() - begun
                for kind, now in endpoint.cpu_seconds().items():
                    used[layer][kind] = used[layer].get(kind, 0.0) + now - before[kind]
    rates = {layer: answers[layer] / seconds[layer] for layer in answers}
    return {
        "clients": _CLIENTS,
        "answers_per_second": {layer: round(rate, 1) for layer, rate in rates.items()},
        "throughput_of_bare": round(rates["endpoint"] / rates["bare"], 3),
        "throughput_of_handle": round(rates["endpoint"] / rates["handle"], 3),
        "cpu_ms_per_answer": {
            layer: {kind: round(1000 * s / answers[layer], 1) for kind, s in by_kind.items()}
            for layer, by_kind in used.items()
        },
    }


async def _crowd(once: _Once, end: float) -> int:
    async def one() -> int:
        done = 0
        while time.monotonic() < end:
            await once()
            done += 1
        return done

    return sum(await asyncio.gather(*(one() for _ in range(_CLIENTS))))


def _web() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=PATIENCE)
    )


def _once(web: aiohttp.ClientSession, endpoint: Endpoint, layer: str, stream: bool) -> _Once:
    """Asks a layer once."""
    if layer == "handle":
        return lambda: _by_handle(stream)
    path = BARE if layer == "bare" else "/v1/chat/completions"
    body = {"model": "bench", "messages": HI, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    headers = {"authorization": f"Bearer {endpoint.key}"}

    async def post() -> None:
        async with web.post(endpoint.url + path, json=body, headers=headers) as answer:
            answer.raise_for_status()
            await answer.read()

    return post


async def _by_handle(stream: bool) -> None:
    async for _ in asked(serve.get_deployment_handle("Policy", "policy"), stream):
        pass


async def _of_engine(endpoint: Endpoint) -> list[float]:
    from stateset_ray.config import ModelConfig
    from stateset_ray.models import choose_hardware
    from stateset_ray.serving.held_policy import load_policy
    from stateset_ray.serving.source import Source

    hardware = choose_hardware(ModelConfig(threads=1, device="cpu"), gpus=0)
    hardware.apply()
    source = Source(str(endpoint.run))
    context = source.config().rollout.max_context
    held = load_policy(source.first(), endpoint.settings, hardware, context, None)
    seconds = []
    for _ in range(_WARM_UP + _TIMES):
        begun = time.monotonic()
        async with aclosing(held.answer(question(stream=False))) as answer:
            async for _ in answer:
                pass
        seconds.append(time.monotonic() - begun)
    await held.engine.close()
    return seconds
