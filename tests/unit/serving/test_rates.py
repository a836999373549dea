"""How much a key may ask for, where several ingress replicas count together in a real Redis."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter

import pytest

from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.rates import Rates
from stateset_ray.serving.settings import RateSettings

REFUSED = "rate_limited, again later"


async def told(rates: Rates, caller: str) -> str:
    try:
        await rates.count(caller)
    except ApiError as error:
        return f"{error.code}, again later" if 1 <= (error.retry_after or 0) <= 120 else error.code
    return "counted"


def test_ingress_replicas_count_together(redis_url):
    async def play():
        replicas = [Rates(RateSettings(requests="5/minute", storage=redis_url)) for _ in range(2)]
        found = Counter([await told(replicas[n % 2], "together") for n in range(12)])
        assert found == {"counted": 5, REFUSED: 7}
        assert await told(replicas[0], "somebody else") == "counted"

    asyncio.run(play())


def test_a_redis_that_is_gone_stops_nobody_and_is_asked_again(redis_url, caplog):
    caplog.set_level(logging.ERROR, "ray.serve")
    logging.getLogger("ray.serve").propagate = True
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = f"redis://127.0.0.1:{probe.getsockname()[1]}/0"
    now = [100.0]

    async def play():
        rates = Rates(RateSettings(requests="2/minute", storage=gone), lambda: now[0])
        assert [await told(rates, "a") for _ in range(3)] == ["counted", "counted", REFUSED]
        assert len(caplog.messages) == 1, "it was asked once, and then left alone"
        now[0] += 5.1
        assert await told(rates, "a") == REFUSED
        assert len(caplog.messages) == 2

    asyncio.run(play())


def test_a_redis_that_does_not_answer_costs_one_request_half_a_second():
    async def play(port):
        rates = Rates(RateSettings(requests="9/minute", storage=f"redis://127.0.0.1:{port}/0"))
        begun = time.monotonic()
        assert [await told(rates, "a") for _ in range(5)] == ["counted"] * 5
        assert time.monotonic() - begun < 5

    pytest.importorskip("redis")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        asyncio.run(play(mute.getsockname()[1]))
