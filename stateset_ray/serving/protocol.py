"""What clients send: OpenAI's chat completions request, read strictly.

Every parameter is honoured or refused by name, and none is ignored. What asks for nothing (`top_p: 1`,
`tools: []`, anything that is null) is honoured by doing nothing. The body is measured before it is parsed,
and parsed before anything else is done with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.reading import (
    SamplingRequest,
    StreamOptions,
    Strict,
    check_sampling,
    check_text,
    parse_json,
    read,
    too_long,
)
from stateset_ray.serving.settings import LimitSettings
from stateset_ray.serving.tool_calls import CalledTool, OfferedTool, written
from stateset_ray.types import Message

__all__ = ["ChatMessage", "ChatRequest", "StreamOptions", "TextPart", "check_turn", "parse_chat"]

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's parameters that are not supported -> the values that ask for nothing."""


class TextPart(Strict):
    """A part of a message; text is the only kind, so that no URL of a request is ever opened."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message. `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[CalledTool] | None = Field(default=None, min_length=1, max_length=64)
    """Of the assistant, where the request has tools."""
    tool_call_id: str | None = None
    """Of a tool: which call it answers."""

    def message(self) -> Message:
        """The same in the words of the project.

        Raises:
            ValueError: a call cannot be written down.
        """
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(p.text for p in content)
        if self.tool_calls:
            text = written(text, self.tool_calls)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    conversation: str | None = Field(default=None, min_length=1, max_length=64)
    """Of `/v1/conversations`; it comes before the messages, of which there may then be none."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    tools: list[OfferedTool] = Field(default=[], max_length=64)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    prompt_cache_key: str | None = Field(default=None, min_length=1, max_length=256)
    """Names the conversation, where the header `x-session-id` does not."""

    @property
    def reply_tokens(self) -> int | None:
        """The limit of a reply, under either name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered(self) -> str:
        """The tools as JSON, for the chat template; "" for none."""
        if not self.tools or self.tool_choice == "none":
            return ""
        return json.dumps([tool.model_dump(exclude_unset=True) for tool in self.tools], ensure_ascii=False)

    def said(self) -> tuple[Message, ...]:
        """The messages in the words of the project."""
        return tuple(message.message() for message in self.messages)


def parse_chat(body: bytes, limits: LimitSettings) -> ChatRequest:
    """The request in a body, within the limits.

    Raises:
        ApiError: 400, naming the parameter that is wrong.
    """
    request = read(parse_json(body, limits), ChatRequest, _NEUTRAL)
    check_sampling(request, limits)
    _check(request, limits)
    return request


def _check(request: ChatRequest, limits: LimitSettings) -> None:
    _check_tools(request)
    if len(request.messages) > limits.messages:
        too_long("messages", f"at most {limits.messages} messages")
    for index, message in enumerate(request.said()):
        if len(message.content) > limits.message_chars:
            too_long(f"messages[{index}].content", f"at most {limits.message_chars} characters")
        check_text(message.content, f"messages[{index}].content")
    check_text(request.prompt_cache_key or "", "prompt_cache_key")
    check_text(request.conversation or "", "conversation")
    if request.conversation and request.n > 1:
        raise ApiError(400, "invalid_parameter", "a conversation goes on with one choice", "n")
    if not request.conversation:
        check_turn(request.said())
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "invalid_parameter", "top_logprobs needs logprobs = true", "top_logprobs")
    if request.max_tokens and request.max_completion_tokens:
        raise ApiError(
            400,
            "invalid_parameter",
            "give one of max_tokens and max_completion_tokens, not both",
            "max_tokens",
        )


def _check_tools(request: ChatRequest) -> None:
    """Refuse what only some of the values of function calling mean, and results that answer no call."""
    for name, supported in (
        ("tool_choice", request.tool_choice in ("none", "auto")),
        ("parallel_tool_calls", request.parallel_tool_calls or not request.tools),
        ("tools", not (request.tools and request.conversation)),
    ):
        if not supported:
            raise ApiError(
                400, "unsupported_parameter", f"this value of {name!r} is not supported: leave it out", name
            )
    check_text(request.offered, "tools")
    called: set[str] = set()
    for index, message in enumerate(request.messages):
        where = f"messages[{index}]"
        if message.content is None and not message.tool_calls:
            raise ApiError(
                400, "missing_parameter", f"the parameter {where}.content is missing", f"{where}.content"
            )
        for name, given, role in (
            ("tool_calls", message.tool_calls, "assistant"), ("tool_call_id", message.tool_call_id, "tool"),
        ):  # fmt: skip
            if given is not None and (message.role != role or not request.tools):
                raise ApiError(
                    400, "invalid_parameter", f"{where}.{name} belongs to {role} messages, and needs tools",
                    f"{where}.{name}",
                )  # fmt: skip
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise ApiError(
                400, "invalid_parameter", f"{where}.tool_call_id answers no call before it",
                f"{where}.tool_call_id",
            )  # fmt: skip
        called |= {call.id for call in message.tool_calls or ()}
        try:
            message.message()
        except (ValueError, RecursionError):
            raise ApiError(
                400, "invalid_parameter", f"{where}.tool_calls: arguments must be a JSON object",
                f"{where}.tool_calls",
            ) from None  # fmt: skip


def check_turn(messages: Sequence[Message]) -> None:
    """Refuse messages to which there is no reply.

    Raises:
        ApiError: 400.
    """
    if not messages:
        raise ApiError(400, "invalid_parameter", "messages: there must be one at least", "messages")
    if messages[-1].role == "assistant":
        raise ApiError(
            400,
            "invalid_parameter",
            "the last message is the assistant's: there is nothing to reply to",
            "messages",
        )
