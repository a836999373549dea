"""Served conversations: what of them is written down, and how it is learned from."""

from __future__ import annotations

import asyncio
import json
import os
import re
import string
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.config import Config, RolloutConfig
from stateset_ray.environments.base import build_environment, has_expert
from stateset_ray.environments.transcripts import Transcripts
from stateset_ray.errors import ConfigError
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.rollout import rollout
from stateset_ray.serving.events import Ask, Began, Ended, Piece
from stateset_ray.serving.settings import ServeSettings, TranscriptSettings
from stateset_ray.serving.transcript_log import SampledPolicies, TranscriptLog
from stateset_ray.types import Message, ToolCall

ROOT = Path(__file__).parents[3]
SECRET = "sk-ssr-AbCdEf0123456789"


class Scripted:
    """Policies that say the same to everybody; implements `Policies`."""

    def __init__(self, *pieces: str, broken: bool = False) -> None:
        self.pieces = pieces
        self.broken = broken

    async def ask(self, ask):
        yield (Began("step-00000001-abcd", 3),)
        for piece in self.pieces:
            yield tuple(Piece(choice, piece) for choice in range(ask.choices))
        if self.broken:
            raise RuntimeError
        yield tuple(Ended(choice, "stop", 4) for choice in range(ask.choices))

    async def status(self):
        return {}

    async def statuses(self):
        return []


def asked(text="hi", **more):
    fields = {"id": "r1", "tenant": "shop", "session": "", "messages": (Message("user", text),),
              "max_tokens": 9, "temperature": 0.5, "seed": 1}  # fmt: skip
    return Ask(**fields | more)


@pytest.fixture
def log(tmp_path, meters):
    def made(**settings):
        fields = {"folder": tmp_path / "log", "share": 1.0} | settings
        return TranscriptLog(TranscriptSettings(**fields), meters)

    return made


def lines(folder):
    return [json.loads(line) for path in sorted(folder.glob("*")) for line in path.read_text().splitlines()]


async def served(policies, log, *asks):
    sampled = SampledPolicies(policies, log)
    for ask in asks:
        async for _ in sampled.ask(ask):
            pass
    await log.written()


def test_nothing_is_written_unless_it_is_asked_for():
    assert ServeSettings(source="tiny").transcripts.folder is None


def test_a_line_of_json_for_each_answer(log, tmp_path, recorders):
    messages = (Message("system", "Be kind."), Message("user", "hi"))
    asyncio.run(served(Scripted("Hel", "lo"), log(), asked(messages=messages, session="s", choices=2)))
    [line] = lines(tmp_path / "log")
    assert line["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    assert line["replies"] == [{"content": "Hello", "finish": "stop", "tokens": 4}] * 2
    assert (line["version"], line["key"], line["session"]) == ("step-00000001-abcd", "shop", "s")
    assert recorders["transcripts"].counted == {("written",): 1}
    [file] = (tmp_path / "log").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert file.parent.stat().st_mode & 0o077 == 0


def test_personal_data_and_keys_are_kept_out(log, tmp_path):
    text = f"mail jo@shop.example, card 4111 1111 1111 1111, key {SECRET}, Bearer {SECRET}"
    call = Message("assistant", text, (ToolCall("lookup", {"mail": "jo@shop.example"}),))
    messages = (Message("user", text), call, Message("user", "and?"))
    asyncio.run(served(Scripted("write to ", "jo@shop.example"), log(), asked(messages=messages)))
    asyncio.run(served(Scripted(f"it is {SECRET}"), log(redact=False), asked(messages=messages)))
    first, second = lines(tmp_path / "log")
    assert "[card]" in first["messages"][0]["content"]
    for word in ("jo@shop.example", "4111", SECRET):
        assert word not in json.dumps(first)
    assert first["messages"][1]["tool_calls"] == [{"name": "lookup", "arguments": {"mail": "[email]"}}]
    assert first["replies"][0]["content"] == "write to [email]"  # cut in the middle by the stream
    assert "jo@shop.example" in json.dumps(second)
    assert SECRET not in json.dumps(second)


@given(
    st.from_regex(r"[a-z]{1,9}@[a-z]{1,9}\.example", fullmatch=True), st.text(string.printable, max_size=40)
)
def test_no_address_gets_into_a_line(address, around):
    log = TranscriptLog.__new__(TranscriptLog)  # only how a line is made
    log._settings = TranscriptSettings(share=1.0)
    line = log._line(asked(f"{around} {address}"), "v", [f"{address} {around}"], [Ended(0, "stop", 1)])
    assert address not in line
    assert line.count("\n") == 0


def test_whole_conversations_are_sampled(log):
    found = log(share=0.3)
    sampled = {f"s{n}" for n in range(2000) if found.samples(asked(session=f"s{n}"))}
    assert 0.25 < len(sampled) / 2000 < 0.35
    assert all(found.samples(asked(session=name, id="another")) for name in sampled)


def test_what_was_asked_with_tools_of_the_client_is_not_in_the_sample(log):
    found = log()
    assert found.samples(asked())
    assert not found.samples(asked(tools='[{"type": "function"}]'))
    assert not found.samples(asked(prompt="Once"))


def test_what_was_not_completed_is_not_written(log, tmp_path):
    async def play():
        found = log()
        with pytest.raises(RuntimeError):
            await served(Scripted("a", broken=True), found, asked())
        left = SampledPolicies(Scripted("a", "b"), found).ask(asked())
        await anext(left)
        await left.aclose()
        await found.written()

    asyncio.run(play())
    assert lines(tmp_path / "log") == []


def test_files_are_bounded_in_size_and_number(log, tmp_path):
    asks = [asked("x" * 300, id=f"r{number}") for number in range(40)]
    found = log(file_bytes=1500, files=3)

    async def play():
        for ask in asks:  # one at a time: each is written before the next comes
            await served(Scripted("y"), found, ask)

    asyncio.run(play())
    files = sorted((tmp_path / "log").iterdir())
    assert len(files) == 3
    assert all(file.stat().st_size <= 1500 for file in files)
    assert lines(tmp_path / "log")[-1]["request"] == "r39"


def test_a_folder_that_cannot_be_written_costs_no_answer(log, tmp_path, recorders):
    async def play():
        found = log()
        (tmp_path / "log").rmdir()
        (tmp_path / "log").write_text("")  # no folder any more
        await served(Scripted("a"), found, asked())
        (tmp_path / "log").unlink()
        (tmp_path / "log").mkdir()
        await served(Scripted("a"), found, asked())

    asyncio.run(play())
    assert recorders["transcripts"].counted == {("dropped",): 1, ("written",): 1}


def test_a_folder_that_cannot_be_made_is_said_at_the_start(log, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        log(folder=tmp_path / "file" / "log")


def test_a_disk_that_hangs_does_not_fill_the_memory(log, recorders):
    async def play():
        found = log()
        release = asyncio.Event()
        found._writing = asyncio.create_task(release.wait())
        await asyncio.gather(*(anext(aiter_last(found, number)) for number in range(300)))
        assert len(found._waiting) == 256
        release.set()

    async def aiter_last(found, number):
        async for _ in SampledPolicies(Scripted("a"), found).ask(asked(id=str(number))):
            pass
        yield

    asyncio.run(play())
    assert recorders["transcripts"].counted == {("dropped",): 44}


# As tasks


@pytest.fixture
def logged(log, tmp_path):
    """Twelve conversations of two turns, as an endpoint logs them; one line for each turn."""

    async def play():
        found = log()
        for number in range(12):
            opening = (Message("system", "s"), Message("user", f"question {number}"))
            await served(Scripted(f"answer {number}"), found, asked(messages=opening, session=str(number)))
            more = (*opening, Message("assistant", f"answer {number}"), Message("user", "and then?"))
            await served(Scripted("goodbye"), found, asked(messages=more, session=str(number)))

    asyncio.run(play())
    return str(tmp_path / "log")


def test_logged_conversations_are_replayed_by_the_expert(logged, renderer):
    """The real inner loop, as warm start plays it."""
    environment = build_environment("stateset_ray.environments.transcripts:Transcripts", {"path": logged})
    assert has_expert(environment)
    limits = RolloutConfig(max_turns=3, max_turn_tokens=60, max_context=512)
    seen = set()
    for index in range(12):
        task = environment.task("train", index)
        policy = ScriptedPolicy(renderer, lambda _: environment.expert())
        played = asyncio.run(
            rollout(environment, task, policy, renderer, limits, id="r", seed=1, temperature=1.0)
        )
        assert (played.stop_reason, len(played.turns)) == ("completed", 2)
        assert played.reward == pytest.approx(1.0)
        words = [m.content for m in played.messages]
        assert words[2] == words[1].replace("question", "answer")
        assert words[3:] == ["and then?", "goodbye"]
        seen.add(words[1])
    held = {environment.task("heldout", n).data["conversation"] for n in range(12)}
    trained = {environment.task("train", n).data["conversation"] for n in range(30)}
    assert not held & trained or len(held | trained) == 12
    assert len(seen) == len(trained)


def test_a_reply_earns_what_it_shares_with_the_logged_one(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}],
                                "replies": [{"content": "Good morning, Jo!"}]}))  # fmt: skip
    for reply, reward in (("good morning, jo!", 1.0), ("Good night", 2 / 7), ("", 0.0), ("x " * 99, 0.0)):
        environment = Transcripts(str(path))
        opening = asyncio.run(environment.reset(environment.task("heldout", 0), 0))
        assert opening.messages == (Message("user", "hi"),)
        step = asyncio.run(environment.step(Message("assistant", reply)))
        assert step.terminated
        assert step.reward == pytest.approx(reward)


def test_each_round_brings_every_conversation_once(logged):
    environment = Transcripts(logged)
    train = [n for n, (held, _) in enumerate(environment._conversations) if not held]
    size = len(train)
    drawn = [environment.task("train", i).data["conversation"] for i in range(2 * size)]
    rounds = drawn[:size], drawn[size:]
    assert sorted(rounds[0]) == sorted(rounds[1]) == train
    assert rounds[0] != rounds[1]
    assert Transcripts(logged).task("train", 5) == environment.task("train", 5)


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"messages": [], "replies": []}',
             '{"messages": 3, "replies": [{"content": "x"}]}',
             '{"messages": [{"role": "root", "content": "x"}], "replies": [{"content": "x"}]}',
             '{"messages": [{"role": "user", "content": 5}], "replies": [{"content": "x"}]}'],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        Transcripts(str(path))


def test_what_cannot_be_played_is_left_out(tmp_path):
    def write(*talks):
        path = tmp_path / f"{os.urandom(4).hex()}.jsonl"
        path.write_text("\n".join(json.dumps(
            {"messages": [{"role": r, "content": c} for r, c in talk], "replies": [{"content": reply}],
             "version": version}) for talk, reply, version in talks))  # fmt: skip
        return str(path)

    good = ([("user", "a")], "b", "step-00000002-x")
    silent = ([("user", "a")], "  ", "step-00000002-x")
    twice = ([("user", "a"), ("assistant", "b")], "c", "step-00000002-x")
    first = ([("assistant", "hello"), ("user", "a")], "c", "step-00000002-x")
    older = ([("user", "z")], "b", "step-00000001-x")
    assert len(Transcripts(write(good, silent, twice, first, older))._conversations) == 2
    assert len(Transcripts(write(good, older), versions="step-00000002")._conversations) == 1
    with pytest.raises(ConfigError, match="no conversations"):
        Transcripts(write(silent, twice, first))
    with pytest.raises(ConfigError, match="cannot be read"):
        Transcripts(str(tmp_path / "none.jsonl"))


def test_what_was_cut_is_no_example_and_nor_is_what_was_said_after_it(tmp_path):
    def record(*said, finish="stop", stops=(), version="v1"):
        roles = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
        *messages, reply = roles
        replies = [{"content": reply["content"], "finish": finish}]
        return {"messages": messages, "replies": replies, "stops": list(stops), "version": version}

    path = tmp_path / "log.jsonl"
    records = [
        record("a", "whole"), record("b", "hal", finish="length"), record("c", "ha", stops=["l"]),
        record("c", "ha", "go on", "lf"), record("a", "whole", "and", "mo", finish="length"),
        record("d", "hal", finish="length", version="v0"), record("d", "hal", "go on", "f"),
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, records)))
    found = Transcripts(str(path), versions="v1")._conversations
    assert [[m.content for m in talk] for _, talk in found] == [["a", "whole"]]


def test_stop_strings_of_the_client_stand_in_the_line(log, tmp_path):
    asyncio.run(served(Scripted("Hel"), log(), asked(stops=("lo", "jo@shop.example"))))
    assert lines(tmp_path / "log")[0]["stops"] == ["lo", "[email]"]


def test_the_configuration_in_the_document_is_one(logged):
    [text] = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    config = Config.model_validate(tomllib.loads(text))
    assert config.train.warm_start.steps == 20
    options = {**config.environment.options, "path": logged, "versions": ""}
    assert len(build_environment(config.environment.path, options)._conversations) == 12
