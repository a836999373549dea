"""What ingress and policy replicas say to each other: one question, and the events of its answer.

Events travel in tuples, as many as there are at the time, so that a fast policy costs few messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stateset_ray.serving.faults import ApiError
from stateset_ray.types import Message

__all__ = ["Ask", "Began", "Ended", "Event", "Piece", "Refused", "TokenLogprob"]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a policy replica is asked; it holds no key and no header.

    Attributes:
        id: of the request, as logs name it.
        tenant: the key's name: what is remembered for one is not used for another.
        session: names the conversation, so that its cache is kept; "" for none.
        max_tokens: of each reply; None for as many as there is room for.
        seed: all randomness of the answer.
        choices: how many replies.
        logprobs: whether tokens are wanted with their log-probabilities.
        stream: whether pieces are wanted as soon as they are there.
        canary: whether a canary may answer; not where a replica was lost over this request already.
    """

    id: str
    tenant: str
    session: str
    messages: tuple[Message, ...]
    max_tokens: int | None
    temperature: float
    seed: int
    stops: tuple[str, ...] = ()
    choices: int = 1
    logprobs: bool = False
    stream: bool = False
    canary: bool = True


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token as text, and its natural log-probability where it was sampled."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Began:
    """The first token was sampled; from here on the answer belongs to one version of one replica."""

    version: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of one choice."""

    choice: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A choice is complete.

    Attributes:
        tokens: that were sampled for it.
    """

    choice: int
    finish: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The request cannot be answered, here or anywhere."""

    status: int
    code: str
    message: str
    param: str | None = None

    def error(self) -> ApiError:
        """The same, to be raised."""
        return ApiError(self.status, self.code, self.message, self.param)


Event = Began | Piece | Ended | Refused
