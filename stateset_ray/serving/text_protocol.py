"""What clients send to go on with a text: OpenAI's `/v1/completions`, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.reading import (
    SamplingRequest,
    check_sampling,
    check_text,
    parse_json,
    read,
    too_long,
)
from stateset_ray.serving.settings import LimitSettings

__all__ = ["TextRequest", "parse_text"]

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "suffix": ("",),
}
"""OpenAI's parameters that are not supported -> the values that ask for nothing."""

_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_Text = Annotated[str, Field(min_length=1)]


class TextRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: _Text | _Ids | Annotated[list[_Text] | list[_Ids], Field(min_length=1)]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    """How many of the likeliest tokens are told beside each; 0: the token itself."""

    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (tuple(self.prompt),)
        return tuple(p if isinstance(p, str) else tuple(p) for p in self.prompt)


def parse_text(body: bytes, limits: LimitSettings) -> TextRequest:
    """The request in a body, within the limits.

    Raises:
        ApiError: 400, naming the parameter that is wrong.
    """
    try:
        request = read(parse_json(body, limits), TextRequest, _NEUTRAL)
    except ApiError as error:
        if error.code != "invalid_parameter" or not (error.param or "").startswith("prompt"):
            raise
        wanted = "prompt: give a text, token ids, or a list of either, and none of them empty"
        raise ApiError(400, "invalid_parameter", wanted, "prompt") from None
    check_sampling(request, limits)
    prompts = request.prompts()
    if len(prompts) * request.n > limits.choices:
        too_long("prompt", f"prompts and choices of at most {limits.choices} replies")
    for prompt in prompts:
        if isinstance(prompt, str):
            if len(prompt) > limits.message_chars:
                too_long("prompt", f"at most {limits.message_chars} characters")
            check_text(prompt, "prompt")
    return request
