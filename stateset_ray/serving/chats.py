"""`/v1/chat/completions`: replies to conversations, sent along or kept here."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from fastapi import FastAPI, Request
from starlette.responses import Response

from stateset_ray.serving.answers import Answer
from stateset_ray.serving.conversations import kept
from stateset_ray.serving.events import Event
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.protocol import ChatRequest, check_turn, parse_chat
from stateset_ray.serving.reading import body_schema
from stateset_ray.serving.replying import Replying, caller_of
from stateset_ray.serving.settings import ConversationSettings
from stateset_ray.serving.store import Store
from stateset_ray.serving.tool_calls import ToolsAnswer
from stateset_ray.types import Message

__all__ = ["add_chats", "conversing"]


def add_chats(app: FastAPI, replying: Replying, store: Store | None) -> None:
    """Add the route."""

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Reply to a conversation."""
        wanted = parse_chat(await request.body(), replying.settings.limits)
        replying.check_model(wanted.model)
        ask = replying.ask(
            request, wanted, wanted.conversation, wanted.prompt_cache_key,
            max_tokens=wanted.reply_tokens, logprobs=wanted.logprobs, top=wanted.top_logprobs,
            tools=wanted.offered,
        )  # fmt: skip
        kind = ToolsAnswer if wanted.offered else Answer
        answer = kind(
            f"chatcmpl-{uuid.uuid4().hex}", wanted.model, int(time.time()), wanted.n, wanted.logprobs
        )
        if isinstance(answer, ToolsAnswer):
            answer.tools = frozenset(tool.function.name for tool in wanted.tools)

        def reply(messages: tuple[Message, ...]) -> AsyncGenerator[tuple[Event, ...]]:
            return replying.answered(replace(ask, messages=messages))

        seconds = replying.settings.deadlines.total
        kept_by = replying.settings.conversations
        events = conversing(store, kept_by, caller_of(request).name, wanted, seconds, reply)
        return await replying.respond(request, wanted, answer, events, seconds)


def conversing(
    store: Store | None, settings: ConversationSettings, owner: str, wanted: ChatRequest, seconds: float,
    reply: Callable[[tuple[Message, ...]], AsyncGenerator[tuple[Event, ...]]],
) -> AsyncGenerator[tuple[Event, ...]]:  # fmt: skip
    """The events of a reply to what was said: now, or in the conversation that the request names.

    Args:
        settings: the limits of conversations.
        seconds: the longest that the reply may take.
        reply: from all messages to the events.

    Raises:
        ApiError: nothing is kept here.
    """
    if wanted.conversation is None:
        return reply(wanted.said())
    if store is None:
        raise ApiError(
            400, "unsupported_parameter", "this endpoint keeps no conversations: leave it out", "conversation"
        )

    def checked(messages: tuple[Message, ...]) -> AsyncGenerator[tuple[Event, ...]]:
        check_turn(messages)
        return reply(messages)

    return kept(store, settings, owner, wanted.conversation, wanted.said(), seconds, checked)
