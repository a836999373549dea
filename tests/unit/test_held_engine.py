"""An engine and its weights, without a model: who leaves does not leave half of them, and a dead one ends."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stateset_ray.actors.held_engine import HeldEngine
from stateset_ray.config import load_config
from stateset_ray.errors import InfrastructureFault
from stateset_ray.policies import weight_folder
from stateset_ray.policies.base import EngineStats, Reply, ReplyRequest
from stateset_ray.policies.vllm_engine import VllmEngine

REQUEST = ReplyRequest("c", (1, 2), (), 3, 1.0, 0)


class Engine:
    """Implements `Engine`: takes its weights in two halves, the second when it may."""

    def __init__(self) -> None:
        self.version, self.stats, self.dead = 0, EngineStats(), False
        self.weights: list[torch.Tensor] = []
        self.half, self.go_on = asyncio.Event(), asyncio.Event()
        self.begun = 0

    async def reply(self, request: ReplyRequest) -> Reply:
        if self.dead:
            raise InfrastructureFault("the core has ended")
        return Reply((7,), (0.0,), self.version, "stop")

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        one, other = (tensor.clone() for tensor in tensors.values())
        self.begun += 1
        self.weights = [one]
        self.half.set()
        await self.go_on.wait()
        self.weights.append(other)
        self.version = version

    def forget(self) -> None:
        pass


def held(engine: Any) -> HeldEngine:
    config = load_config(None, ["model.name=tiny", "publish.transport=folder"])
    return HeldEngine(config, 1, None, engine)  # type: ignore[arg-type]


def published(root: Path, version: int, lineage: int = 0) -> dict[str, Any]:
    """What a worker is told of weights that lie in a folder."""
    tensors = {name: torch.full((2,), float(version)) for name in ("a", "b")}
    folder = weight_folder.publish(root, version, lineage, tensors, keep=2, timeout=10, beside={})
    return {"handle": str(folder), "lineage": lineage}


@pytest.mark.timeout(60)
def test_who_asked_for_weights_may_leave_and_they_are_taken_whole(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Engine()
        holder, told = held(engine), published(tmp_path, 3)
        asked = asyncio.create_task(holder.hold(3, told))
        await engine.half.wait()
        asked.cancel()  # a limit of time, or a group that was dropped
        with pytest.raises(asyncio.CancelledError):
            await asked
        other = asyncio.create_task(holder.hold(3, told))
        await asyncio.sleep(0)
        assert not other.done()  # what is there is half of the weights
        engine.go_on.set()
        await other
        assert engine.begun == 1  # what was begun was ended, and not begun again
        assert [tensor.tolist() for tensor in engine.weights] == [[3.0, 3.0]] * 2
        assert (await holder.reply(REQUEST)).policy_version == 3

    asyncio.run(main())


def test_weights_of_before_a_rewind_never_come_back(tmp_path: Path) -> None:
    async def main() -> None:
        engine = Engine()
        engine.go_on.set()
        holder, before = held(engine), published(tmp_path, 5)
        await holder.hold(5, before)
        after = published(tmp_path, 3, lineage=1)
        await holder.hold(3, after)
        await holder.hold(5, before)
        assert (engine.version, engine.weights[0].tolist()) == (3, [3.0, 3.0])

    asyncio.run(main())


def test_an_engine_that_has_fetched_nothing_yet_falls_asleep_too(tmp_path: Path) -> None:
    async def main() -> None:
        engine: Any = Engine()
        asleep: list[bool] = []

        async def sleep() -> None:
            asleep.append(True)

        engine.sleep = sleep
        engine.go_on.set()
        holder = held(engine)
        await holder.sleep()  # it was just built: what it was built with takes the same room
        assert asleep == [True]
        with pytest.raises(InfrastructureFault, match="before any weights were published"):
            await holder.hold(0, {"handle": None, "lineage": 0})
        await holder.hold(3, published(tmp_path, 3))
        assert (await holder.reply(REQUEST)).policy_version == 3

    asyncio.run(main())


@pytest.mark.parametrize("dead", [True, False])
def test_the_process_of_a_dead_engine_ends_and_so_is_built_anew(dead: bool) -> None:
    engine: Any = SimpleNamespace(dead=dead)

    async def reply(_: ReplyRequest) -> Reply:
        raise InfrastructureFault("the core has ended")

    engine.reply = reply
    if (child := os.fork()) == 0:
        try:
            asyncio.run(held(engine).reply(REQUEST))
        except InfrastructureFault:
            os._exit(86)  # it was told, and lives on
        finally:
            os._exit(87)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (1 if dead else 86)


@pytest.mark.parametrize(("broken", "errored"), [("", False), ("half of the weights", False), ("", True)])
def test_vllm_is_dead_with_its_core_or_with_half_of_the_weights(broken: str, errored: bool) -> None:
    engine = object.__new__(VllmEngine)  # vLLM itself is not here
    engine._broken, engine._llm = broken, SimpleNamespace(errored=errored)
    assert engine.dead == bool(broken or errored)
