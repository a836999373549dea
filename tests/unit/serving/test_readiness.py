"""Whether the endpoint says that it is ready: busy replicas are, and asking costs the replicas nothing."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from stateset_ray.serving import pulse as module
from stateset_ray.serving.events import Began, Ended, Piece
from stateset_ray.serving.routes import routes
from stateset_ray.serving.settings import ServeSettings


class Replicas:
    """In the place of `Policies`: answers what it holds at once, or not at all."""

    events = ((Began("v0", 3),), (Piece(0, "hi"), Ended(0, "stop", 1)))

    def __init__(self) -> None:
        self.asked = 0
        self.busy = False

    async def status(self) -> dict[str, str]:
        self.asked += 1
        if self.busy:
            await asyncio.Event().wait()
        return {"version": f"v{self.asked}"}

    async def ask(self, _):
        for events in self.events:
            yield events


@pytest.fixture
def replicas(monkeypatch):
    monkeypatch.setattr(module, "_READY_SECONDS", 0.02)
    return Replicas()


def told(meters, replicas, *, busy_after=1, times=3):
    """(status, body) of one look after the other, the replicas busy after so many."""

    async def main():
        app = routes(ServeSettings(source="tiny"), replicas, meters)
        answers = []
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=app), base_url="http://localhost"
        ) as web:
            for index in range(times):
                replicas.busy = index >= busy_after
                found = await web.get("/readyz")
                answers.append((found.status_code, found.json()))
        return answers

    return asyncio.run(main())


def test_replicas_that_are_too_busy_to_say_what_they_hold_are_ready(meters, replicas, monkeypatch):
    monkeypatch.setattr(module, "_PULSE_SECONDS", 0.0)
    assert told(meters, replicas) == [(200, {"status": "ready", "version": "v1"})] * 3
    assert replicas.asked == 3


def test_replicas_that_have_not_answered_for_long_are_not(meters, replicas, monkeypatch):
    monkeypatch.setattr(module, "_PULSE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_BUSY_SECONDS", 0.01)  # less than one look at them takes
    assert [status for status, _ in told(meters, replicas)] == [200, 503, 503]


def test_replicas_that_answer_others_are_ready_though_the_question_waits(meters, replicas, monkeypatch):
    """Under a load that lasts, behind more of them than are answered in time."""
    monkeypatch.setattr(module, "_PULSE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_BUSY_SECONDS", 60.0)
    replicas.busy = True

    async def main():
        pulse = module.Pulse(replicas)
        assert await pulse.version() is None
        assert [events async for events in pulse.ask(None)] == [*replicas.events]
        found = await pulse.version()
        monkeypatch.setattr(module, "_BUSY_SECONDS", 0.01)
        return found, await pulse.version()

    assert asyncio.run(main()) == ("v0", None)


def test_without_a_first_answer_nobody_is_ready(meters, replicas):
    assert [status for status, _ in told(meters, replicas, busy_after=0)] == [503] * 3


def test_many_who_ask_cost_the_replicas_one_question(meters, replicas):
    async def main():
        app = routes(ServeSettings(source="tiny"), replicas, meters)
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=app), base_url="http://localhost"
        ) as web:
            return await asyncio.gather(*[web.get("/readyz") for _ in range(50)])

    assert {answer.json()["version"] for answer in asyncio.run(main())} == {"v1"}
    assert replicas.asked == 1
