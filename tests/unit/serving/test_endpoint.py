"""The endpoint whole, without Ray: OpenAI's own client, the real application, the real engine."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import runpy
from contextlib import aclosing
from pathlib import Path

import httpx2
import openai
import pytest

from stateset_ray.config import RolloutConfig
from stateset_ray.environments.echo import Echo
from stateset_ray.models import load_model
from stateset_ray.policies.base import Reply
from stateset_ray.policies.nucleus import Sampled
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.rollout import rollout
from stateset_ray.serving.answers import framed
from stateset_ray.serving.dispatch import PolicyBusy, PolicyLost
from stateset_ray.serving.events import Ask, Began, Ended, Piece, Refused
from stateset_ray.serving.settings import DeadlineSettings, SecuritySettings
from stateset_ray.types import Message

_SUPPORT = runpy.run_path(str(Path(__file__).with_name("support_endpoint.py")))
KEY, ADMIN, HI, SETTINGS = (_SUPPORT[name] for name in ("KEY", "ADMIN", "HI", "SETTINGS"))
client, raw = _SUPPORT["client"], _SUPPORT["raw"]
BAD = openai.BadRequestError


def test_train_serve_identity(make, policies, hardware):
    """The same conversation: the same ids and the same greedy replies, in a rollout and at the endpoint."""
    limits = RolloutConfig(max_turns=3, max_turn_tokens=12, max_context=256, on_cut_reply="close")
    renderer = policies.held.renderer
    engine = TransformersEngine(
        load_model("tiny", hardware), renderer.stop_ids, slots=2, max_context=256, hardware=hardware
    )
    environment = Echo()
    task = environment.task("train", 1)
    prompts = []
    answer = policies.held.engine.reply

    async def noted(request, *rest, **more):
        prompts.append(request.prompt_ids)
        return await answer(request, *rest, **more)

    policies.held.engine.reply = noted

    async def play():
        played = await rollout(environment, task, engine, renderer, limits, id="r", seed=1, temperature=0.0)
        said = [{"role": m.role, "content": m.content} for m in played.messages]
        replies = [i for i, m in enumerate(played.messages) if m.role == "assistant"]
        assert len(replies) == 2
        for index in replies:
            served = await client(make()).chat.completions.create(
                model="tiny", messages=said[:index], temperature=0, max_tokens=12
            )
            assert served.choices[0].message.content == played.messages[index].content
        assert prompts == list(played.prompts())

    asyncio.run(play())


def test_openai_client_reads_every_shape(make, policies):
    async def play():
        ai = client(make())
        assert [model.id async for model in ai.models.list()] == ["tiny"]
        assert (await ai.models.retrieve("tiny")).owned_by == "stateset_ray"
        response = await ai.chat.completions.with_raw_response.create(
            model="tiny", messages=HI, max_tokens=5, n=2, seed=3, logprobs=True
        )
        whole = response.parse()
        assert response.headers["x-policy-version"] == whole.system_fingerprint == "tiny-1"
        assert response.headers["x-request-id"]
        assert [choice.index for choice in whole.choices] == [0, 1]
        tokens = [len(choice.logprobs.content) for choice in whole.choices]
        assert whole.usage.completion_tokens == sum(tokens)
        assert all(entry.logprob < 0 for choice in whole.choices for entry in choice.logprobs.content)
        stream = await ai.chat.completions.create(
            model="tiny", messages=HI, max_tokens=5, n=2, seed=3, stream=True, logprobs=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        for choice in whole.choices:  # the same seed: the same words, whole or in pieces
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
            assert mine[0].delta.role == "assistant"
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
            assert mine[-1].finish_reason == choice.finish_reason
            scored = [entry for c in mine if c.logprobs for entry in c.logprobs.content]
            assert [e.token for e in scored] == [e.token for e in choice.logprobs.content]
            # To rounding: which rows share a forward pass shows in the last bits.
            wanted = [e.logprob for e in choice.logprobs.content]
            assert [e.logprob for e in scored] == pytest.approx(wanted, abs=1e-5)

    asyncio.run(play())


def test_the_coldest_temperatures_are_greedy(make, policies):
    """Logits divided by 1e-38 are infinite, and then the policy is taken for broken."""

    async def play():
        said = set()
        for temperature in (0, 1e-38, 1e-5):
            answer = await client(make()).chat.completions.create(
                model="tiny", messages=HI, max_tokens=6, temperature=temperature
            )
            said.add(answer.choices[0].message.content)
        assert len(said) == 1
        await client(make()).chat.completions.create(
            model="tiny", messages=HI, max_tokens=1, temperature=0.01
        )

    asyncio.run(play())
    assert [ask.temperature for ask in policies.asked] == [0, 0, 0, 0.01]


def test_stop_strings_and_seeds(make):
    async def play():
        ai = client(make())

        async def said(**more):
            answer = await ai.chat.completions.create(model="tiny", messages=HI, max_tokens=40, **more)
            return answer.choices[0]

        free = await said(seed=1)
        assert (await said(seed=1)).message.content == free.message.content
        assert (await said(seed=2)).message.content != free.message.content
        stop = free.message.content[10]
        cut = await said(seed=1, stop=[stop])
        assert cut.finish_reason == "stop"
        assert cut.message.content == free.message.content.partition(stop)[0].strip()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("more", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"presence_penalty": 0.3}, BAD, "unsupported_parameter"),
        ({"extra_body": {"conversation": "conv_x"}}, BAD, "unsupported_parameter"),
        ({"extra_body": {"best_of": 2}}, BAD, "unknown_parameter"),
        ({"max_tokens": 1000}, BAD, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, BAD, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.APIStatusError, "body_too_large"),
        ({"extra_headers": {"x-request-timeout-seconds": "0"}}, BAD, "unsupported_header"),
        ({"extra_headers": {"x-request-disconnect-disabled": "?1"}}, BAD, "unsupported_header"),
        ({"extra_headers": {"x-request-id": "a b"}}, BAD, "invalid_header"),
        ({"extra_headers": {"x-session-id": "s" * 300}}, BAD, "invalid_header"),
        ({"extra_headers": {"content-encoding": "gzip"}}, openai.APIStatusError, "unsupported_encoding"),
        ({"extra_headers": {"content-type": "text/plain"}}, openai.APIStatusError, "unsupported_media_type"),
    ],
)  # fmt: skip
def test_every_refusal_has_one_shape(make, more, error, code):
    async def play():
        with pytest.raises(error) as caught:
            await client(make()).chat.completions.create(**{"model": "tiny", "messages": HI} | more)
        assert caught.value.code == code
        assert set(caught.value.body) == {"message", "type", "param", "code"}
        assert caught.value.response.headers["content-type"] == "application/json"

    asyncio.run(play())


def test_every_route_but_health_needs_a_key(make):
    async def play():
        gate = make()
        async with raw(gate) as web:
            del web.headers["authorization"]
            paths = [route.path.replace("{id:path}", "tiny") for route in gate._app.routes]
            assert "/openapi.json" in paths
            for path in [
                *paths,
                "/nowhere",
                "/admin/x",
                "/healthz/../v1/models",
                "http://localhost//healthz",
                "/docs",
            ]:
                for method in ("GET", "POST", "DELETE", "OPTIONS"):
                    answer = await web.request(method, path)
                    if path in ("/", "/healthz", "/readyz", "/health", "/health/live", "/health/ready"):
                        assert answer.status_code == (200 if method == "GET" else 405), path
                    else:
                        assert answer.status_code == 401, (method, path)
                        assert answer.json()["error"]["code"] == "missing_api_key"
                    assert answer.headers["x-request-id"]
                    assert "access-control-allow-origin" not in answer.headers
        with pytest.raises(openai.AuthenticationError):
            await client(gate, "z" * 32).models.list()

    asyncio.run(play())


def test_admin_routes_need_their_scope(make):
    async def play():
        gate = make()
        async with raw(gate) as web:
            for method, path in (
                ("GET", "/admin/weights"),
                ("POST", "/admin/weights"),
                ("GET", "/admin/none"),
            ):
                assert (await web.request(method, path)).status_code == 403
            web.headers["authorization"] = f"Bearer {ADMIN}"
            assert (await web.get("/admin/weights")).json() == {"replicas": [{"version": "tiny-1"}]}
            answer = await web.post("/admin/weights", json={"checkpoint": "../../etc"})
            assert answer.json()["error"]["code"] == "no_run"
            assert (await web.get("/nowhere")).json()["error"]["code"] == "not_found"
            assert (await web.delete("/v1/models")).json()["error"]["code"] == "method_not_allowed"

    asyncio.run(play())


def test_below_a_prefix_the_same_holds(make):
    async def play():
        transport = httpx2.ASGITransport(app=make(), root_path="/shop")
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", headers=headers
        ) as web:
            assert (await web.get("/shop/v1/models")).status_code == 200
            assert (await web.get("/shop/admin/weights")).status_code == 403
            del web.headers["authorization"]
            assert (await web.get("/shop/healthz")).status_code == 200
            assert (await web.get("/shop/")).status_code == 200  # the page
            assert (await web.get("/shop", follow_redirects=True)).status_code == 200
            assert (await web.get("/shop/v1/models")).status_code == 401

    asyncio.run(play())


def test_an_open_endpoint_answers_to_localhost_only(make):
    gate = make(SETTINGS.model_copy(update={"security": SecuritySettings(open=True)}))

    async def play():
        async with raw(gate) as web:
            for host, status in (
                ("localhost:8000", 200),
                ("127.0.0.1", 200),
                ("[::1]:1", 200),
                ("evil.example", 403),
            ):
                assert (await web.get("/v1/models", headers={"host": host})).status_code == status
            assert (await web.get("/admin/weights")).status_code == 403

    asyncio.run(play())


def test_a_body_that_drips_is_cut(make):
    async def play():
        async def drip():
            for _ in range(10):
                yield b" " * 1000

        async with raw(make()) as web:
            answer = await web.post(
                "/v1/chat/completions", content=drip(), headers={"content-type": "application/json"}
            )
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    asyncio.run(play())


def test_a_lost_replica_is_asked_again_until_the_first_token(make, policies, recorders):
    async def play():
        ai = client(make())
        policies.faults = [PolicyLost(), PolicyLost()]
        answer = await ai.chat.completions.create(model="tiny", messages=HI, max_tokens=4)
        assert answer.choices[0].message.content is not None
        assert len(policies.asked) == 3
        assert len({ask.seed for ask in policies.asked}) == 1
        assert recorders["retries"].counted[()] == 2
        policies.faults = [PolicyLost() for _ in range(9)]
        with pytest.raises(openai.InternalServerError) as caught:
            await ai.chat.completions.create(model="tiny", messages=HI, max_tokens=4)
        assert caught.value.code == "replica_lost"

    asyncio.run(play())


@pytest.mark.parametrize(
    ("error", "code"), [(PolicyLost(), "replica_lost"), (RuntimeError("inside"), "internal_error")]
)
def test_a_stream_that_breaks_says_so_and_ends(make, policies, error, code):
    async def play():
        async with raw(make()) as web:
            asked = {"model": "tiny", "messages": HI, "stream": True, "seed": 1, "max_tokens": 30}
            broken = policies.held.answer

            async def breaking(ask):
                async for events in broken(ask):
                    yield events
                    raise error

            policies.held.answer = breaking
            answer = await web.post("/v1/chat/completions", json=asked)
        frames = [frame.removeprefix("data: ") for frame in answer.text.split("\n\n") if frame]
        assert answer.status_code == 200
        assert frames[-1] == "[DONE]"
        assert json.loads(frames[-2])["error"]["code"] == code
        assert "inside" not in answer.text
        assert len(policies.asked) == 1  # what was begun is not begun again
        assert '"finish_reason":"' not in answer.text

    asyncio.run(play())


def test_no_room_is_429(make, policies, recorders):
    async def play():
        policies.faults = [PolicyBusy()]
        with pytest.raises(openai.RateLimitError) as caught:
            await client(make()).chat.completions.create(model="tiny", messages=HI)
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert recorders["shed"].counted[("overloaded",)] == 1

    asyncio.run(play())


def test_a_key_has_only_so_many_places(make, policies):
    async def play():
        policies.hang = asyncio.Event()
        gate = make()
        ai = client(gate)

        async def ask():
            return await ai.chat.completions.create(model="tiny", messages=HI, max_tokens=2)

        waiting = [asyncio.create_task(ask()) for _ in range(3)]
        while len(policies.asked) < 3:
            await asyncio.sleep(0)
        with pytest.raises(openai.RateLimitError) as caught:
            await ask()
        assert caught.value.code == "too_many_requests"
        assert (await client(gate, ADMIN).models.list()).data  # others are not touched by it
        policies.hang.set()
        assert len(await asyncio.gather(*waiting)) == 3

    asyncio.run(play())


def test_deadlines(make, policies):
    async def play():
        policies.hang = asyncio.Event()
        late = DeadlineSettings(first_token=0.05)
        with pytest.raises(openai.InternalServerError) as caught:
            await client(make(SETTINGS.model_copy(update={"deadlines": late}))).chat.completions.create(
                model="tiny", messages=HI
            )
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        assert caught.value.response.headers["x-should-retry"] == "false"

    asyncio.run(play())


def test_a_failure_of_ours_tells_nothing(make, policies):
    async def play():
        policies.faults = [RuntimeError("secret path /root/x")]
        with pytest.raises(openai.InternalServerError) as caught:
            await client(make()).chat.completions.create(model="tiny", messages=HI)
        assert caught.value.code == "internal_error"
        assert "secret" not in caught.value.response.text

    asyncio.run(play())


def test_draining_takes_nothing_new(make):
    async def play():
        gate = make()
        gate.draining = True
        with pytest.raises(openai.InternalServerError) as caught:
            await client(gate).models.list()
        assert caught.value.code == "draining"
        async with raw(gate) as web:
            assert (await web.get("/readyz")).status_code == 503
            assert (await web.get("/healthz")).status_code == 200

    asyncio.run(play())


def ask(**more):
    fields = {
        "id": "a", "tenant": "t", "session": "", "messages": (Message("user", "hi"),), "max_tokens": 50,
        "temperature": 1.0, "seed": 1, "stream": True,
    }  # fmt: skip
    return Ask(**fields | more)


def test_a_client_that_leaves_frees_its_slots(held):
    async def play():
        async with aclosing(held.answer(ask(choices=4))) as answer:
            first = await anext(answer)
            assert isinstance(first[0], Began)
            assert held.tokens > 0
            assert held.running == 1
            sampled = held.engine.stats.decode_tokens
        assert (held.tokens, held.running) == (0, 0)
        events = [e async for part in held.answer(ask(id="b", max_tokens=3)) for e in part]
        assert isinstance(events[-1], Ended)
        # What was given up was sampled no further: at most one pass of it was under way.
        assert held.engine.stats.decode_tokens - sampled <= 3 + 4
        assert not any(slot.busy for slot in held.engine._cache.slots)

    asyncio.run(play())


def test_a_session_keeps_its_cache(held):
    async def play():
        messages = (Message("user", "a rather long opening of a conversation, told at some length"),)
        first = [e async for p in held.answer(ask(session="s", messages=messages)) for e in p]
        assert isinstance(first[-1], Ended)
        before = held.engine.stats.prefill_tokens
        reply = held.renderer.text(
            held.engine._cache.owned("session/s").known[len(held.renderer.opening(messages)) :]
        )
        talk = (*messages, Message("assistant", reply), Message("user", "and?"))
        second = [e async for p in held.answer(ask(id="b", session="s", messages=talk)) for e in p]
        began = next(e for e in second if isinstance(e, Began))
        assert held.engine.stats.prefill_tokens - before < began.prompt_tokens - 50

    asyncio.run(play())


def test_a_retired_version_ends_what_it_began(held):
    async def play():
        answer = held.answer(ask(max_tokens=30))
        await anext(answer)
        await held.retire()
        assert not held.engine._task.done()
        events = [e async for part in answer for e in part]
        assert events[-1] == Ended(0, events[-1].finish, events[-1].tokens)
        assert held.engine._task.done()

    asyncio.run(play())


def test_a_long_answer_comes_in_parts(held):
    """Each is one message between two replicas, which holds so much and no more."""
    tokens = 2000
    held.max_context = 2 * tokens

    async def reply(request, on_token, **more):
        top = tuple((30 + i, -2.0) for i in range(20))
        for _ in range(tokens):
            on_token(Sampled(40, -0.5, top))
        return Reply((40,) * tokens, (-0.5,) * tokens, 0, "length")

    held.engine.reply = reply

    async def play():
        whole = ask(choices=4, max_tokens=tokens, stream=False, logprobs=True, top=20)
        parts = [events async for events in held.answer(whole)]
        assert max(len(pickle.dumps(events)) for events in parts) < 1 << 20
        pieces = [event for events in parts for event in events if isinstance(event, Piece)]
        assert sum(len(piece.tokens) for piece in pieces) == 4 * tokens
        assert [type(event) for event in parts[-1]][-1] is Ended

    asyncio.run(play())


def test_what_no_replica_can_answer(held):
    async def play():
        long = ask(messages=(Message("user", "x" * 300),))
        [[refused]] = [part async for part in held.answer(long)]
        assert refused.code == "context_length_exceeded"
        events = [e async for p in held.answer(ask(messages=(Message("system", "x"),))) for e in p]
        assert events  # some templates refuse it; none of them breaks the replica
        assert isinstance(events[0], Refused | Began)

    asyncio.run(play())


def test_what_cannot_fit_is_refused_before_it_is_made_into_tokens(held, monkeypatch):
    """A body of a megabyte would hold up every answer of the replica while it is rendered."""
    longest = held.max_context * held.renderer.longest_token
    rendered = []
    monkeypatch.setattr(held.renderer, "opening", lambda messages: rendered.append(1) or (5,) * 999)

    async def play():
        for length in (longest + 1, longest):
            [[refused]] = [part async for part in held.answer(ask(messages=(Message("user", "x" * length),)))]
            assert (refused.status, refused.code) == (400, "context_length_exceeded")
            assert refused.param == "messages"
        [[refused]] = [part async for part in held.answer(ask(messages=(), prompt="x" * (longest + 1)))]
        assert (refused.code, refused.param) == ("context_length_exceeded", "prompt")

    asyncio.run(play())
    assert rendered == [1]  # of the one that might have fitted, by its characters


def test_control_tokens_in_messages_stay_words(held):
    """S12: nobody ends a turn, or speaks as someone else, by writing a token."""
    renderer, tokenizer = held.renderer, held.tokenizer
    control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1]
    assert control

    def controls(content):
        ids = held.memory.prompt(renderer, "t", (Message("user", content),))
        return [i for i in ids if i in tokenizer.all_special_ids]

    for token in control:
        assert controls(f"a{token}b{token}") == controls("a"), token


def test_no_content_can_forge_an_event():
    """S11."""
    evil = 'x\n\ndata: [DONE]\n\ndata: {"a": 1}\r\n\u2028\x85: y'
    frame = framed({"content": evil})
    assert frame.count(b"\n") == 2
    assert b"\r" not in frame
    assert frame.endswith(b"\n\n")
    assert json.loads(frame.removeprefix(b"data: ")) == {"content": evil}


def test_keys_and_words_are_in_no_log(make, policies, caplog):
    """S4, S20: whatever happens to a request, neither its key nor what was said is written down."""

    async def play():
        gate = make()
        secret = "canary-words-of-a-client"
        asked = {"model": "tiny", "messages": [{"role": "user", "content": secret}], "max_tokens": 2}
        policies.faults = [RuntimeError("broken")]
        async with raw(gate) as web:
            for key in (KEY, "canary-key-that-is-wrong"):
                web.headers["authorization"] = f"Bearer {key}"
                for more in ({}, {"max_tokens": 2}, {"user": secret}, {"top_k": secret}, {secret: 1}):
                    answer = await web.post("/v1/chat/completions", json=asked | more)
                    # A parameter's name is told, if it is a plain one; what it held never is.
                    assert answer.status_code == 200 or secret in more or secret not in answer.text
        assert not gate.running

    caplog.set_level(logging.DEBUG)
    logging.getLogger("ray.serve").propagate = True
    asyncio.run(play())
    assert "POST /v1/chat/completions" in caplog.text
    for record in caplog.records:
        line = f"{record.getMessage()} {record.__dict__}"
        assert "canary" not in line
        assert KEY not in line
