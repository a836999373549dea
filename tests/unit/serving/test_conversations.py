"""Conversations that the server keeps, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

import openai
import pytest

from stateset_ray.serving.dispatch import PolicyLost
from stateset_ray.serving.settings import ConversationSettings
from stateset_ray.types import Message

_SUPPORT = runpy.run_path(str(Path(__file__).with_name("support_endpoint.py")))
ADMIN, KEY, SETTINGS = (_SUPPORT[name] for name in ("ADMIN", "KEY", "SETTINGS"))
client, raw = _SUPPORT["client"], _SUPPORT["raw"]


def said(role, text):
    return {"type": "message", "role": role, "content": text}


@pytest.fixture
def keeping(make, tmp_path):
    """A gate of a replica; all of them keep conversations in one place."""

    def made(**limits):
        kept = ConversationSettings(store=f"sqlite:///{tmp_path / 'kept.db'}", **limits)
        return make(SETTINGS.model_copy(update={"conversations": kept}))

    return made


def test_a_conversation_is_made_read_and_removed(keeping):
    async def play():
        ai = client(keeping())
        made = await ai.conversations.create(items=[said("user", "hi")], metadata={"order": "7"})
        assert (made.object, made.metadata) == ("conversation", {"order": "7"})
        assert await ai.conversations.retrieve(made.id) == made
        content = [{"type": "output_text", "text": "he"}, {"type": "output_text", "text": "y"}]
        added = await ai.conversations.items.create(
            made.id, items=[{"type": "message", "role": "assistant", "content": content}, said("user", "?")]
        )
        assert [item.role for item in added.data] == ["assistant", "user"]
        page = await ai.conversations.items.list(made.id, limit=2, order="asc")
        assert [(i.role, i.content[0].text) for i in page.data] == [("user", "hi"), ("assistant", "hey")]
        assert [i.content[0].type for i in page.data] == ["input_text", "output_text"]
        assert page.has_more
        rest = await ai.conversations.items.list(made.id, order="asc", after=page.last_id)
        assert [i.content[0].text for i in rest.data] == ["?"]
        assert not rest.has_more
        assert [i.content[0].text async for i in ai.conversations.items.list(made.id, limit=1)] == [
            "?", "hey", "hi",
        ]  # fmt: skip
        gone = await ai.conversations.delete(made.id)
        assert (gone.deleted, gone.object) == (True, "conversation.deleted")
        with pytest.raises(openai.NotFoundError) as caught:
            await ai.conversations.retrieve(made.id)
        assert caught.value.code == "conversation_not_found"

    asyncio.run(play())


def test_a_reply_goes_on_with_what_another_replica_kept(keeping, policies):
    async def play():
        made = await client(keeping()).conversations.create(items=[said("system", "Be brief.")])
        asked = {"model": "tiny", "max_tokens": 6, "extra_body": {"conversation": made.id}}
        first = await client(keeping()).chat.completions.create(
            messages=[{"role": "user", "content": "hi"}], seed=1, **asked
        )
        stream = await client(keeping()).chat.completions.create(
            messages=[{"role": "user", "content": "and?"}], seed=2, stream=True, **asked
        )
        second = "".join([c.choices[0].delta.content or "" async for c in stream])
        talk = [
            ("system", "Be brief."), ("user", "hi"), ("assistant", first.choices[0].message.content),
            ("user", "and?"), ("assistant", second),
        ]  # fmt: skip
        page = await client(keeping()).conversations.items.list(made.id, order="asc")
        assert [(i.role, i.content[0].text) for i in page.data] == talk
        assert policies.asked[-1].messages == tuple(Message(*one) for one in talk[:-1])
        assert len({ask.session for ask in policies.asked}) == 1
        assert policies.asked[0].session  # and so the same policy replica, which knows the token ids

    asyncio.run(play())


def test_what_was_added_beforehand_is_replied_to(keeping):
    async def play():
        ai = client(keeping())
        made = await ai.conversations.create(items=[said("user", "hi")])
        asked = {"model": "tiny", "messages": [], "max_tokens": 4, "extra_body": {"conversation": made.id}}
        assert (await ai.chat.completions.create(**asked)).choices[0].message.role == "assistant"
        with pytest.raises(openai.BadRequestError, match="nothing to reply to"):
            await ai.chat.completions.create(**asked)

    asyncio.run(play())


def test_another_key_gets_404_whatever_it_tries(keeping):
    async def play():
        gate = keeping()
        made = await client(gate).conversations.create(items=[said("user", "secret")])
        boss = client(gate, ADMIN)
        for what in (
            boss.conversations.retrieve(made.id), boss.conversations.delete(made.id),
            boss.conversations.items.list(made.id),
            boss.conversations.items.create(made.id, items=[said("user", "x")]),
            boss.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x"}],
                extra_body={"conversation": made.id},
            ),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError) as caught:
                await what
            assert "secret" not in caught.value.response.text
        async with raw(gate) as web:
            del web.headers["authorization"]
            for method, path in (
                ("POST", ""), ("GET", f"/{made.id}"), ("DELETE", f"/{made.id}"), ("GET", f"/{made.id}/items"),
                ("POST", f"/{made.id}/items"),
            ):  # fmt: skip
                assert (await web.request(method, f"/v1/conversations{path}")).status_code == 401
        assert len((await client(gate).conversations.items.list(made.id)).data) == 1

    asyncio.run(play())


def test_what_fails_or_is_left_adds_nothing_and_holds_nothing(keeping, policies):
    async def play():
        ai = client(keeping())
        made = await ai.conversations.create(items=[])
        asked = {
            "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100,
            "extra_body": {"conversation": made.id},
        }  # fmt: skip
        policies.faults = [PolicyLost() for _ in range(4)]
        with pytest.raises(openai.InternalServerError):
            await ai.chat.completions.create(**asked)
        assert (await ai.conversations.items.list(made.id)).data == []
        answer = await ai.chat.completions.create(**asked | {"max_tokens": 2})
        assert answer.choices[0].finish_reason
        assert len((await ai.conversations.items.list(made.id)).data) == 2

    asyncio.run(play())


def test_one_answer_at_a_time(keeping, policies):
    async def play():
        ai = client(keeping())
        made = await ai.conversations.create(items=[])
        asked = {
            "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
            "extra_body": {"conversation": made.id},
        }  # fmt: skip
        policies.hang = asyncio.Event()
        first = asyncio.create_task(ai.chat.completions.create(**asked))
        while not policies.asked:
            await asyncio.sleep(0.001)
        with pytest.raises(openai.ConflictError) as caught:
            await ai.chat.completions.create(**asked)
        assert caught.value.code == "conversation_busy"
        assert caught.value.response.headers["retry-after"] == "1"
        policies.hang.set()
        await first
        await ai.chat.completions.create(**asked)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("", {"items": [said("user", "x")] * 21}, "invalid_parameter", "items"),
        ("", {"items": [said("root", "x")]}, "invalid_parameter", "items[0].role"),
        ("", {"items": [{"type": "function_call", "role": "user", "content": ""}]},
         "invalid_parameter", "items[0].type"),
        ("", {"items": [said("user", "a\0")]}, "invalid_parameter", "items[0].content"),
        ("", {"metadata": {str(i): "x" for i in range(17)}}, "invalid_parameter", "metadata"),
        ("", {"metadata": {"a": 1}}, "invalid_parameter", "metadata.a"),
        ("", {"metadata": {"a": "x" * 513}}, "invalid_parameter", "metadata.a"),
        ("", {"x": 1}, "unknown_parameter", "x"),
        ("/{id}/items", {"items": []}, "invalid_parameter", "items"),
        ("/{id}/items", {}, "missing_parameter", "items"),
        ("/{id}/items", {"items": [said("user", "x" * 60)]}, "limit_exceeded", "items"),
        ("/{id}/items?limit=0", None, "invalid_parameter", "limit"),
        ("/{id}/items?limit=101", None, "invalid_parameter", "limit"),
        ("/{id}/items?limit=x", None, "invalid_parameter", "limit"),
        ("/{id}/items?order=up", None, "invalid_parameter", "order"),
        ("/{id}/items?after=msg_none", None, "invalid_parameter", "after"),
        ("/{id}/items?limit=1&limit=2", None, "invalid_parameter", None),
        ("/{id}/items?include=x", None, "unknown_parameter", "include"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(keeping, path, body, code, param):
    async def play():
        gate = keeping(chars=50)
        made = await client(gate).conversations.create(items=[])
        async with raw(gate) as web:
            answer = await web.request(
                "GET" if body is None else "POST", f"/v1/conversations{path.format(id=made.id)}", json=body
            )
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param)

    asyncio.run(play())


def test_too_many_conversations_of_a_key(keeping):
    async def play():
        gate = keeping(per_key=2)
        for _ in range(2):
            await client(gate).conversations.create()
        with pytest.raises(openai.RateLimitError) as caught:
            await client(gate).conversations.create()
        assert caught.value.code == "too_many_conversations"
        assert caught.value.response.headers["x-should-retry"] == "false"
        await client(gate, ADMIN).conversations.create()

    asyncio.run(play())


def test_nothing_is_kept_unless_the_settings_say_so(make):
    async def play():
        with pytest.raises(openai.NotFoundError) as caught:
            await client(make()).conversations.create()
        assert caught.value.code == "not_found"

    asyncio.run(play())
