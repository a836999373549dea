"""A policy that is served by vLLM answers as one that transformers serves."""

import asyncio
import math
import shutil
from contextlib import aclosing
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from stateset_ray import checkpoint
from stateset_ray.config import load_config
from stateset_ray.errors import ModelError
from stateset_ray.serving.events import Ask, Began, Ended, Piece, Refused
from stateset_ray.serving.held_policy import load_policy
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.replica import PolicyReplica, _apart
from stateset_ray.serving.settings import PolicySettings, ServeSettings, SwapSettings
from stateset_ray.serving.source import Candidate
from stateset_ray.types import Message

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CONTEXT = 192


def held(folder, hardware, engine):
    settings = ServeSettings(source=folder, policy=PolicySettings(slots=4, engine=engine))
    return load_policy(Candidate(folder, engine, -1), settings, hardware, CONTEXT, None)


@pytest.fixture(scope="module")
def policies(folder, hardware, runner):
    """By vLLM, loaded as a replica loads it: in a thread, while its event loop runs; and by transformers."""
    served = runner.run(_apart(lambda: held(folder, hardware, "vllm")))
    yield served, held(folder, hardware, "transformers")
    runner.run(served.retire())


def ask(name, said="hello there", **options):
    given = {"max_tokens": 24, "temperature": 0.0, "seed": 1} | options
    return Ask(id=name, tenant="t", session="", messages=(Message("user", said),), **given)


async def events_of(policy, wanted):
    found = []
    async with aclosing(policy.answer(wanted)) as answer:
        async for events in answer:
            found += events
    return found


def text(events):
    return "".join(event.text for event in events if isinstance(event, Piece))


def test_greedy_answers_are_the_same_streamed_and_whole(runner, policies):
    served, plain = policies

    async def both():
        asked = [ask(str(i), f"word {i}", stream=i % 2 == 0) for i in range(4)]
        return (
            await asyncio.gather(*(events_of(served, one) for one in asked)),
            await asyncio.gather(*(events_of(plain, one) for one in asked)),
        )

    ours, theirs = runner.run(both())
    assert [text(events) for events in ours] == [text(events) for events in theirs]
    assert len({text(events) for events in ours}) > 1
    for one, other in zip(ours, theirs, strict=True):
        assert isinstance(one[0], Began) and one[0].prompt_tokens == other[0].prompt_tokens
        assert one[-1] == other[-1] and isinstance(one[-1], Ended)
    assert served.tokens == 0 and served.running == 0


def test_the_likeliest_tokens_are_told_at_temperature_1_whatever_is_cut(runner, policies):
    served, plain = policies
    options = {"logprobs": True, "top": 3, "max_tokens": 4}
    found = [
        [one for event in runner.run(events_of(policy, ask("l", **options))) if isinstance(event, Piece)
         for one in event.tokens]
        for policy in policies
    ]  # fmt: skip
    for one, other in zip(*found, strict=True):
        assert one.text == other.text and one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-3)
    narrow = runner.run(events_of(served, ask("n", temperature=1.0, top_p=0.0, max_tokens=8)))
    assert text(narrow) == text(runner.run(events_of(plain, ask("g", max_tokens=8))))


def test_a_client_that_leaves_frees_its_reply(runner, policies):
    served, _ = policies

    async def leave():
        wanted = ask("long", max_tokens=100, stream=True, temperature=1.0)
        async with aclosing(served.answer(wanted)) as answer:
            async for _ in answer:
                break
        assert served.running == 0 and served.tokens == 0
        assert served.sampled - before < 100
        return await events_of(served, ask("next"))

    before = served.sampled
    assert text(runner.run(leave()))


def test_what_the_context_cannot_hold_is_refused(runner, policies):
    [refused] = runner.run(events_of(policies[0], ask("r", max_tokens=CONTEXT)))
    assert isinstance(refused, Refused) and refused.code == "context_length_exceeded"


def test_weights_of_nan_are_refused(folder, hardware, runner, tmp_path):
    shutil.copytree(folder, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    save_file({k: v * math.nan for k, v in load_file(path).items()}, path, {"format": "pt"})

    async def probed():
        bad = await _apart(lambda: held(str(tmp_path / "bad"), hardware, "vllm"))
        try:
            await bad.probe("Hello")
        finally:
            await bad.retire()

    with pytest.raises(ModelError, match="answer"):
        runner.run(probed())


class Uncounted:
    """A metric that nobody reads."""

    def inc(self, *_, **__):
        pass

    set = observe = inc


def saved(run, step, model):
    def write(to):
        shutil.copytree(model, to, dirs_exist_ok=True)

    checkpoint.save(run / "checkpoints", step, write, meta={"version": step, "results": {}}, keep=9)


def test_a_newer_checkpoint_is_taken_over_while_requests_are_answered(folder, other, runner, tmp_path):
    run = Path(tmp_path / "shop")
    run.mkdir()
    settings = [
        f"model.name={folder}",
        "model.threads=1",
        "model.device=cpu",
        f"rollout.max_context={CONTEXT}",
    ]
    (run / "config.toml").write_text(load_config(None, settings).to_toml(), encoding="utf-8")
    saved(run, 1, folder)
    replica = PolicyReplica(
        ServeSettings(
            source=str(run), policy=PolicySettings(slots=4, engine="vllm"),
            swap=SwapSettings(poll_seconds=0.1),
        ),
        Meters(lambda metric: Uncounted()),
    )  # fmt: skip
    answered = []

    async def client(number, over):
        while not over.is_set():
            events = await events_of(replica, ask(f"{number}-{len(answered)}", "word", max_tokens=40))
            assert isinstance(events[-1], Ended), "a request failed"
            answered.append((events[0].version, text(events)))

    async def play():
        await replica.start()
        over = asyncio.Event()
        clients = [asyncio.create_task(client(number, over)) for number in range(3)]
        try:
            first = await replica.status()
            await asyncio.to_thread(saved, run, 2, other)
            count = len(answered)
            async with asyncio.timeout(120):
                while (now := await replica.status())["version"] == first["version"]:
                    assert not now["problem"]
                    assert not any(one.done() for one in clients)
                    await asyncio.sleep(0.02)
                assert len(answered) > count, "nobody was answered while the newer one was loaded"
                count = len(answered)
                while len(answered) < count + 6:
                    await asyncio.sleep(0.02)
            over.set()
            await asyncio.gather(*clients)
        finally:
            for one in (*clients, replica._watch):
                one.cancel()
            await replica._held.retire()
        return first["version"], now["version"]

    before, after = runner.run(play())
    assert after.startswith("step-00000002")
    texts = {version: {said for under, said in answered if under == version} for version in (before, after)}
    assert {version for version, _ in answered} == {before, after}
    assert all(len(said) == 1 for said in texts.values()), "an answer is of one version"
    assert texts[before] != texts[after]
