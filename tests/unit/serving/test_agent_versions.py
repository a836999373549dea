"""An agent beside what else an endpoint does: a canary, and the log of transcripts."""

from __future__ import annotations

import asyncio
import json
import runpy
from contextlib import aclosing
from pathlib import Path

import pytest

from stateset_ray.environments.tools import Tool, Toolbox
from stateset_ray.environments.transcripts import Transcripts
from stateset_ray.serving import release
from stateset_ray.serving.agent import acted
from stateset_ray.serving.agent_tools import Tools
from stateset_ray.serving.audit import Audit
from stateset_ray.serving.events import Ask, Began, Ended, Piece, Stepped
from stateset_ray.serving.replica import PolicyReplica
from stateset_ray.serving.settings import (
    AgentSettings,
    PolicySettings,
    ServeSettings,
    SwapSettings,
    TranscriptSettings,
)
from stateset_ray.serving.transcript_log import SampledPolicies, TranscriptLog
from stateset_ray.types import Message, ToolCall

SETTINGS = AgentSettings(enabled=True)
ONE, TWO = "step-00000001", "step-00000002"
save = runpy.run_path(str(Path(__file__).with_name("support_checkpoints.py")))["save"]


class Shop(Toolbox):
    system = "Work."
    tools = (Tool("lookup", "", {"order": "N"}),)

    def call(self, call, caller):
        return f"order {call.arguments['order']}: on its way to jo@shop.example"


class Twice(Shop):
    """Whatever they say, the first two replies are calls: a model of random weights makes none by itself."""

    left = 2

    def call(self, call, caller):
        return "sent"

    def read(self, text):
        self.left -= 1
        return ToolCall("lookup", {"order": str(self.left)}) if self.left >= 0 else None


def tools(box, meters):
    return Tools(box, SETTINGS, meters, Audit(None, arguments=True))


def question(number=0, **more):
    fields = {"max_tokens": 9, "temperature": 0.0, "seed": 5} | more
    messages = (Message("system", "Work."), Message("user", "Where is my order 48213?"))
    return Ask(f"a{number}", "shop", fields.pop("session", ""), messages, **fields)


async def played(answered, box, ask):
    async with aclosing(acted(ask, answered, box, SETTINGS, "req-1")) as made:
        return [event async for events in made for event in events]


@pytest.fixture
def replica(run, meters):
    """Half of the conversations fall to its canary."""
    release.pin(run, ONE)
    save(run, 2, 1.1)
    release.start_canary(run, TWO, 0.5)
    policy, swap = PolicySettings(slots=4, threads=1), SwapSettings(poll_seconds=0.0)
    return PolicyReplica(ServeSettings(source=str(run), policy=policy, swap=swap), meters)


@pytest.mark.parametrize("named", [True, False])
def test_all_turns_of_an_agent_are_of_one_version(replica, meters, named):
    async def play():
        await replica.start()
        found = []
        for number in range(12):
            # A reply that is stopped at once, by whatever it begins with, is whole.
            stops = (*map(chr, range(32, 127)), "\n", "\t", "\ufffd")
            ask = question(number, session=f"s{number}" if named else "", stops=stops)
            events = await played(replica.answer, tools(Twice(), meters), ask)
            versions = {event.version[: len(ONE)] for event in events if isinstance(event, Began | Stepped)}
            found.append((versions, sum(isinstance(event, Stepped) for event in events)))
        return found

    found = asyncio.run(play())
    assert all(len(versions) == 1 for versions, _ in found), found
    assert {steps for _, steps in found} == {2}
    assert {version for versions, _ in found for version in versions} == {ONE, TWO}
    if named:
        for number, (versions, _) in enumerate(found):
            assert versions == {TWO if release.falls_to(TWO, 0.5, f"s{number}") else ONE}


def test_an_agents_calls_and_answer_are_one_conversation_to_learn_from(meters, tmp_path):
    replies = ["CALL lookup order=48213", "It is on its way."]

    class Scripted:
        async def ask(self, _):
            text = replies.pop(0)
            yield (Began("step-00000007-ab", 10), Piece(0, text), Ended(0, "stop", 4))

        async def status(self):
            return {}

        async def statuses(self):
            return []

    async def play():
        log = TranscriptLog(TranscriptSettings(folder=tmp_path / "log", share=1.0), meters)
        sampled = SampledPolicies(Scripted(), log)
        await played(sampled.ask, tools(Shop(), meters), question())
        await log.written()

    asyncio.run(play())
    [file] = (tmp_path / "log").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    [session] = {line["session"] for line in lines}
    assert session, "it is sampled by its name, and so as a whole"
    assert [len(line["messages"]) for line in lines] == [2, 4]
    assert "jo@shop.example" not in file.read_text()

    async def replayed():
        environment = Transcripts(str(tmp_path / "log"), "step-00000007")
        first = await environment.reset(environment.task("train", 0), 0)
        call = environment.expert()
        second = await environment.step(Message("assistant", call))
        answer = environment.expert()
        end = await environment.step(Message("assistant", answer))
        return [m.role for m in first.messages], call, second.messages, answer, end.terminated

    roles, call, told, answer, over = asyncio.run(replayed())
    assert (roles, call, answer, over) == (
        ["system", "user"], "CALL lookup order=48213", "It is on its way.", True
    )  # fmt: skip
    assert told == (Message("tool", "order 48213: on its way to [email]"),)
