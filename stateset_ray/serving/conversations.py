"""`/v1/conversations`: what was said, kept here and not sent along with every request.

In OpenAI's shape, as far as messages of text go: make one, look at it, add to it, list it, remove it. A chat
completion that names one (`conversation`) is answered with what it holds before the new messages, and then
holds these, the answer, and what an agent did on the way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.datastructures import QueryParams

from stateset_ray.serving.events import Ended, Event, Halted, Piece, Stepped
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.reading import Strict, body_schema, check_text, parse_json, read, too_long
from stateset_ray.serving.replying import caller_of
from stateset_ray.serving.settings import ConversationSettings, LimitSettings, ServeSettings
from stateset_ray.serving.store import Conversation, Item, Store, check_room
from stateset_ray.types import Message

__all__ = ["add_conversations", "kept"]

_log = logging.getLogger("ray.serve")
_WRITE_SECONDS = 30.0  # for which who only adds messages holds a conversation
_SPARE_SECONDS = 60.0  # a claim for an answer lasts longer than any answer may
_AT_A_TIME = 20  # items of one request, as at OpenAI
_PAGE = 100
_undoing = set[asyncio.Task[None]]()  # claims that nobody waits for any more


class _Part(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str


class _NewItem(Strict):
    """One message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part]

    def message(self) -> Message:
        """The same in the words of the project."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class _NewItems(Strict):
    items: list[_NewItem] = Field(min_length=1, max_length=_AT_A_TIME)


class _NewConversation(Strict):
    items: list[_NewItem] = Field(default=[], max_length=_AT_A_TIME)
    metadata: dict[
        Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]
    ] = Field(default={}, max_length=16)


class _Page(Strict):
    limit: int = Field(default=20, ge=1, le=_PAGE)
    order: Literal["asc", "desc"] = "desc"
    after: str = Field(default="", max_length=64)


def add_conversations(app: FastAPI, settings: ServeSettings, store: Store) -> None:
    """Add the routes."""
    limits = settings.limits

    @app.post("/v1/conversations", openapi_extra=body_schema(_NewConversation))
    async def create(request: Request) -> dict[str, Any]:
        """Make a conversation, which is this key's."""
        wanted = read(parse_json(await request.body(), limits), _NewConversation, {})
        for text in (*wanted.metadata, *wanted.metadata.values()):
            check_text(text, "metadata")
        messages = _messages(wanted.items, limits)
        return _shown(await store.create(caller_of(request).name, wanted.metadata, messages))

    @app.get("/v1/conversations/{id}")
    async def get(request: Request, id: str) -> dict[str, Any]:
        """What is known of it."""
        return _shown(await store.get(caller_of(request).name, id))

    @app.delete("/v1/conversations/{id}")
    async def delete(request: Request, id: str) -> dict[str, Any]:
        """Remove it and all that was said in it."""
        await store.delete(caller_of(request).name, id)
        return {"id": id, "object": "conversation.deleted", "deleted": True}

    @app.post("/v1/conversations/{id}/items", openapi_extra=body_schema(_NewItems))
    async def add(request: Request, id: str) -> dict[str, Any]:
        """Add messages to it."""
        wanted = read(parse_json(await request.body(), limits), _NewItems, {})
        messages, owner = _messages(wanted.items, limits), caller_of(request).name
        claim = await _claimed(store, owner, id, _WRITE_SECONDS)
        try:
            return _listed(await store.append(owner, id, claim, messages), more=False)
        finally:
            await _given_back(store, owner, id, claim)

    @app.get("/v1/conversations/{id}/items")
    async def items(request: Request, id: str) -> dict[str, Any]:
        """List its messages, a page at a time."""
        page = _page(request.query_params)
        found = await store.items(caller_of(request).name, id)
        if page.order == "desc":
            found.reverse()
        if page.after:
            places = [place for place, item in enumerate(found) if item.id == page.after]
            if not places:
                raise ApiError(400, "invalid_parameter", "after: there is no such item", "after")
            found = found[places[0] + 1 :]
        return _listed(found[: page.limit], more=len(found) > page.limit)


async def kept(
    store: Store, settings: ConversationSettings, owner: str, id: str, new: Sequence[Message], seconds: float,
    answer: Callable[[tuple[Message, ...]], AsyncGenerator[tuple[Event, ...]]],
) -> AsyncGenerator[tuple[Event, ...]]:  # fmt: skip
    """The events of an answer in a conversation, which holds the new messages and the answer afterwards.

    Nothing is added where the answer fails or its client leaves. What cannot be added after tools were called
    is told beside what they did (`Halted`): who got an error would ask again, and the tools would act twice.

    Args:
        settings: the limits of conversations.
        new: what is said now.
        seconds: the longest that the answer may take.
        answer: from all messages to the events, of one choice.

    Raises:
        ApiError: there is no such conversation, another request is answered in it, or it has no room.
    """
    claim = await _claimed(store, owner, id, seconds + _SPARE_SECONDS)
    try:
        before = [item.message for item in await store.items(owner, id)]
        # Before anything is done for it; how long an answer gets, and what an agent does, is known later.
        room = (*new, Message("assistant", ""))
        check_room(settings, len(before), sum(len(message.content) for message in before), room)
        said, words, stepped, halted = list(new), list[str](), False, False
        async with aclosing(answer((*before, *new))) as events:
            async for news in events:
                for event in news:
                    if isinstance(event, Stepped):
                        said += event.messages
                        stepped = True
                    elif isinstance(event, Piece):
                        words.append(event.text)
                    halted |= isinstance(event, Halted)
                if any(isinstance(event, Ended) for event in news):
                    # Before the client can see the end, so that what it sees ended is kept. An agent that was
                    # stopped among its calls has no answer.
                    if not halted:
                        said.append(Message("assistant", "".join(words)))
                    try:
                        await store.append(owner, id, claim, said)
                    except ApiError as error:
                        if not stepped:
                            raise
                        news = _unkept(news, error)
                yield news
    finally:
        await _given_back(store, owner, id, claim)


def _unkept(news: tuple[Event, ...], error: ApiError) -> tuple[Event, ...]:
    why = Halted(error.code, f"the conversation does not hold this: {error.message}")
    return (why, *(event for event in news if not isinstance(event, Halted)))


async def _claimed(store: Store, owner: str, id: str, seconds: float) -> str:
    """A claim; given back by itself where its request is cancelled before it has it."""
    claiming = asyncio.ensure_future(store.claim(owner, id, seconds))

    async def undo() -> None:
        with suppress(ApiError):
            await _given_back(store, owner, id, await claiming)

    try:
        return await asyncio.shield(claiming)
    except asyncio.CancelledError:
        task = asyncio.create_task(undo())
        _undoing.add(task)
        task.add_done_callback(_undoing.discard)
        raise


async def _given_back(store: Store, owner: str, id: str, claim: str) -> None:
    """Release a claim, also while the request is cancelled; one that stays ends by itself."""
    try:
        await asyncio.shield(store.release(owner, id, claim))
    except ApiError as error:
        _log.warning("a conversation stays claimed for a while: %s", error.message)


def _messages(items: Sequence[_NewItem], limits: LimitSettings) -> list[Message]:
    messages = [item.message() for item in items]
    for place, message in enumerate(messages):
        if len(message.content) > limits.message_chars:
            too_long(f"items[{place}].content", f"at most {limits.message_chars} characters")
        check_text(message.content, f"items[{place}].content")
    return messages


def _page(given: QueryParams) -> _Page:
    """The query as it is wanted; a query has text only."""
    values: dict[str, Any] = dict(given)
    if len(values) != len(given.multi_items()):
        raise ApiError(400, "invalid_parameter", "a parameter of the query is given twice")
    if (limit := str(values.get("limit", ""))) and limit.isascii() and limit.isdecimal() and len(limit) < 5:
        values["limit"] = int(limit)
    check_text(str(values.get("after", "")), "after")
    return read(values, _Page, {})


def _shown(conversation: Conversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": int(conversation.created),
        "metadata": dict(conversation.metadata),
    }


def _listed(items: Sequence[Item], *, more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [_item(item) for item in items],
        "first_id": items[0].id if items else "",
        "last_id": items[-1].id if items else "",
        "has_more": more,
    }


def _item(item: Item) -> dict[str, Any]:
    said = item.message
    part: dict[str, Any] = {"type": "input_text", "text": said.content}
    if said.role == "assistant":
        part = {"type": "output_text", "text": said.content, "annotations": []}
    return {"id": item.id, "type": "message", "role": said.role, "status": "completed", "content": [part]}
