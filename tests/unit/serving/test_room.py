"""Refusing at the door what would be refused anyway."""

from __future__ import annotations

import asyncio
import functools
import json
import logging

import pytest

from stateset_ray.serving.dispatch import PolicyBusy, overloaded
from stateset_ray.serving.events import Ask, Began
from stateset_ray.serving.room import RoomyPolicies
from stateset_ray.types import Message

pytestmark = pytest.mark.timeout(120)


def in_loop(test):
    @functools.wraps(test)
    def run(*args, **named):
        asyncio.run(test(*args, **named))

    return run


class Places:
    """Policies with so many places, each held until the test gives it back; implements `Policies`."""

    def __init__(self, places: int) -> None:
        self.places, self.taken, self.asked = places, 0, 0
        self.leave = asyncio.Event()

    async def ask(self, ask):
        self.asked += 1
        await asyncio.sleep(0)  # as long as a router takes: others come in the meantime
        if self.taken >= self.places:
            raise PolicyBusy
        self.taken += 1
        try:
            yield (Began("v", 1),)
            await self.leave.wait()
        finally:
            self.taken -= 1

    async def status(self):
        return {"version": "v"}

    async def statuses(self):
        return [await self.status()]


@pytest.fixture
def time_now():
    return [100.0]


def question(number: int) -> Ask:
    return Ask(str(number), "shop", "", (Message("user", "hi"),), 4, 1.0, 1)


async def told(policies, number: int) -> str:
    try:
        async for _ in policies.ask(question(number)):
            pass
    except PolicyBusy:
        return "busy"
    return "answered"


async def storm(policies, count: int) -> list[asyncio.Task]:
    """So many questions at once; returns when each is answering or refused."""
    asking = [asyncio.create_task(told(policies, number)) for number in range(count)]
    for _ in range(20):
        await asyncio.sleep(0)
    return asking


@in_loop
async def test_it_is_full_at_what_fits_and_not_before_anybody_was_refused(time_now):
    places = Places(3)
    roomy = RoomyPolicies(places, lambda: time_now[0])
    asking = await storm(roomy, 3)
    assert not roomy.full(), "nobody was refused"
    asking += await storm(roomy, 40)
    assert roomy.full()
    assert places.taken == 3
    places.leave.set()
    assert sorted(await asyncio.gather(*asking)) == ["answered"] * 3 + ["busy"] * 40
    assert not roomy.full(), "all places are free again"


@in_loop
async def test_one_place_that_is_free_again_is_enough(time_now):
    places = Places(2)
    roomy = RoomyPolicies(places, lambda: time_now[0])
    asking = await storm(roomy, 10)
    assert roomy.full()
    next(task for task in asking if not task.done()).cancel()
    await storm(roomy, 0)
    assert not roomy.full()
    places.leave.set()
    await asyncio.gather(*asking, return_exceptions=True)


@in_loop
async def test_what_a_refusal_told_is_tried_again_and_then_forgotten(time_now):
    places = Places(1)
    roomy = RoomyPolicies(places, lambda: time_now[0])
    asking = await storm(roomy, 3)
    assert roomy.full()
    places.places = 100  # replicas have come; nobody says so
    admitted = []
    for _ in range(5):
        time_now[0] += 0.51
        admitted.append(0)
        while not roomy.full():
            asking += await storm(roomy, 1)
            admitted[-1] += 1
    assert admitted == [1, 2, 4, 8, 16], "twice as many each time that none is refused"
    time_now[0] += 5.1
    asking += await storm(roomy, 60)
    assert not roomy.full()
    places.leave.set()
    await asyncio.gather(*asking)


@in_loop
async def test_one_try_at_a_time_while_it_stays_full(time_now):
    places = Places(1)
    roomy = RoomyPolicies(places, lambda: time_now[0])
    asking = await storm(roomy, 3)
    for _ in range(20):
        time_now[0] += 0.51
        assert not roomy.full()
        asking += await storm(roomy, 1)
        assert roomy.full(), "it was refused"
    assert places.asked == 3 + 20
    places.leave.set()
    await asyncio.gather(*asking)


@in_loop
async def test_no_replica_means_no_room_for_a_while(time_now):
    roomy = RoomyPolicies(Places(0), lambda: time_now[0])
    [asked] = await storm(roomy, 1)
    assert await asked == "busy"
    assert roomy.full()
    time_now[0] += 0.51
    assert not roomy.full()


@pytest.fixture
def asked(endpoint, policies, meters):
    """Ask a gate whose policy is full; gives what came back, and how often the body was asked for."""

    async def ask(key=endpoint.KEY, path="/v1/chat/completions", method="POST", full=lambda: True):
        gate = endpoint.gate(policies, meters, full=full)
        sent, received = [], []

        async def receive():
            received.append(1)
            body = json.dumps({"model": "tiny", "messages": endpoint.HI, "max_tokens": 2}).encode()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        headers = {"host": "localhost", "authorization": f"Bearer {key}", "content-type": "application/json"}
        scope = {
            "type": "http", "method": method, "path": path, "root_path": "", "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        await gate(scope, receive, send)
        return sent, len(received)

    return ask


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/agent/chat/completions"])
@in_loop
async def test_a_full_endpoint_refuses_before_it_reads(asked, policies, recorders, endpoint, path):
    (start, body), received = await asked(endpoint.AGENT, path)
    assert (start["status"], received, policies.asked) == (429, 0, [])
    assert json.loads(body["body"]) == overloaded().body()
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert headers["content-length"] == str(len(body["body"]))
    assert headers.items() >= overloaded().headers().items()
    assert headers.keys() >= {"x-request-id", "x-content-type-options", "cache-control", "content-type"}
    assert recorders["shed"].counted == {("overloaded",): 1}
    assert recorders["requests"].counted == {(path, "4xx"): 1}


@in_loop
async def test_who_has_no_key_is_told_so_and_nothing_else(asked):
    (start, _), _ = await asked("x" * 32)
    assert start["status"] == 401


@in_loop
async def test_what_asks_nothing_of_the_policy_passes(asked):
    (start, *_), _ = await asked(path="/v1/models", method="GET")
    assert start["status"] == 200


@in_loop
async def test_a_policy_with_room_is_asked(asked, policies):
    (start, *_), _ = await asked(full=lambda: False)
    assert (start["status"], len(policies.asked)) == (200, 1)


@in_loop
async def test_a_storm_of_refusals_does_not_flood_the_log(endpoint, policies, meters, caplog):
    caplog.set_level(logging.INFO, "ray.serve")
    logging.getLogger("ray.serve").propagate = True
    gate = endpoint.gate(policies, meters, full=lambda: True)
    async with endpoint.raw(gate) as web:
        for _ in range(50):
            answer = await web.post("/v1/chat/completions", json={"model": "tiny", "messages": endpoint.HI})
            assert answer.status_code == 429
    assert 1 <= sum("refused for want of room" in line for line in caplog.messages) < 25
    assert not any("by shop: 429" in line for line in caplog.messages)
