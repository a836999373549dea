"""What is left in an ingress of requests that were answered: nothing. Objects are counted, not bytes."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest

from stateset_ray.serving.events import Began, Ended, Piece
from stateset_ray.serving.room import RoomyPolicies
from stateset_ray.serving.settings import RateSettings

_WARM_UP, _REQUESTS = 100, 300
_LEFT = _REQUESTS // 2  # of one kind: a cache may fill, but not by one for each request


class Quick:
    """Policies that answer at once; implements `Policies`."""

    async def ask(self, ask):
        yield (Began("v", 1),)
        yield (Piece(0, "so it is", ()), Ended(0, "stop", 3))

    async def status(self):
        return {"version": "v"}

    async def statuses(self):
        return [await self.status()]


def counted() -> Counter[str]:
    gc.collect()
    found = Counter(f"{type(thing).__module__}.{type(thing).__name__}" for thing in gc.get_objects())
    del found["logging.LogRecord"]  # pytest keeps them, to show what was logged
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_with_a_session_each_leave_nothing_behind(endpoint, meters, recorders, stream):
    rates = RateSettings(requests="1000000/minute", concurrent=1000)
    settings = endpoint.SETTINGS.model_copy(update={"rates": rates})
    roomy = RoomyPolicies(Quick())
    gate = endpoint.gate(roomy, meters, settings, roomy.full)

    async def ask(web, first, count):
        for number in range(first, first + count):
            answer = await web.post(
                "/v1/chat/completions", headers={"x-session-id": f"s{number}", "x-request-id": f"r{number}"},
                json={"model": "tiny", "messages": endpoint.HI, "stream": stream, "user": f"u{number}"},
            )  # fmt: skip
            assert answer.status_code == 200
            await asyncio.sleep(0)  # in which the loop forgets timers that were cancelled

    async def play():
        async with endpoint.raw(gate) as web:
            await ask(web, 0, _WARM_UP)
            before = counted()
            await ask(web, _WARM_UP, _REQUESTS)
            return counted() - before

    grown = asyncio.run(play())
    assert max(grown.values()) < _LEFT, grown.most_common(8)
    assert len(recorders["requests"].counted) == 1, "the labels of metrics are a small closed set"
