"""`/v1/agent/chat/completions`: the policy acts, with the tools that it was trained with, before it answers.

    user -> policy -> call -> tool -> policy -> ... -> answer

The loop is a rollout's: the same system prompt, the same reader of calls, the same words of results, and
the same renderer behind it, so that the policy sees the token ids that it saw in training. Clients see the
answer, and every call that was made for it as `steps`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from stateset_ray.serving.agent_tools import Tools, load_tools
from stateset_ray.serving.answers import AgentAnswer
from stateset_ray.serving.audit import Audit
from stateset_ray.serving.chats import conversing
from stateset_ray.serving.events import Ask, Began, Ended, Event, Halted, Piece, Stepped
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.protocol import ChatRequest, parse_chat
from stateset_ray.serving.reading import body_schema
from stateset_ray.serving.replying import Replying, caller_of, short
from stateset_ray.serving.settings import AgentSettings
from stateset_ray.serving.source import Source
from stateset_ray.serving.store import Store
from stateset_ray.types import Message, derive_seed

__all__ = ["acted", "add_agent"]

_log = logging.getLogger("ray.serve")


def add_agent(app: FastAPI, replying: Replying, store: Store | None) -> None:
    """Add the routes, if the settings say so.

    Raises:
        ConfigError: the environment has no tools, or not those that are allowed.
    """
    settings = replying.settings.agent
    if not settings.enabled:
        return
    audit = Audit(settings.audit_file, arguments=settings.audit_arguments)
    toolbox, concurrent = load_tools(replying.settings), replying.settings.rates.concurrent
    tools = Tools(toolbox, settings, replying.meters, audit, concurrent)
    app.state.lasting.append(lambda: tools.under_way)  # a client that leaves does not end them
    rollout = Source(replying.settings.source).config().rollout
    reply_tokens = settings.reply_tokens or rollout.max_turn_tokens
    if most := replying.settings.policy.max_reply_tokens:
        reply_tokens = min(reply_tokens, most)

    @app.get("/v1/agent/tools")
    async def offered(request: Request) -> dict[str, Any]:
        """The tools that the policy may call."""
        caller_of(request).need("agent")  # as the gate has seen to; a mistake there must not open this
        found = [
            {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}
            for t in tools.allowed
        ]
        return {"object": "list", "data": found}

    @app.post("/v1/agent/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def agent_chat_completions(request: Request) -> Response:
        """Let the policy act until it has an answer."""
        caller_of(request).need("agent")
        wanted = parse_chat(await request.body(), replying.settings.limits)
        replying.check_model(wanted.model)
        _check(wanted)
        ask = replying.ask(
            request, wanted, wanted.conversation, wanted.prompt_cache_key,
            max_tokens=wanted.reply_tokens or reply_tokens,
            logprobs=wanted.logprobs, top=wanted.top_logprobs, stream=False,
        )  # fmt: skip
        answer = AgentAnswer(
            f"chatcmpl-{uuid.uuid4().hex}", wanted.model, int(time.time()), 1, wanted.logprobs
        )

        longest = settings.seconds + settings.tool_seconds  # a tool that was begun gets its own time

        def act(messages: tuple[Message, ...]) -> AsyncGenerator[tuple[Event, ...]]:
            _check_roles(messages)
            first = replace(ask, messages=(Message("system", tools.system), *messages))
            return acted(first, replying.answered, tools, settings, request.scope["state"]["request_id"])

        events = conversing(store, replying.settings.conversations, ask.tenant, wanted, longest, act)
        return await replying.respond(request, wanted, answer, events, longest)


async def acted(
    ask: Ask, answered: Callable[[Ask], AsyncGenerator[tuple[Event, ...]]], tools: Tools,
    settings: AgentSettings, request: str,
) -> AsyncGenerator[tuple[Event, ...]]:  # fmt: skip
    """The events of one answer and of the calls before it.

    Args:
        ask: the first question, not streamed.
        request: its id, for the log.

    Raises:
        ApiError: it fails before any tool was called. Later on nothing is raised: what tools did must be
            told, so `Halted` has the error, and the answer is cut.
    """
    end = time.monotonic() + settings.seconds
    # One session for all its turns: the replica that answered the last one knows the token ids.
    session = ask.session or short(f"agent/{ask.id}")
    messages, stepped = ask.messages, False
    try:
        for turn in range(settings.turns):
            said = await _reply(
                answered,
                replace(
                    ask, messages=messages, session=session, seed=derive_seed(ask.seed, "turn", turn),
                    id=f"{ask.id}-{turn}",
                ),
                end, patient=stepped,
            )  # fmt: skip
            step = await _step(said, tools, request, ask.tenant, end)
            if step is None:
                yield said
                return
            stepped = True
            yield (*(event for event in said if isinstance(event, Began)), step)
            messages = (*messages, *step.messages)
        raise ApiError(422, "agent_turns_exceeded", f"no answer came in {settings.turns} replies")
    except ApiError as error:
        if not stepped:
            raise
        yield (Halted(error.code, error.message), Ended(0, "length", 0))
    except Exception:
        if not stepped:
            raise
        _log.exception("an agent failed after it had acted", extra={"request": request})
        yield (Halted("internal_error", "the server failed to answer"), Ended(0, "length", 0))


async def _reply(
    answered: Callable[[Ask], AsyncGenerator[tuple[Event, ...]]], ask: Ask, end: float, *, patient: bool
) -> tuple[Event, ...]:
    """One reply; who is patient waits for room while there is time, since what was done cannot be undone."""
    try:
        async with asyncio.timeout(max(0.0, end - time.monotonic())):
            while True:
                try:
                    async with aclosing(answered(ask)) as answer:
                        return tuple([event async for events in answer for event in events])
                except ApiError as error:
                    if not patient or error.code != "overloaded":
                        raise
                    await asyncio.sleep(error.retry_after or 1.0)
    except TimeoutError:
        raise ApiError(
            504, "deadline_exceeded", "the agent did not come to an answer in time, and was given up"
        ) from None


async def _step(
    said: tuple[Event, ...], tools: Tools, request: str, caller: str, end: float
) -> Stepped | None:
    """The call that a reply makes, carried out; None if it is the answer."""
    ended = next(event for event in said if isinstance(event, Ended))
    if ended.finish != "stop":
        return None  # half of a call must not be carried out: `order=482` of 48213 is another order
    text = "".join(event.text for event in said if isinstance(event, Piece))
    version = next((event.version for event in said if isinstance(event, Began)), "")
    messages = Message("assistant", text), Message("tool", "")
    step = Stepped("", "", messages, version, ended.tokens, 0.0)
    return await tools.take(step, request=request, caller=caller, seconds=end - time.monotonic())


def _check_roles(messages: tuple[Message, ...]) -> None:
    for index, message in enumerate(messages):
        if message.role == "system":
            raise ApiError(
                400, "invalid_messages", "an agent has a system prompt of its own: leave it out",
                f"messages[{index}].role",
            )  # fmt: skip


def _check(wanted: ChatRequest) -> None:
    for name, given in (
        ("n", wanted.n > 1), ("stop", bool(wanted.stops)), ("tools", bool(wanted.tools)),
        ("tool_choice", wanted.tool_choice == "none"),
    ):  # fmt: skip
        if given:
            raise ApiError(
                400, "unsupported_parameter", f"an agent does not support {name!r}: leave it out", name
            )
