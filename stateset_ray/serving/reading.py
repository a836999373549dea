"""Bodies of requests, read strictly: measured before they are parsed, parsed before anything else.

Every parameter is honoured or refused by name, and none is ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stateset_ray.serving.faults import ApiError, plain_name
from stateset_ray.serving.settings import LimitSettings

__all__ = [
    "SamplingRequest", "StreamOptions", "Strict", "body_schema", "check_sampling", "check_text",
    "parse_json", "read", "too_long",
]  # fmt: skip

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # to the end where the last one is not closed
_BRACKET = re.compile(rb"[\[\]{}]")
_Model = TypeVar("_Model", bound="Strict")


class Strict(BaseModel):
    """Takes what it names, in the type that it names; what is null asks for nothing, whatever its name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        # OpenAI's client sends its own messages back with `"refusal": null` and the like.
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class SamplingRequest(Strict):
    """What requests for conversations and for plain text have in common."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=256)
    """Only its hash is kept, in the log."""

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
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse_json(body: bytes, limits: LimitSettings) -> dict[str, Any]:
    """A JSON object, read strictly: no duplicate keys, no NaN or infinity, no text that UTF-8 cannot hold.

    Raises:
        ApiError: it is not one, or it is deeper or wider than the limits.
    """
    _measure(body, limits)
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant,
            parse_float=_finite,
        )  # fmt: skip
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is not valid JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return value


def read(values: Mapping[str, Any], model: type[_Model], neutral: Mapping[str, tuple[Any, ...]]) -> _Model:
    """The request in the values of a body.

    Args:
        neutral: parameters that are not supported -> the values that ask for nothing.

    Raises:
        ApiError: 400, naming the parameter that is wrong.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name in given.keys() & neutral.keys():
        # `1 == True` in Python: a boolean where a number belongs is not neutral.
        value = given.pop(name)
        if not any(value == nothing and type(value) is type(nothing) for nothing in neutral[name]):
            raise ApiError(
                400, "unsupported_parameter", f"the parameter {name!r} is not supported: leave it out", name
            )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        _refuse(error)


def body_schema(model: type[Strict]) -> dict[str, Any]:
    """What the OpenAPI document says of a body, complete in itself: it has no place for shared parts."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return whole(parts[str(node["$ref"]).rpartition("/")[2]])
            return {name: whole(value) for name, value in node.items()}
        return [whole(value) for value in node] if isinstance(node, list) else node

    content = {"application/json": {"schema": whole(schema)}}
    return {"requestBody": {"required": True, "content": content}}


def check_sampling(request: SamplingRequest, limits: LimitSettings) -> None:
    """Hold what all requests have in common against the limits.

    Raises:
        ApiError: 400, naming the parameter that is wrong.
    """
    check_text(request.user or "", "user")
    if request.n > limits.choices:
        too_long("n", f"at most {limits.choices} choices")
    if len(request.stops) > limits.stops:
        too_long("stop", f"at most {limits.stops} stop strings")
    for stop in request.stops:
        check_text(stop, "stop")
        if len(stop) > limits.stop_chars:
            too_long("stop", f"stop strings of at most {limits.stop_chars} characters")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "invalid_parameter", "stream_options needs stream = true", "stream_options")


def too_long(param: str, wanted: str) -> NoReturn:
    """Refuse what is beyond a limit.

    Raises:
        ApiError: always.
    """
    raise ApiError(400, "limit_exceeded", f"{param} is beyond the limit: {wanted} are allowed", param)


def check_text(text: str, param: str) -> None:
    """Refuse what no tokenizer can take: lone surrogates, and NUL, which means something in C only.

    Raises:
        ApiError: 400.
    """
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


def _finite(text: str) -> float:
    """`1e999` is a number in JSON, and would be an infinity here, which no JSON can say again."""
    if math.isinf(value := float(text)):
        raise ApiError(400, "invalid_json", "the body holds a number that is too large")
    return value


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
