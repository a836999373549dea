"""Where a policy comes from, what is refused of it, and how a replica takes over a newer one."""

from __future__ import annotations

import asyncio
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from stateset_ray.config import Config
from stateset_ray.errors import (
    CheckpointError,
    ConfigError,
    InfrastructureFault,
    ModelError,
    StatesetError,
)
from stateset_ray.serving.events import Ask, Began
from stateset_ray.serving.replica import PolicyReplica
from stateset_ray.serving.settings import PolicySettings, ServeSettings, SwapSettings
from stateset_ray.serving.source import Source, pin, pinned
from stateset_ray.serving.verdicts import Verdicts
from stateset_ray.serving.verification import checked
from stateset_ray.types import Message

support = runpy.run_path(str(Path(__file__).with_name("support_checkpoints.py")))
save = support["save"]


def room(source, max_context=0):
    return checked(source.first(), source.config(), max_context)


def test_a_run_a_checkpoint_and_a_name(run):
    first = Source(str(run))
    assert first.run == run.absolute()
    assert first.first().label.startswith("step-00000001-")
    assert room(first) == 128
    assert Source(str(run / "checkpoints")).run == run.absolute()
    one = Source(str(run / "checkpoints" / "step-00000001"))
    assert one.run is None
    assert one.first().label == first.first().label
    assert one.config().rollout.max_context == 128
    assert one.wanted() is None
    name = Source("tiny")
    assert (name.first().model, name.first().step, name.config()) == ("tiny", -1, Config())
    assert ServeSettings(source=str(run)).name == ServeSettings(source=one.first().model).name == "shop"
    with pytest.raises(CheckpointError, match="neither a run"):
        Source(str(run.parent))
    with pytest.raises(ConfigError, match="positions"):
        room(first, 10**6)


def test_a_newer_checkpoint_is_wanted_and_a_pin_holds_an_older_one(run):
    source = Source(str(run))
    save(run, 2)
    assert source.wanted().step == source.first().step == 2
    pin(run, "step-00000001")
    assert pinned(run) == "step-00000001"
    assert source.wanted().step == source.first().step == 1
    save(run, 3)
    assert source.wanted().step == 1
    pin(run, None)
    pin(run, None)
    assert source.wanted().step == 3
    for name in ("../../etc", "/etc", "step-1", "step-00000001/..", "", "step-00000001\0", "latest", "..%2f"):
        with pytest.raises(ConfigError):
            pin(run, name)
    with pytest.raises(CheckpointError):
        pin(run, "step-00000099")
    (run / "serve-pin").write_text("../x")
    with pytest.raises(CheckpointError, match="pin"):
        source.first()


def test_one_changed_byte_is_refused(run):
    file = run / "checkpoints" / "step-00000001" / "model.safetensors"
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    source = Source(str(run))
    with pytest.raises(CheckpointError):
        source.first()
    with pytest.raises(CheckpointError, match="content"):
        checked(source.wanted(), source.config(), 0)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "evil.pkl", "modeling_tiny.py", "x.pt"])
def test_what_could_run_code_is_refused(run, name):
    save(run, 2, extra={name: b"cos\nsystem\n(S'touch /tmp/x'\ntR."})
    with pytest.raises(ModelError, match="run code"):
        room(Source(str(run)))


def replica(run, meters, poll=0.0):
    settings = ServeSettings(
        source=str(run), policy=PolicySettings(slots=4, threads=1), swap=SwapSettings(poll_seconds=poll)
    )
    return PolicyReplica(settings, meters)


def ask(**more):
    fields = {"id": "a", "tenant": "t", "session": "", "messages": (Message("user", "hi"),),
              "max_tokens": 30, "temperature": 0.0, "seed": 1, "stream": True}  # fmt: skip
    return Ask(**fields | more)


async def version(replica, **more):
    events = [e async for part in replica.answer(ask(**more)) for e in part]
    return next(e.version for e in events if isinstance(e, Began))


def test_a_swap_while_a_stream_runs(run, meters, recorders):
    async def play():
        held = replica(run, meters)
        await held.start()
        stream = held.answer(ask())
        (began,) = await anext(stream)
        save(run, 2, scale=1.5)
        assert await held.swap(Source(str(run)).first())
        assert (await version(held)).startswith("step-00000002-")
        rest = [e async for part in stream for e in part]  # to its end, by the version it began with
        assert rest[-1].tokens
        assert began.version.startswith("step-00000001-")
        assert (await held.status())["step"] == 2
        assert recorders["swaps"].counted[("done",)] == 1
        assert recorders["policy_step"].values == [1, 2]

    asyncio.run(play())


def test_there_are_two_versions_in_memory_and_no_third(run, meters, monkeypatch):
    async def play():
        held = replica(run, meters)
        await held.start()

        async def step():
            await held._follow_stable()
            return (await held.status())["step"]

        first = held.answer(ask())
        await anext(first)
        save(run, 2, scale=1.1)
        assert await step() == 2
        status = await held.status()
        assert status["running"] == 1 and status["tokens"] > 0, "what was replaced still answers"
        assert held.record_autoscaling_stats()["tokens"] == status["tokens"]
        save(run, 3, scale=1.2)
        assert await step() == 2, "while it does, nothing is loaded"
        pin(run, "step-00000003")
        assert await step() == 3, "but what may be urgent"
        second = held.answer(ask())
        await anext(second)
        pin(run, "step-00000001")
        with monkeypatch.context() as patch:
            patch.setattr(held, "_load", None)
            assert await step() == 1, "it is there"
        for stream in (first, second):
            assert [e async for part in stream for e in part]
        assert (await version(held)).startswith("step-00000001-")
        assert ((await held.status())["running"], held._ending) == (0, [])

    asyncio.run(play())


def test_what_was_replaced_and_answers_nobody_leaves_the_memory_at_once(run, meters):
    async def play():
        held = replica(run, meters)
        await held.start()
        save(run, 2, scale=1.1)
        await held._follow_stable()
        assert held._ending == [], "and not when the next request comes"

    asyncio.run(play())


def test_what_the_machine_was_short_of_is_tried_again_and_what_is_wrong_is_not(run, meters):
    now = [0.0]

    async def play():
        held = replica(run, meters)
        await held.start()
        held._verdicts = Verdicts(lambda: now[0])
        load, fails = held._load, [MemoryError(), OSError(5, "Input/output error")]

        async def loading(candidate):
            if fails:
                raise fails.pop(0)
            return await load(candidate)

        held._load = loading
        save(run, 2, scale=1.1)
        seen = []
        for now[0] in (0.0, 29.0, 30.0, 89.0, 90.0):
            await held._follow_stable()
            seen.append((len(fails), (await held.status())["step"]))
        assert seen == [(1, 1), (1, 1), (0, 1), (0, 1), (0, 2)]
        save(run, 3, scale=float("nan"))
        await held._follow_stable()
        held._load = None
        now[0] = 1e9
        await held._follow_stable()
        assert (await held.status())["step"] == 2

    asyncio.run(play())


@pytest.mark.parametrize("wrong", ["nan", "byte", "missing", "code", "config"])
def test_a_bad_checkpoint_changes_nothing(run, meters, recorders, wrong):
    async def play():
        held = replica(run, meters)
        await held.start()
        extra = {"code": {"x.pkl": b"x"}, "config": {"config.json": b"{}"}}.get(wrong)
        path = save(run, 2, scale=float("nan") if wrong == "nan" else 1.0, extra=extra)
        candidate = Source(str(run)).wanted()
        if wrong == "byte":
            with (path / "tokenizer.json").open("ab") as file:
                file.write(b" ")
        if wrong == "missing":
            shutil.rmtree(path)
        assert not await held.swap(candidate)
        assert (await version(held)).startswith("step-00000001-")
        status = await held.status()
        assert status["step"] == 1
        assert candidate.label in status["problem"]
        assert recorders["swaps"].counted == {("refused",): 1}

    asyncio.run(play())


def test_the_watcher_takes_over_and_rolls_back(run, meters):
    async def play():
        held = replica(run, meters, poll=0.01)
        await held.start()
        held.check_health()

        async def reaches(step):
            async with asyncio.timeout(30):
                while (await held.status())["step"] != step:
                    await asyncio.sleep(0.01)

        save(run, 2, scale=1.1)
        await reaches(2)
        save(run, 3, scale=float("nan"))
        async with asyncio.timeout(30):
            while not (await held.status())["problem"]:
                await asyncio.sleep(0.01)
        assert (await held.status())["step"] == 2
        pin(run, "step-00000001")
        await reaches(1)
        assert torch.is_inference_mode_enabled() is False
        held.check_health()
        held._watch.cancel()

    asyncio.run(play())


def test_a_replica_begins_with_the_newest_that_can_answer(run, meters):
    """Else a bad checkpoint would take away each replica that is restarted."""
    save(run, 2)
    save(run, 3, float("nan"))

    async def play():
        held = replica(run, meters, poll=0.01)
        await held.start()
        status = await held.status()
        assert status["step"] == 2
        assert "step-00000003" in status["problem"]
        assert (await version(held)).startswith("step-00000002-")
        held._watch.cancel()

    asyncio.run(play())
    assert [c.step for c in Source(str(run)).candidates()] == [3, 2, 1]
    (run / "checkpoints" / "latest").write_text("step-00000002")
    assert [c.step for c in Source(str(run)).candidates()] == [2, 1, 3]
    pin(run, "step-00000003")
    with pytest.raises(StatesetError, match="finite"):
        asyncio.run(replica(run, meters).start())


def test_a_replica_without_a_whole_checkpoint_does_not_come_up(run, meters):
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    with pytest.raises(StatesetError):
        asyncio.run(replica(run, meters).start())


def test_a_replica_whose_engine_has_died_is_replaced(run, meters):
    async def play():
        held = replica(run, meters)
        held.check_health()  # it is still loading
        await held.start()
        held.check_health()
        held._held.engine.dead = True  # as a process of vLLM's that has ended
        with pytest.raises(InfrastructureFault, match="engine has died"):
            held.check_health()

    asyncio.run(play())
