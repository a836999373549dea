"""What ingress and policy replicas say to each other: one question, and the events of its answer.

Events travel in tuples, as many as there are at the time, so that a fast policy costs few messages; but no
more than a message of gRPC holds, which is 4 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

from stateset_ray.serving.faults import ApiError
from stateset_ray.types import Message

_CHARACTERS = 1 << 16  # of one part
_TOKENS = 512  # of one part; each may be 21 texts with their log-probabilities

__all__ = [
    "Ask", "Began", "Ended", "Event", "Halted", "Piece", "Refused", "Stepped", "TokenLogprob", "in_parts",
]  # fmt: skip


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
        top_p: the likeliest tokens that hold so much are sampled from; 1 for all.
        top: how many of the likeliest tokens are wanted beside each.
        prompt: text or token ids to go on with as they are, in the place of messages.
        lot: by what a canary is drawn; "" for the session, or the id. The asks of one request share it.
        tools: OpenAI's tools as JSON, for the chat template; "" for none.
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
    top_p: float = 1.0
    top: int = 0
    prompt: str | tuple[int, ...] | None = None
    tools: str = ""
    lot: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token as text, and its natural log-probability; `top` are the likeliest in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


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


@dataclass(frozen=True, slots=True)
class Stepped:
    """An agent has called a tool and was told the result.

    Attributes:
        tool: its name; "" where the call could not be read.
        outcome: `done`, or why the tool did nothing.
        messages: the call as the policy wrote it, and the result as it was told.
        version: of the policy that called.
        tokens: that were sampled for the call.
        seconds: that the tool took.
    """

    tool: str
    outcome: str
    messages: tuple[Message, Message]
    version: str
    tokens: int
    seconds: float
    arguments: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Halted:
    """An agent was stopped after it had called tools: by this error, which is told beside what was done."""

    code: str
    message: str


Event = Began | Piece | Ended | Refused | Stepped | Halted


def in_parts(events: Iterable[Event]) -> Iterator[tuple[Event, ...]]:
    """The same events in tuples that a message can hold, and long pieces of text as several."""
    part: list[Event] = []
    room = 1.0
    for event in events:
        for piece in _cut(event):
            part.append(piece)
            if isinstance(piece, Piece):
                room -= len(piece.text) / _CHARACTERS + len(piece.tokens) / _TOKENS
            if room <= 0:
                yield tuple(part)
                part, room = [], 1.0
    if part:
        yield tuple(part)


def _cut(event: Event) -> Iterator[Event]:
    if not isinstance(event, Piece) or (len(event.text) <= _CHARACTERS and len(event.tokens) <= _TOKENS):
        yield event
        return
    texts = (event.text[at : at + _CHARACTERS] for at in range(0, len(event.text), _CHARACTERS))
    tokens = (event.tokens[at : at + _TOKENS] for at in range(0, len(event.tokens), _TOKENS))
    for text, some in zip_longest(texts, tokens):
        yield Piece(event.choice, text or "", some or ())
