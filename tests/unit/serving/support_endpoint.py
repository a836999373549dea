"""An endpoint in this process: the real application and engine, OpenAI's client; loaded by `runpy`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import httpx2
import openai

from stateset_ray.serving.events import Ask
from stateset_ray.serving.gate import Gate
from stateset_ray.serving.held_policy import HeldPolicy
from stateset_ray.serving.rates import Rates
from stateset_ray.serving.routes import routes
from stateset_ray.serving.security import KeyRing, digest
from stateset_ray.serving.settings import (
    DeadlineSettings,
    KeyEntry,
    LimitSettings,
    PolicySettings,
    RateSettings,
    SecuritySettings,
    ServeSettings,
)

KEY, ADMIN, AGENT, ROOT = "k" * 32, "a" * 32, "g" * 32, "r" * 32
HI = [{"role": "user", "content": "hi"}]
SETTINGS = ServeSettings(
    source="tiny",
    policy=PolicySettings(slots=4),
    limits=LimitSettings(body_bytes=4096),
    rates=RateSettings(requests="1000/minute", concurrent=3),
    deadlines=DeadlineSettings(keep_alive=0.05),
    security=SecuritySettings(
        keys=(
            KeyEntry(name="shop", sha256=digest(KEY)),
            KeyEntry(name="clerk", sha256=digest(AGENT), scopes=("chat", "agent")),
            KeyEntry(name="root", sha256=digest(ROOT), scopes=("chat", "agent", "admin")),
            KeyEntry(name="boss", sha256=digest(ADMIN), scopes=("chat", "admin")),
        )
    ),
)


class Local:
    """The policy in this process; implements `Policies`. What is in `faults` happens first, in order."""

    def __init__(self, held: HeldPolicy) -> None:
        self.held = held
        self.faults: list[Exception] = []
        self.asked: list[Ask] = []
        self.hang: asyncio.Event | None = None

    async def ask(self, ask):
        self.asked.append(ask)
        if self.faults:
            raise self.faults.pop(0)
        if self.hang is not None:
            await self.hang.wait()
        async with aclosing(self.held.answer(ask)) as answer:
            async for events in answer:
                yield events
                if self.faults:
                    raise self.faults.pop(0)

    async def status(self):
        return {"version": self.held.candidate.label}

    async def statuses(self):
        return [await self.status()]


def gate(policies, meters, settings=SETTINGS, full=lambda: False):
    """The whole application."""
    app = routes(settings, policies, meters)
    return Gate(app, KeyRing(settings.security, {}), Rates(settings.rates), settings, meters, full)


def client(gate, key=KEY, below=""):
    transport = httpx2.ASGITransport(app=gate, raise_app_exceptions=False)
    return openai.AsyncOpenAI(
        base_url=f"http://localhost/v1{below}", api_key=key, max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(transport=transport),
    )  # fmt: skip


def raw(gate, key=KEY):
    transport = httpx2.ASGITransport(app=gate, raise_app_exceptions=False)
    return httpx2.AsyncClient(
        transport=transport, base_url="http://localhost", headers={"authorization": f"Bearer {key}"}
    )
