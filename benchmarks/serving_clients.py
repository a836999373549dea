"""Clients for `benchmarks.serving`: what each request was told, and when."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.serving_endpoint import PATIENCE, Endpoint

__all__ = ["HI", "Client", "Told", "crowd", "percentiles", "summary"]

HI = [{"role": "user", "content": "hi"}]


@dataclass
class Told:
    """One request: seconds are of `time.monotonic`."""

    begun: float
    told: str = "answered"
    first: float | None = None
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Seconds between two pieces."""
    tokens: int = 0
    retry_after: str | None = None


class Client:
    """Asks without retries of its own."""

    def __init__(self, endpoint: Endpoint, web: aiohttp.ClientSession) -> None:
        self._endpoint, self._web = endpoint, web

    @classmethod
    @asynccontextmanager
    async def of(cls, endpoint: Endpoint) -> Any:
        """A client with connections of its own."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=PATIENCE)
        ) as web:
            yield cls(endpoint, web)

    async def ask(
        self, messages: Sequence[dict[str, str]] = HI, *, tokens: int, session: str = "", stream: bool = True,
        leave: bool = False, **more: Any,
    ) -> tuple[Told, str]:  # fmt: skip
        """Ask once; what was told, and the text.

        Args:
            leave: after the first piece.
        """
        told, text = Told(time.monotonic()), ""
        headers = {"authorization": f"Bearer {self._endpoint.key}"}
        if session:
            headers["x-session-id"] = session
        body = {"model": "bench", "messages": list(messages), "max_tokens": tokens, "stream": stream, **more}
        if stream:
            body["stream_options"] = {"include_usage": True}
        try:
            async with self._web.post(
                f"{self._endpoint.url}/v1/chat/completions", json=body, headers=headers
            ) as answer:
                if answer.status != 200:
                    told.told = await _refusal(answer)
                    told.retry_after = answer.headers.get("retry-after")
                elif stream:
                    text = await _read(answer, told, leave)
                else:
                    whole = await answer.json()
                    text, told.tokens = (
                        whole["choices"][0]["message"]["content"],
                        whole["usage"]["completion_tokens"],
                    )
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
            told.told = f"broken: {type(error).__name__}"
        told.ended = time.monotonic()
        return told, text


async def _refusal(answer: aiohttp.ClientResponse) -> str:
    try:
        return f"{answer.status} {(await answer.json())['error']['code']}"
    except (aiohttp.ClientError, ValueError, KeyError):
        return f"{answer.status} not in our shape"


async def _read(answer: aiohttp.ClientResponse, told: Told, leave: bool) -> str:
    text, last, ended = "", 0.0, False
    async for line in answer.content:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            ended = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            told.told = f"in the stream: {event['error']['code']}"
            continue
        if event.get("usage"):
            told.tokens = event["usage"]["completion_tokens"]
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            now = time.monotonic()
            if told.first is None:
                told.first = now
            else:
                told.gaps.append(now - last)
            last = now
            text += event["choices"][0]["delta"]["content"]
            if leave:
                answer.close()
                return text
    if not ended and told.told == "answered":
        told.told = "broken: no end"
    return text


async def crowd(
    endpoint: Endpoint, clients: int, work: Callable[[], None], *, tokens: int, stream: bool = True,
    lasting: bool = True,
) -> list[Told]:  # fmt: skip
    """Clients ask without a pause while `work` is done in a thread.

    Args:
        lasting: each client has one session; else one for each request.
    """
    found: list[Told] = []
    over = asyncio.Event()

    async def one(number: int) -> None:
        async with Client.of(endpoint) as client:
            while not over.is_set():
                session = f"{number}" if lasting else f"{number}-{len(found)}"
                told, _ = await client.ask(tokens=tokens, session=session, stream=stream)
                found.append(told)
                if told.told != "answered":
                    await asyncio.sleep(0.05)

    asking = [asyncio.create_task(one(number)) for number in range(clients)]
    try:
        await asyncio.to_thread(work)
    finally:
        over.set()
        await asyncio.wait_for(asyncio.gather(*asking), PATIENCE)
    return found


def summary(found: Sequence[Told]) -> dict[str, Any]:
    """Requests, failures by what was told, and milliseconds (50th, 99th percentile)."""
    good = [t for t in found if t.told == "answered"]
    seconds = max(t.ended for t in found) - min(t.begun for t in found)
    return {
        "requests": len(found),
        "failed": dict(Counter(t.told for t in found if t.told != "answered")),
        "first_token_ms": percentiles([t.first - t.begun for t in good if t.first is not None]),
        "between_tokens_ms": percentiles([gap for t in good for gap in t.gaps]),
        "total_ms": percentiles([t.ended - t.begun for t in good]),
        "answers_per_second": round(len(good) / seconds, 2),
        "tokens_per_second": round(sum(t.tokens for t in good) / seconds, 1),
    }


def percentiles(seconds: Iterable[float]) -> list[float] | None:
    """The 50th and 99th, in milliseconds; None for too few."""
    known = list(seconds)
    if len(known) < 2:
        return None
    cuts = statistics.quantiles(known, n=100, method="inclusive")
    return [round(cuts[49] * 1000, 1), round(cuts[98] * 1000, 1)]
