"""The policy with tools: it sees what it saw in training; what it does is limited and written down."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import runpy
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from stateset_ray.config import RolloutConfig
from stateset_ray.environments.customer_service import CustomerService
from stateset_ray.environments.echo import Echo
from stateset_ray.environments.tools import Tool, Toolbox
from stateset_ray.errors import ConfigError
from stateset_ray.models import load_model
from stateset_ray.policies.base import Reply
from stateset_ray.policies.nucleus import Sampled
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.rollout import rollout
from stateset_ray.serving.agent import acted
from stateset_ray.serving.agent_tools import Tools, load_tools
from stateset_ray.serving.audit import Audit
from stateset_ray.serving.events import Ask, Began, Ended, Halted, Piece, Stepped
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.held_policy import load_policy
from stateset_ray.serving.ingress import drained
from stateset_ray.serving.lines import append_line
from stateset_ray.serving.settings import AgentSettings, ServeSettings
from stateset_ray.serving.source import Candidate
from stateset_ray.types import Message

_SUPPORT = runpy.run_path(str(Path(__file__).with_name("support_endpoint.py")))
AGENT, KEY, SETTINGS = (_SUPPORT[name] for name in ("AGENT", "KEY", "SETTINGS"))
client, raw = _SUPPORT["client"], _SUPPORT["raw"]
_RUNS = runpy.run_path(str(Path(__file__).with_name("support_checkpoints.py")))
SHOP = "stateset_ray.environments.customer_service:CustomerService"
LIMITS = RolloutConfig(max_turns=6, max_turn_tokens=12, max_context=512, on_cut_reply="close")


@pytest.fixture
def shop_run(tmp_path):
    more = [f"environment.path={SHOP}", "rollout.max_turn_tokens=12"]
    return _RUNS["new_run"](tmp_path / "shop", 512, *more)


@pytest.fixture
def held(hardware, endpoint):
    return load_policy(Candidate("tiny", "tiny-1", -1), SETTINGS, hardware, 512, None)


@pytest.fixture
def settings(shop_run):
    def made(**agent) -> ServeSettings:
        more = {"source": str(shop_run), "agent": AgentSettings(enabled=True, **agent)}
        return SETTINGS.model_copy(update=more)

    return made


def acting(reply: Callable, renderer, calls: dict[int, str]) -> Callable:
    """An engine's `reply` whose k-th turn is one of these calls, as a model may well write it: with space
    around it that its text does not have, so that ids made from the text would be others."""

    async def answer(request, on_token=None, **more):
        turn = sum(message.role == "assistant" for message in request.messages)
        if turn not in calls:
            return await (reply(request, on_token, **more) if on_token else reply(request))
        ids = (*renderer._encode(f"  {calls[turn]} "), next(iter(renderer.stop_ids)))
        for token in ids:
            if on_token is not None:
                on_token(Sampled(token, -0.5))
        return Reply(ids, (-0.5,) * len(ids), 0, "stop")

    return answer


def agent(gate):
    """OpenAI's client; the base URL is all that it needs to know of agents."""
    return client(gate, AGENT, "/agent")


class Noting:
    """A policy for rollouts, around an engine."""

    def __init__(self, engine, reply):
        self.reply, self.release = reply, engine.release


def number_of(task) -> str:
    shop = CustomerService()
    asyncio.run(shop.reset(task, 0))
    return shop._case.order.number


def test_train_serve_identity_with_tools(make, settings, policies, hardware):
    """The same conversation with the same tools: the same ids, results and greedy replies, call by call."""
    environment = CustomerService()
    task = environment.task("heldout", 0)
    renderer, number = policies.held.renderer, number_of(task)
    calls = {0: f"CALL lookup order=#{number}.", 2: "CALL lookup"}
    engine = TransformersEngine(
        load_model("tiny", hardware), renderer.stop_ids, slots=2, max_context=512, hardware=hardware
    )
    trained = Noting(engine, acting(engine.reply, renderer, calls))
    prompts = []
    served_by = acting(policies.held.engine.reply, renderer, calls)

    async def noted(request, *rest, **more):
        prompts.append(request.prompt_ids)
        return await served_by(request, *rest, **more)

    policies.held.engine.reply = noted

    async def play():
        played = await rollout(environment, task, trained, renderer, LIMITS, id="r", seed=1, temperature=0.0)
        messages = [{"role": m.role, "content": m.content} for m in played.messages]
        assert [m["role"] for m in messages].count("tool") >= 2
        ai = agent(make(settings()))
        talk = []
        while len(talk) < len(messages) - 1:  # the system prompt is the server's
            assert messages[len(talk) + 1]["role"] == "user"
            talk.append(messages[len(talk) + 1])
            answer = await ai.chat.completions.create(
                model="shop", messages=talk, temperature=0, prompt_cache_key="c"
            )
            for step in answer.steps:
                talk += step["messages"]
            talk.append({"role": "assistant", "content": answer.choices[0].message.content})
            assert talk == messages[1 : len(talk) + 1]
        assert prompts == list(played.prompts())
        await engine.close()

    asyncio.run(play())


def test_openais_client_is_told_what_was_done(make, settings, policies):
    number = number_of(CustomerService().task("heldout", 0))
    held = policies.held
    held.engine.reply = acting(held.engine.reply, held.renderer, {0: f"CALL lookup order={number}"})
    asked = {"model": "shop", "messages": [{"role": "user", "content": "Where is it?"}], "seed": 3}

    async def play():
        ai = agent(make(settings()))
        whole = await ai.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        [step] = whole.steps
        assert (step["tool"], step["arguments"], step["outcome"]) == ("lookup", {"order": number}, "done")
        assert step["messages"][0] == {"role": "assistant", "content": f"CALL lookup order={number}"}
        assert step["messages"][1]["content"].startswith(f"order {number}: ")
        assert (whole.stopped, step["version"], whole.system_fingerprint) == (None, "tiny-1", "tiny-1")
        assert whole.choices[0].message.role == "assistant"
        tokens = whole.choices[0].logprobs.content
        call = len(held.renderer._encode(f"  CALL lookup order={number} ")) + 1
        assert whole.usage.completion_tokens == len(tokens) + call
        assert len(tokens) <= 12  # the run's rollout.max_turn_tokens
        stream = await ai.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage == whole.usage
        steps = [s for c in chunks for s in (c.model_extra or {}).get("steps", [])]
        assert [s["messages"] for s in steps] == [step["messages"]]
        said = [c.choices[0] for c in chunks if c.choices]
        assert "".join(c.delta.content or "" for c in said) == whole.choices[0].message.content
        assert said[-1].finish_reason == whole.choices[0].finish_reason

    asyncio.run(play())


def test_the_agent_has_a_scope_of_its_own(make, settings):
    asked = {"model": "shop", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

    async def play():
        for made, status in ((settings(), 200), (SETTINGS, 404)):
            gate = make(made)
            async with raw(gate, AGENT) as web:
                for method, path in (("POST", "chat/completions"), ("GET", "tools")):
                    answer = await web.request(method, f"/v1/agent/{path}", json=asked)
                    assert answer.status_code == status
            async with raw(gate, KEY) as web:
                for path in ("/v1/agent/chat/completions", "/v1/agent/tools", "/v1/agent", "/v1/agent/x"):
                    answer = await web.post(path, json=asked)
                    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "scope_missing")

    asyncio.run(play())


def test_a_limit_of_replies_below_the_runs_is_the_agents(make, settings, policies):
    """`rollout.max_turn_tokens` is 12; a client that names no limit must not be told that it is over one."""
    policies.held.max_reply = 5
    policy = SETTINGS.policy.model_copy(update={"max_reply_tokens": 5})

    async def play():
        gate = make(settings(turns=2).model_copy(update={"policy": policy}))
        answer = await agent(gate).chat.completions.create(
            model="shop", messages=[{"role": "user", "content": "hi"}]
        )
        assert 0 < answer.usage.completion_tokens <= 5

    asyncio.run(play())


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"messages": [{"role": "system", "content": "Obey."}, {"role": "user", "content": "hi"}]},
         "invalid_messages", "messages[0].role"),
        ({"messages": [{"role": "developer", "content": "Obey."}, {"role": "user", "content": "hi"}]},
         "invalid_messages", "messages[0].role"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"tool_choice": "none"}, "unsupported_parameter", "tool_choice"),
        ({"stop": "x"}, "unsupported_parameter", "stop"),
        ({"model": "tiny"}, "model_not_found", "model"),
        ({"max_tokens": 1000}, "context_length_exceeded", "max_tokens"),
    ],
)  # fmt: skip
def test_what_an_agent_does_not_take(make, settings, more, code, param):
    async def play():
        with pytest.raises(openai.APIStatusError) as caught:
            await agent(make(settings())).chat.completions.create(
                **{"model": "shop", "messages": [{"role": "user", "content": "hi"}]} | more
            )
        assert (caught.value.code, caught.value.param) == (code, param)

    asyncio.run(play())


def test_only_tools_that_are_allowed_are_offered_and_called(make, settings, policies):
    number = number_of(CustomerService().task("heldout", 0))
    held = policies.held
    calls = {0: f"CALL cancel order={number}", 1: f"CALL lookup order={number}"}
    held.engine.reply = acting(held.engine.reply, held.renderer, calls)

    async def play():
        gate = make(settings(tools=("lookup",)))
        async with raw(gate, AGENT) as web:
            offered = (await web.get("/v1/agent/tools")).json()["data"]
        assert offered == [{"name": "lookup", "description": "", "parameters": {"order": "N"}}]
        answer = await agent(gate).chat.completions.create(
            model="shop", messages=[{"role": "user", "content": "Cancel it!"}]
        )
        assert [step["outcome"] for step in answer.steps] == ["not allowed", "done"]
        assert answer.steps[0]["messages"][1]["content"] == "error: no tool cancel; use lookup"
        assert "cancelled" not in answer.steps[1]["messages"][1]["content"]

    asyncio.run(play())
    with pytest.raises(ConfigError, match="does not offer"):
        make(settings(tools=("lookup", "refnd")))


def test_what_has_no_tools_is_no_agent(run):
    with pytest.raises(ConfigError, match="offers no tools"):
        load_tools(ServeSettings(source=str(run), agent=AgentSettings(enabled=True)))
    with pytest.raises(ConfigError, match="Echo offers no tools"):
        Echo().toolbox(Echo().task("train", 0))


class Bench(Toolbox):
    """Tools that do what tests need."""

    system = "Work."
    tools = (
        *(Tool(name) for name in ("ok", "fails", "number", "half", "long", "hangs")),
        Tool("say", "", {"x": "X"}),
    )

    def __init__(self):
        self.open = threading.Event()
        self.called = []

    def call(self, call, caller):
        self.called.append((call.name, caller))
        if call.name == "hangs":
            self.open.wait(30)
        return {
            "ok": "fine", "number": 7, "half": "a\ud800b", "long": "x" * 99, "hangs": "late", "say": "said",
            "fails": None,
        }[call.name] or 1 / 0  # fmt: skip


class AsyncBench(Bench):
    async def call(self, call, caller):
        if call.name == "hangs":
            await asyncio.get_running_loop().run_in_executor(None, self.open.wait, 30)
        return Bench.call(self, call, caller)


def step(text):
    return Stepped("", "", (Message("assistant", text), Message("tool", "")), "v1", 3, 0.0)


def written(file):
    """The lines of an audit file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def tools(bench, meters, audit=None, **more):
    audit = audit or Audit(None, arguments=True)
    return Tools(bench, AgentSettings(enabled=True, **{"result_chars": 20} | more), meters, audit)


@pytest.mark.parametrize("kind", [Bench, AsyncBench])
@pytest.mark.parametrize(
    ("text", "outcome", "told"),
    [
        ("CALL ok", "done", "fine"),
        ("CALL fails", "failed", "error: the tool failed"),
        ("CALL number", "failed", "error: the tool failed"),
        ("CALL half", "done", "a?b"),
        ("CALL long", "done", "x" * 20),
        (
            "CALL nothing",
            "malformed",
            "error: no tool nothing; use ok, fails, number, half, long, hangs, say",
        ),
        ("CALL ok x=1", "malformed", "error: ok does not take that; write CALL ok"),
        ("CALL ok\nCALL ok", "malformed", "error: more than one call; make one call a reply"),
    ],
)
def test_whatever_a_tool_does_the_policy_is_told_text(meters, recorders, kind, text, outcome, told):
    done = asyncio.run(tools(kind(), meters).take(step(text), request="r", caller="shop", seconds=9))
    assert (done.outcome, done.messages[1]) == (outcome, Message("tool", told))
    assert done.messages[0].content == text
    name = text.split()[1] if outcome != "malformed" else "other"
    assert recorders["tool_calls"].counted == {(name, outcome): 1}


@pytest.mark.parametrize("kind", [Bench, AsyncBench])
@pytest.mark.parametrize(
    "error", [SystemExit(2), KeyboardInterrupt(), StopIteration(), asyncio.CancelledError(), ValueError()]
)
def test_whatever_a_tool_raises_is_its_failure(meters, tmp_path, kind, error):
    """Some of it would end the event loop, or the request without a line, or never come out of a thread."""
    file = tmp_path / "audit.jsonl"

    class Raising(kind):
        def call(self, call, caller):
            raise error

    class AsyncRaising(kind):
        async def call(self, call, caller):
            await asyncio.sleep(0)
            raise error

    async def play():
        box = tools((AsyncRaising if kind is AsyncBench else Raising)(), meters, Audit(file, arguments=True))
        return await box.take(step("CALL ok"), request="r", caller="s", seconds=9)

    done = asyncio.run(play())
    assert (done.outcome, done.messages[1].content) == ("failed", "error: the tool failed")
    begun, line = written(file)
    assert begun["outcome"] == "begun"
    # Python itself makes another error of it where a coroutine raises it.
    wanted = (
        "RuntimeError" if kind is AsyncBench and isinstance(error, StopIteration) else type(error).__name__
    )
    assert (line["outcome"], line["problem"]) == ("failed", wanted)


def test_a_call_that_is_cancelled_from_outside_is(meters):
    async def play():
        bench = AsyncBench()
        box = tools(bench, meters)
        task = asyncio.create_task(box.take(step("CALL hangs"), request="r", caller="s", seconds=9))
        while not box.under_way:
            await asyncio.sleep(0)
        [call] = box._under_way
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(task, return_exceptions=True)
        bench.open.set()
        assert call.cancelled()

    asyncio.run(play())


def test_a_reply_without_a_call_is_the_answer(meters):
    assert asyncio.run(tools(Bench(), meters).take(step("ok!"), request="r", caller="s", seconds=9)) is None


@pytest.mark.parametrize("kind", [Bench, AsyncBench])
def test_a_tool_that_hangs_is_given_up_and_holds_no_other(meters, kind):
    """One thread is held for good; with the others calls go on, and where there is none they wait in vain."""
    bench = kind()

    async def play():
        busy = tools(bench, meters, tool_seconds=0.1, tools_at_once=2)
        late = await busy.take(step("CALL hangs"), request="r", caller="s", seconds=9)
        assert (late.outcome, late.messages[1].content) == ("timeout", "error: the tool took too long")
        assert late.seconds >= 0.1
        fine = await busy.take(step("CALL ok"), request="r", caller="s", seconds=9)
        assert fine.outcome == "done"
        if kind is Bench:
            await busy.take(step("CALL hangs"), request="r", caller="s", seconds=9)
            none = await busy.take(step("CALL ok"), request="r", caller="s", seconds=9)
            assert none.outcome == "timeout"
        bench.open.set()

    try:
        asyncio.run(play())
    finally:
        bench.open.set()


def test_a_tool_that_will_not_be_cancelled_is_left_to_itself(meters, tmp_path):
    file, free = tmp_path / "audit.jsonl", threading.Event()

    class Stubborn(Bench):
        async def call(self, call, caller):
            while not free.is_set():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    self.called.append("cancelled")
            return "late"

    async def play():
        bench = Stubborn()
        box = tools(bench, meters, Audit(file, arguments=True), tool_seconds=0.1)
        late = await asyncio.wait_for(box.take(step("CALL ok"), request="r", caller="s", seconds=9), 20)
        left = list(bench.called), box.under_way
        free.set()
        return late.outcome, *left

    try:
        assert asyncio.run(play()) == ("timeout", ["cancelled"], 0)
    finally:
        free.set()
    assert [line["outcome"] for line in written(file)] == ["begun", "timeout"]


def test_a_tool_that_was_begun_ends_and_is_written_down_though_its_client_left(meters, tmp_path):
    bench, file = AsyncBench(), tmp_path / "audit.jsonl"

    async def play():
        box = tools(bench, meters, Audit(file, arguments=True))
        task = asyncio.create_task(box.take(step("CALL hangs"), request="r", caller="s", seconds=9))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert [line["outcome"] for line in written(file)] == ["begun"], "should this process die now"
        bench.open.set()
        await asyncio.gather(*box._under_way)

    asyncio.run(play())
    assert [line["outcome"] for line in written(file)] == ["begun", "done"]
    assert bench.called == [("hangs", "s")]


def test_who_leaves_cannot_gather_tools_that_run_on(meters):
    bench = AsyncBench()

    async def play():
        box = Tools(bench, AgentSettings(enabled=True), meters, Audit(None, arguments=True), per_caller=2)
        for _ in range(2):
            task = asyncio.create_task(box.take(step("CALL hangs"), request="r", caller="s", seconds=9))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(ApiError, match="too_many_requests") as caught:
            await box.take(step("CALL ok"), request="r", caller="s", seconds=9)
        assert caught.value.status == 429
        assert (await box.take(step("CALL ok"), request="r", caller="c", seconds=9)).outcome == "done"
        bench.open.set()
        while box.under_way:
            await asyncio.sleep(0)
        assert (await box.take(step("CALL ok"), request="r", caller="s", seconds=9)).outcome == "done"

    asyncio.run(play())


def test_a_drain_waits_for_a_tool_whose_client_left(meters):
    bench = AsyncBench()

    async def play():
        box = tools(bench, meters)
        task = asyncio.create_task(box.take(step("CALL hangs"), request="r", caller="c", seconds=9))
        while not box.under_way:
            await asyncio.sleep(0)
        task.cancel()
        left = await drained([lambda: box.under_way], 0)
        drain = asyncio.create_task(drained([lambda: box.under_way], 20))
        await asyncio.sleep(0)
        bench.open.set()
        return left, await drain, bench.called

    assert asyncio.run(play()) == (1, 0, [("hangs", "c")])


def test_an_agents_tools_are_among_what_a_drain_waits_for(make, settings):
    assert len(make(settings())._app.state.lasting) == 1
    assert not make(SETTINGS)._app.state.lasting


def test_every_call_is_written_down_without_personal_data(meters, tmp_path, caplog):
    bench, file = Bench(), tmp_path / "audit.jsonl"
    caplog.set_level(logging.INFO)
    logging.getLogger("ray.serve").propagate = True

    async def play(arguments):
        box = tools(bench, meters, Audit(file, arguments=arguments))
        for text in (
            'CALL say x="jo@shop.example 4111 1111 1111 1111"', "CALL fails", "CALL nobody x=1",
            f'CALL say x="{"x" * 190} 4111 1111 1111 1111"',
        ):  # fmt: skip
            await box.take(step(text), request="req-1", caller="shop", seconds=9)

    asyncio.run(play(True))
    lines = written(file)
    assert [(line["tool"], line["outcome"], line["problem"]) for line in lines] == [
        ("say", "begun", ""), ("say", "done", ""), ("fails", "begun", ""),
        ("fails", "failed", "ZeroDivisionError"), ("", "malformed", ""),
        ("say", "begun", ""), ("say", "done", ""),
    ]  # fmt: skip
    assert (
        lines[5]["arguments"] == lines[6]["arguments"] == {"x": f"{'x' * 190} [card]"}
    )  # 4111 1111 if it were cut before
    assert lines[0]["arguments"] == {"x": "[email] [card]"}
    assert {(line["request"], line["key"], line["version"]) for line in lines} == {("req-1", "shop", "v1")}
    assert all(line["seconds"] >= 0 and line["time"] for line in lines)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # Other tests may have left more than one way from the logger to here.
    assert len({id(record) for record in caplog.records if "tool call {" in record.getMessage()}) == 7
    assert "jo@" not in caplog.text
    file.unlink()
    asyncio.run(play(False))
    assert written(file)[0]["arguments"] == ["x"]


def test_an_audit_file_that_cannot_be_written_stops_nothing_and_is_told(meters, tmp_path, caplog):
    logging.getLogger("ray.serve").propagate = True
    box = tools(Bench(), meters, Audit(tmp_path / "none" / "audit", arguments=True))
    done = asyncio.run(box.take(step("CALL ok"), request="r", caller="s", seconds=9))
    assert done.outcome == "done"
    assert "audit file cannot be written" in caplog.text


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path, monkeypatch):
    file, write = tmp_path / "lines", os.write
    append_line(file, b"first")
    monkeypatch.setattr(os, "write", lambda handle, body: write(handle, body[:3]))
    with pytest.raises(OSError, match="No space left"):
        append_line(file, b"second")
    monkeypatch.setattr(os, "write", write)
    append_line(file, b"third")
    assert file.read_bytes() == b"first\nthird\n"
    assert file.stat().st_mode & 0o777 == 0o600


def scripted(*replies):
    """Answers in order; an error is raised, "..." never comes, and a text that ends in "-" is cut."""
    left, asked = list(replies), []

    async def answered(ask):
        asked.append(ask)
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        if reply == "...":
            await asyncio.Event().wait()
        finish = "length" if reply.endswith("-") else "stop"
        yield (Began("v1", 10), Piece(0, reply), Ended(0, finish, len(reply)))

    answered.asked = asked
    return answered


ASK = Ask("a", "shop", "", (Message("system", "Work."), Message("user", "go")), 9, 1.0, 5)


def play(answered, box, **more):
    async def all_of_it():
        made = acted(ASK, answered, box, AgentSettings(enabled=True, **more), "req-1")
        return [event async for events in made for event in events]

    return asyncio.run(all_of_it())


def test_the_loop_asks_again_with_what_the_tool_said(meters):
    bench, answered = Bench(), scripted("CALL ok", "CALL fails", "done")
    events = play(answered, tools(bench, meters))
    assert [type(event) for event in events] == [Began, Stepped, Began, Stepped, Began, Piece, Ended]
    assert bench.called == [("ok", "shop"), ("fails", "shop")]
    first, second, third = answered.asked
    assert second.messages == (*first.messages, Message("assistant", "CALL ok"), Message("tool", "fine"))
    assert third.messages[-1] == Message("tool", "error: the tool failed")
    assert len({ask.session for ask in answered.asked}) == 1 and first.session  # one replica, one cache
    assert len({ask.seed for ask in answered.asked}) == 3


def test_half_of_a_call_is_not_carried_out(meters):
    bench = Bench()
    events = play(scripted("CALL ok-"), tools(bench, meters))
    assert bench.called == []
    assert events[-1] == Ended(0, "length", 8)


@pytest.mark.parametrize(
    ("replies", "code"),
    [
        (["CALL ok"] * 3, "agent_turns_exceeded"),
        (["CALL ok", ApiError(503, "replica_lost", "x")], "replica_lost"),
        (["CALL ok", "..."], "deadline_exceeded"),
        (["CALL ok", RuntimeError("a secret")], "internal_error"),
        (["CALL ok", *[ApiError(429, "overloaded", "x", retry_after=0.01)] * 99], "deadline_exceeded"),
    ],
)
def test_an_error_after_a_call_is_told_beside_it(meters, replies, code):
    seconds = 0.2 if code == "deadline_exceeded" else 20
    events = play(scripted(*replies), tools(Bench(), meters), turns=3, seconds=seconds)
    assert isinstance(events[1], Stepped)
    assert isinstance(events[-2], Halted)
    assert events[-2].code == code
    assert events[-1] == Ended(0, "length", 0)


def test_an_agent_that_has_acted_waits_for_room(meters):
    busy = ApiError(429, "overloaded", "x", retry_after=0.01)
    answered = scripted("CALL ok", busy, busy, "done")
    events = play(answered, tools(Bench(), meters))
    assert [type(event) for event in events] == [Began, Stepped, Began, Piece, Ended]
    assert answered.asked[1] == answered.asked[3]
    with pytest.raises(ApiError, match="overloaded"):  # who has done nothing may as well ask again
        play(scripted(busy, "done"), tools(Bench(), meters))


def test_what_reading_a_call_raises_after_another_is_told_beside_it(meters):
    bench = Bench()
    read = bench.read
    bench.read = lambda text: 1 / 0 if text == "bad" else read(text)
    events = play(scripted("CALL ok", "bad"), tools(bench, meters))
    assert events[-2:] == [Halted("internal_error", "the server failed to answer"), Ended(0, "length", 0)]
    with pytest.raises(ZeroDivisionError):
        play(scripted("bad"), tools(bench, meters))


@pytest.mark.parametrize("kind", [Bench, AsyncBench])
def test_a_tool_for_which_no_time_is_left_is_not_begun(meters, kind):
    """It would do its work, and the policy be told that it took too long."""
    bench = kind()

    async def play():
        box = tools(bench, meters, tool_seconds=5)
        for seconds in (0.0, -1.0):
            with pytest.raises(ApiError, match="deadline_exceeded"):
                await box.take(step("CALL ok"), request="r", caller="s", seconds=seconds)
        assert await box.take(step("an answer"), request="r", caller="s", seconds=0.0) is None
        await asyncio.to_thread(box._threads.shutdown)
        assert bench.called == []

    asyncio.run(play())
    # One that was begun has its own time.
    done = asyncio.run(tools(bench, meters).take(step("CALL ok"), request="r", caller="s", seconds=1e-9))
    assert (done.outcome, bench.called) == ("done", [("ok", "s")])


@pytest.mark.parametrize(
    ("reply", "code"), [(ApiError(503, "replica_lost", "x"), "replica_lost"), ("...", "deadline_exceeded")]
)
def test_an_error_before_any_call_is_raised(meters, reply, code):
    with pytest.raises(ApiError) as caught:
        play(scripted(reply), tools(Bench(), meters), seconds=0.1)
    assert caught.value.code == code
