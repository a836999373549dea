"""Which engine answers: sticky, least loaded, and another one where an engine dies."""

import asyncio
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from stateset_ray.actors.router import Router
from stateset_ray.policies.base import Reply, ReplyRequest

NONE = {"handle": None, "lineage": 0}


class Engine:
    """Stands for a handle: its calls are coroutines, and it may be dead."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ReplyRequest]] = []
        self.released: list[str] = []
        self.dead = False
        self.gate: asyncio.Event | None = None
        self.back = asyncio.Event()
        self.reply = SimpleNamespace(remote=self._reply)
        self.ready = SimpleNamespace(remote=self._ready)
        self.release = SimpleNamespace(remote=self.released.append)

    async def _reply(self, version: int, weights: object, request: ReplyRequest) -> Reply:
        self.asked.append((version, request))
        if self.gate is not None:
            await self.gate.wait()
        if self.dead:
            raise RayActorError
        return Reply((1,), (0.0,), version, "stop")

    async def _ready(self) -> dict[str, int]:
        await self.back.wait()
        self.dead = False
        return {}


def request(name: str, tokens: int = 10) -> ReplyRequest:
    return ReplyRequest(name, tuple(range(tokens)), (), 5, 1.0, 7)


def test_a_conversation_stays_where_it_began_and_others_go_where_least_is_to_do():
    async def main():
        engines = [Engine(), Engine()]
        router = Router(engines)
        for engine in engines:
            engine.gate = asyncio.Event()
        long = asyncio.create_task(router.reply(request("long", 90)))
        await asyncio.sleep(0)
        short = [asyncio.create_task(router.reply(request(f"s{i}"))) for i in range(3)]
        for _ in range(5):
            await asyncio.sleep(0)
        for engine in engines:
            engine.gate.set()
        await asyncio.gather(long, *short)
        await router.reply(request("s1"))
        await router.reply(request("long"))
        router.release("s1")
        return [[r.conversation for _, r in engine.asked] for engine in engines], engines[1].released

    asked, released = asyncio.run(main())
    assert asked == [["long", "long"], ["s0", "s1", "s2", "s1"]]
    assert released == ["s1"]


def test_a_dead_engines_conversation_goes_on_elsewhere_from_its_ids_and_its_seed():
    async def main():
        engines = [Engine(), Engine()]
        router = Router(engines)
        await router.reply(request("a"))
        engines[0].dead = True
        reply = await router.reply(request("a", 20))
        again = await router.reply(request("a", 30))  # it has a new home
        return engines, router.stats(), reply, again

    engines, stats, reply, again = asyncio.run(main())
    assert reply.token_ids == again.token_ids == (1,)
    assert engines[0].asked[-1] == engines[1].asked[0]  # the very same request, seed and all
    assert len(engines[1].asked) == 2
    assert stats["moved"] == 1


def test_with_no_engine_alive_a_turn_waits_for_the_first_that_comes_back():
    async def main():
        engines = [Engine(), Engine()]
        for engine in engines:
            engine.dead = True
        router = Router(engines)
        waiting = asyncio.create_task(router.reply(request("a")))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        engines[1].back.set()
        return await asyncio.wait_for(waiting, 5), len(engines[1].asked)

    reply, asked = asyncio.run(main())
    assert reply.token_ids == (1,)
    assert asked == 2  # once in vain


def test_every_request_names_the_newest_version_and_a_new_lineage_goes_back():
    async def main():
        engine = Engine()
        router = Router([engine])
        await router.hold(5, NONE)
        await router.reply(request("a"))
        await router.hold(4, NONE)  # late
        await router.reply(request("a"))
        await router.hold(2, {"handle": None, "lineage": 1})
        await router.reply(request("a"))
        return [version for version, _ in engine.asked]

    assert asyncio.run(main()) == [5, 5, 2]


def test_a_turn_that_nobody_waits_for_is_cancelled_at_its_engine(monkeypatch):
    cancelled = []
    monkeypatch.setattr(ray, "cancel", lambda call: cancelled.append(call))

    async def main():
        engine = Engine()
        engine.gate = asyncio.Event()
        router = Router([engine])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await router.reply(request("a"))
        engine.gate = None
        await router.reply(request("b"))
        return router._load

    assert asyncio.run(main()) == [0]
    assert len(cancelled) == 1


def test_an_engine_whose_return_fails_once_is_asked_again(monkeypatch):
    monkeypatch.setattr("stateset_ray.actors.router._RETRY", 0.0)

    class Slow(Engine):
        failures = 1

        async def _ready(self) -> dict[str, int]:
            if self.failures:
                self.failures -= 1
                raise RayTaskError("ready", "no memory yet", MemoryError("no memory yet"))
            self.dead = False
            return {}

    async def main():
        engine = Slow()
        engine.dead = True
        return await asyncio.wait_for(Router([engine]).reply(request("a")), 5)

    assert asyncio.run(main()).token_ids == (1,)
