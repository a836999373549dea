"""How much a key may ask for, in one ingress replica and where several count together in a real Redis."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.errors import ConfigError
from stateset_ray.serve import prepared
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


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 40)), max_size=40), st.integers(0, 4))
def test_no_minute_holds_more_than_is_allowed_and_nothing_else_is_refused(arrivals, most):
    now = [0.0]
    rates = Rates(RateSettings(requests=f"{most}/minute"), lambda: now[0])

    async def play():
        counted: dict[str, list[float]] = {"a": [], "b": []}
        for caller, pause in arrivals:
            now[0] += pause
            within = [at for at in counted[caller] if at > now[0] - 60]
            result = await told(rates, caller)
            assert result == ("counted" if len(within) < most else REFUSED)
            if result == "counted":
                counted[caller].append(now[0])

    asyncio.run(play())


def test_who_is_refused_is_told_when_there_is_room_again():
    now = [0.0]
    rates = Rates(RateSettings(requests="2/minute"), lambda: now[0])

    async def play():
        for at in (0.0, 20.0):
            now[0] = at
            await rates.count("a")
        now[0] = 30.0
        with pytest.raises(ApiError) as refused:
            await rates.count("a")
        assert refused.value.retry_after == 30.0
        now[0] += 30.0
        await rates.count("a")

    asyncio.run(play())


def test_callers_who_stay_away_are_forgotten():
    now = [0.0]
    rates = Rates(RateSettings(requests="2/minute"), lambda: now[0])

    async def play():
        for number in range(300):
            now[0] += 1
            await rates.count(f"caller {number}")

    asyncio.run(play())
    assert len(rates._own._begun) <= 120


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


def test_redis_without_its_package_is_refused_before_anything_starts(monkeypatch):
    for name in ("redis", "redis.asyncio"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"rates\.storage") as caught:
        Rates(RateSettings(storage="redis://h:secret@127.0.0.1:1/0"))
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"rates\.storage"):
        prepared("tiny", ["rates.storage=redis://127.0.0.1:1/0"], keys=None, host="127.0.0.1")
