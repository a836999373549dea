"""Load on an endpoint, without faults: how quick, how much, what is refused, what is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from typing import Any

from benchmarks.serving_clients import HI, Client, Told, crowd, percentiles, summary
from benchmarks.serving_endpoint import Endpoint

__all__ = ["affinity", "disconnects", "latency", "overload"]

_SECONDS = 15.0  # of each measurement
_REPLICAS = (2, 4)  # of the policy, for `affinity`
_CONVERSATIONS = 6
_TURNS = 6
_REPLY_TOKENS = 16
_QUESTION_WORDS = 16
_VOCABULARY = (
    "please", "order", "the", "parcel", "was", "sent", "to", "an", "old", "address", "refund", "of", "my",
    "bicycle", "within", "thirty", "days", "customer", "has", "paid", "by", "card", "and", "wants", "another",
    "colour", "invoice", "number", "seven", "delivery", "on", "Monday", "not", "later", "than", "noon",
)  # fmt: skip


def latency(endpoint: Endpoint) -> dict[str, Any]:
    """By clients at a time: first token, between tokens, total; tokens a second."""
    return {
        str(clients): summary(asyncio.run(crowd(endpoint, clients, lambda: time.sleep(_SECONDS), tokens=40)))
        for clients in (1, 4, 16)
    }


def affinity(endpoint: Endpoint) -> dict[str, Any]:
    """Conversations with an agent of a shop: time to the first token of each turn but the first.

    All have the same instructions, and each a record of its own; then come turns of a short question and a
    reply. Two at a time; first with every conversation named, then without names. By number of policy
    replicas: any replica knows what it has read, so of few the right one is often met by chance.
    """
    usual = endpoint.settings.policy.replicas
    found = {}
    for replicas in _REPLICAS:
        endpoint.deploy(replicas=replicas)
        endpoint.reaches(lambda states, wanted=replicas: len(states) == wanted)  # type: ignore[misc]
        found[str(replicas)] = _conversations(endpoint)
    endpoint.deploy(replicas=usual)
    return found


def _conversations(endpoint: Endpoint) -> dict[str, Any]:
    instructions = _words(0, 0, endpoint.context // 6)

    async def talk(client: Client, number: int, session: str) -> list[float]:
        said = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": _words(number, 0, endpoint.context // 6)},
        ]
        firsts = []
        for turn in range(1, _TURNS + 1):
            told, text = await client.ask(
                said, tokens=_REPLY_TOKENS, session=session, seed=100 * number + turn
            )
            assert told.told == "answered", told.told
            if turn > 1 and told.first is not None:
                firsts.append(told.first - told.begun)
            said += [
                # A model of random weights may say nothing, or what no client may send back.
                {"role": "assistant", "content": text.replace("\0", " ").strip() or "."},
                {"role": "user", "content": _words(number, turn, _QUESTION_WORDS)},
            ]
        return firsts

    async def all_of(named: bool, offset: int, count: int) -> list[float]:
        firsts = []
        async with Client.of(endpoint) as client:
            for place in range(0, count, 2):  # two at a time
                pair = [offset + place, offset + place + 1]
                found = await asyncio.gather(*(talk(client, n, f"c{n}" if named else "") for n in pair))
                firsts += [first for each in found for first in each]
        return firsts

    def measured(named: bool, offset: int) -> dict[str, Any]:
        before = _read_tokens(endpoint)
        firsts = asyncio.run(all_of(named, offset, _CONVERSATIONS))
        asked, computed = (now - then for now, then in zip(_read_tokens(endpoint), before, strict=True))
        return {
            "first_token_ms": percentiles(firsts),
            "first_token_mean_ms": round(1000 * sum(firsts) / len(firsts), 1),
            "prompt_tokens": asked,
            "computed": round(computed / asked, 3),
        }

    async def warm() -> None:
        """Let every replica know the instructions, as it does after its first minute."""
        said = [{"role": "system", "content": instructions}, *HI]
        async with Client.of(endpoint) as client:
            for _ in range(6 * endpoint.settings.policy.replicas):  # whose turn it is, is chance
                await client.ask(said, tokens=4)

    asyncio.run(warm())
    named, unnamed = measured(True, 1000), measured(False, 2000)
    return {
        "conversations": _CONVERSATIONS, "turns": _TURNS,
        "named": named, "unnamed": unnamed,
        "mean_ratio": round(unnamed["first_token_mean_ms"] / named["first_token_mean_ms"], 2),
        "p50_ratio": round(unnamed["first_token_ms"][0] / named["first_token_ms"][0], 2),
    }  # fmt: skip


def _read_tokens(endpoint: Endpoint) -> tuple[int, int]:
    """Tokens of prompts so far, and those of them that were computed."""
    found = endpoint.replicas()
    return sum(r["prompt_tokens"] for r in found), sum(r["prefill_tokens"] for r in found)


def _words(number: int, turn: int, count: int) -> str:
    rng = random.Random(1000 * number + turn)
    return " ".join(rng.choices(_VOCABULARY, k=count))


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
    used = {kind: round(now - used[kind], 1) for kind, now in endpoint.cpu_seconds().items()}
    lasted = max(t.ended for t in storm) - min(t.begun for t in storm)
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
        "storm_seconds": round(lasted, 1),
        "cpu_seconds": used,
        "share_of_processors": {
            kind: round(spent / lasted / (os.cpu_count() or 1), 3) for kind, spent in used.items()
        },
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
        processes = [process for _, process in endpoint.processes("policy", "ingress").values()]
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
