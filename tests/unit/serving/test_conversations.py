"""Conversations that the server keeps, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import runpy
from contextlib import nullcontext, suppress
from pathlib import Path

import openai
import pytest

from stateset_ray.serving.conversations import kept
from stateset_ray.serving.dispatch import PolicyLost
from stateset_ray.serving.events import Began, Ended, Halted, Piece, Stepped
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.settings import ConversationSettings
from stateset_ray.serving.stores import open_store
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


def test_what_fails_adds_nothing_and_holds_nothing(keeping, policies):
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


def test_what_is_left_adds_nothing_and_holds_nothing(keeping, policies):
    async def play():
        ai = client(keeping())
        made = await ai.conversations.create(items=[])
        asked = {
            "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
            "extra_body": {"conversation": made.id},
        }  # fmt: skip
        policies.hang = asyncio.Event()
        left = asyncio.create_task(ai.chat.completions.create(**asked))
        while not policies.asked:
            await asyncio.sleep(0.001)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        policies.hang = None
        assert (await ai.conversations.items.list(made.id)).data == []
        await ai.chat.completions.create(**asked)
        assert len((await ai.conversations.items.list(made.id)).data) == 2

    asyncio.run(play())


def test_what_has_no_room_is_refused_before_it_is_answered(keeping, policies):
    async def play():
        ai = client(keeping(items=2, chars=50))
        for items, words in (([said("user", "hi")], "and?"), ([], "x" * 51)):
            made = await ai.conversations.create(items=items)
            with pytest.raises(openai.BadRequestError) as caught:
                await ai.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": words}], max_tokens=2,
                    extra_body={"conversation": made.id},
                )  # fmt: skip
            assert caught.value.code == "limit_exceeded"
        assert policies.asked == []

    asyncio.run(play())


def test_all_turns_of_a_kept_conversation_are_one_session_whoever_asks(keeping, policies):
    async def play():
        ai = client(keeping())
        made = await ai.conversations.create(items=[])
        for header in ("a", "b", ""):
            await ai.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=2,
                extra_body={"conversation": made.id, "prompt_cache_key": header or None},
                extra_headers={"x-session-id": header},
            )  # fmt: skip
        [session] = {ask.session for ask in policies.asked}
        assert session
        # Elsewhere the header goes before the field.
        policies.asked.clear()
        for field in ("p", "q"):
            await ai.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=2,
                prompt_cache_key=field, extra_headers={"x-session-id": "a"},
            )  # fmt: skip
        assert len({ask.session for ask in policies.asked}) == 1

    asyncio.run(play())


HI = Message("user", "hi")
CALL = (Message("assistant", "CALL ok"), Message("tool", "fine"))
STEP = Stepped("ok", "done", CALL, "v1", 3, 0.0)


def playing(tmp_path, before, new, *news, meanwhile=None):
    """The events of `kept` around this answer, and what the conversation holds then (None: it is gone)."""
    settings = ConversationSettings(store=f"sqlite:///{tmp_path / 'own.db'}", items=6)

    async def play():
        store = open_store(settings)
        made = await store.create("shop", {}, before)

        async def answer(messages):
            assert messages == (*before, *new)
            for events in news:
                if meanwhile is not None:
                    await meanwhile(store, made.id)
                yield events

        try:
            events = kept(store, settings, "shop", made.id, new, 5, answer)
            seen = [event async for some in events for event in some]
            with pytest.raises(ApiError) if meanwhile else nullcontext():
                return seen, [item.message for item in await store.items("shop", made.id)]
            return seen, None
        finally:
            await store.close()

    return asyncio.run(play())


async def deleted(store, id):
    with suppress(ApiError):
        await store.delete("shop", id)


@pytest.mark.parametrize(
    "news",
    [
        [(Began("v1", 3), STEP), (Began("v1", 9), Piece(0, "Done."), Ended(0, "stop", 2))],
        [(Began("v1", 3), STEP), (Halted("agent_turns_exceeded", "x"), Ended(0, "length", 0))],
    ],
)
def test_what_tools_did_is_told_though_the_conversation_is_gone(tmp_path, news):
    """An error would be tried again, and the tools would act twice."""
    seen, held = playing(tmp_path, [], [HI], *news, meanwhile=deleted)
    assert held is None
    assert STEP in seen
    assert seen[-1] == news[-1][-1]
    [halted] = [event for event in seen if isinstance(event, Halted)]
    assert halted.code == "conversation_not_found"
    assert "does not hold this" in halted.message


def test_what_tools_did_is_told_though_there_is_no_room_for_it(tmp_path):
    news = [(STEP,)] * 3 + [(Began("v1", 9), Piece(0, "Done."), Ended(0, "stop", 2))]
    seen, held = playing(tmp_path, [], [HI], *news)
    assert [event.code for event in seen if isinstance(event, Halted)] == ["limit_exceeded"]
    assert Piece(0, "Done.") in seen
    assert held == []


def test_an_answer_that_cannot_be_kept_is_an_error_where_no_tool_was_called(tmp_path):
    with pytest.raises(ApiError, match="conversation_not_found"):
        playing(tmp_path, [], [HI], (Piece(0, "x"), Ended(0, "stop", 1)), meanwhile=deleted)


def test_an_agents_calls_are_kept_and_no_answer_of_one_that_was_stopped(tmp_path):
    _, held = playing(tmp_path, [], [HI], (STEP,), (Piece(0, "Done."), Ended(0, "stop", 2)))
    assert held == [HI, *CALL, Message("assistant", "Done.")]
    _, held = playing(tmp_path, [], [HI], (STEP,), (Halted("x", "y"), Ended(0, "length", 0)))
    assert held == [HI, *CALL]


@pytest.mark.parametrize(
    ("before", "new"), [([HI], []), ([], [HI]), ([HI, *CALL], []), ([], [Message("tool", "fine")])]
)
def test_an_answer_without_words_is_one(tmp_path, before, new):
    _, held = playing(tmp_path, before, new, (Began("v1", 3),), (Ended(0, "stop", 1),))
    assert held == [*before, *new, Message("assistant", "")]


def test_who_leaves_before_the_claim_is_there_holds_nothing(tmp_path):
    settings = ConversationSettings(store=f"sqlite:///{tmp_path / 'own.db'}")

    async def play():
        store = open_store(settings)
        made = await store.create("shop", {}, [])
        claim, claimed, go, released = store.claim, asyncio.Event(), asyncio.Event(), asyncio.Event()
        release = store.release

        async def slow(*given):
            found = await claim(*given)
            claimed.set()
            await go.wait()
            return found

        async def noted(*given):
            await release(*given)
            released.set()

        store.claim, store.release = slow, noted
        events = kept(store, settings, "shop", made.id, [HI], 5, None)
        left = asyncio.create_task(anext(events))
        await claimed.wait()
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        go.set()
        async with asyncio.timeout(20):
            await released.wait()
        assert await claim("shop", made.id, 5)
        await store.close()

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
