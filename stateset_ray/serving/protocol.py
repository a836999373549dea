"""What clients send: OpenAI's chat completions request, read strictly.

Every parameter is honoured or refused by name, and none is ignored. What asks for nothing (`top_p: 1`,
`tools: []`, anything that is null) is honoured by doing nothing. The body is measured before it is parsed,
and parsed before anything else is done with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from stateset_ray.serving.faults import ApiError, plain_name
from stateset_ray.serving.settings import LimitSettings
from stateset_ray.types import Message

__all__ = ["ChatMessage", "ChatRequest", "StreamOptions", "TextPart", "parse_chat", "parse_json"]

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # to the end where the last one is not closed
_BRACKET = re.compile(rb"[\[\]{}]")

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_p": (1, 1.0),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
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


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message; text is the only kind, so that no URL of a request is ever opened."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message. `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    def message(self) -> Message:
        """The same in the words of the project."""
        parts = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return Message("system" if self.role == "developer" else self.role, parts)


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=256)
    """Only its hash is kept, in the log."""
    prompt_cache_key: str | None = Field(default=None, min_length=1, max_length=256)
    """Names the conversation, like the header `x-session-id`."""

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop is not None and not all([stop] if isinstance(stop, str) else stop):
            raise ValueError("a stop string must not be empty")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def reply_tokens(self) -> int | None:
        """The limit of a reply, under either name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def conversation(self) -> tuple[Message, ...]:
        """The messages in the words of the project."""
        return tuple(message.message() for message in self.messages)


def parse_json(body: bytes, limits: LimitSettings) -> dict[str, Any]:
    """A JSON object, read strictly: no duplicate keys, no NaN, no text that UTF-8 cannot hold.

    Raises:
        ApiError: it is not one, or it is deeper or wider than the limits.
    """
    _measure(body, limits)
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is not valid JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return value


def parse_chat(body: bytes, limits: LimitSettings) -> ChatRequest:
    """The request in a body, within the limits.

    Raises:
        ApiError: 400, naming the parameter that is wrong.
    """
    values = {name: value for name, value in parse_json(body, limits).items() if value is not None}
    for name in values.keys() & _NEUTRAL.keys():
        # `1 == True` in Python: a boolean where a number belongs is not neutral.
        value = values.pop(name)
        if not any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[name]):
            raise ApiError(
                400, "unsupported_parameter", f"the parameter {name!r} is not supported: leave it out", name
            )
    try:
        request = ChatRequest.model_validate(values)
    except ValidationError as error:
        _refuse(error)
    _check(request, limits)
    return request


def _check(request: ChatRequest, limits: LimitSettings) -> None:
    if len(request.messages) > limits.messages:
        _too_long("messages", f"at most {limits.messages} messages")
    for index, message in enumerate(request.conversation()):
        if len(message.content) > limits.message_chars:
            _too_long(f"messages[{index}].content", f"at most {limits.message_chars} characters")
        _check_text(message.content, f"messages[{index}].content")
    for text, name in ((request.user, "user"), (request.prompt_cache_key, "prompt_cache_key")):
        _check_text(text or "", name)
    if request.n > limits.choices:
        _too_long("n", f"at most {limits.choices} choices")
    if len(request.stops) > limits.stops:
        _too_long("stop", f"at most {limits.stops} stop strings")
    for stop in request.stops:
        _check_text(stop, "stop")
        if len(stop) > limits.stop_chars:
            _too_long("stop", f"stop strings of at most {limits.stop_chars} characters")
    if request.max_tokens and request.max_completion_tokens:
        raise ApiError(
            400,
            "invalid_parameter",
            "give one of max_tokens and max_completion_tokens, not both",
            "max_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "invalid_parameter", "stream_options needs stream = true", "stream_options")
    if request.messages[-1].role == "assistant":
        raise ApiError(
            400,
            "invalid_parameter",
            "the last message is the assistant's: there is nothing to reply to",
            "messages",
        )


def _too_long(param: str, wanted: str) -> NoReturn:
    raise ApiError(400, "limit_exceeded", f"{param} is beyond the limit: {wanted} are allowed", param)


def _check_text(text: str, param: str) -> None:
    """Refuse what no tokenizer can take: lone surrogates, and NUL, which means something in C only."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "invalid_parameter", f"{param} holds half of a character", param) from None
    if "\0" in text:
        raise ApiError(400, "invalid_parameter", f"{param} holds a NUL character", param)


def _measure(body: bytes, limits: LimitSettings) -> None:
    """Count levels and containers of a body without building anything from it."""
    depth = containers = 0
    for match in _BRACKET.finditer(_STRING.sub(b"", body)):
        if match[0] in b"]}":
            depth -= 1
            continue
        depth, containers = depth + 1, containers + 1
        if depth > limits.depth:
            raise ApiError(400, "limit_exceeded", f"the body is nested deeper than {limits.depth} levels")
        if containers > limits.containers:
            raise ApiError(
                400, "limit_exceeded", f"the body holds more than {limits.containers} lists and objects"
            )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and infinities are not JSON")


def _refuse(error: ValidationError) -> NoReturn:
    """The first problem as an ApiError; pydantic's own text would repeat what was sent."""
    first = error.errors(include_input=False, include_url=False)[0]
    path = [part for part in first["loc"] if isinstance(part, int) or plain_name(part)]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    # Of a union pydantic names the branch as well (`content.str`), which is no part of the parameter's name.
    name = re.sub(r"\.(str|list\[\w+\])(?=$|[.\[])", "", name)
    param = plain_name(name)
    if first["type"] == "extra_forbidden":
        raise ApiError(
            400,
            "unknown_parameter",
            f"there is no parameter {param!r}" if param else "unknown parameter",
            param,
        )
    if first["type"] == "missing":
        raise ApiError(400, "missing_parameter", f"the parameter {param!r} is missing", param)
    problem = {"literal_error": "is none of the allowed values"}.get(
        first["type"], str(first["msg"]).removeprefix("Value error, ").lower()
    )
    raise ApiError(400, "invalid_parameter", f"{param or 'a parameter'}: {problem}", param)
