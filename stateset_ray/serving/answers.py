"""What clients get: OpenAI's chat completions, whole or in chunks, made from the events of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stateset_ray.serving.events import Began, Ended, Event, Piece, TokenLogprob

__all__ = ["DONE", "Answer", "Usage", "framed"]

DONE = b"data: [DONE]\n\n"
"""The last frame of every stream, also of one that ended in an error."""


@dataclass
class Usage:
    """Tokens of an answer."""

    prompt: int = 0
    completion: int = 0

    def body(self) -> dict[str, int]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass
class Answer:
    """Collects the events of one answer and gives its bodies.

    Attributes:
        id: of the completion.
        model: as the client named it.
        created: seconds since the epoch.
        version: of the policy, once it began.
    """

    id: str
    model: str
    created: int
    choices: int = 1
    logprobs: bool = False
    version: str = ""
    usage: Usage = field(default_factory=Usage)
    _texts: list[list[str]] = field(default_factory=list)
    _tokens: list[list[TokenLogprob]] = field(default_factory=list)
    _finish: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._texts = [[] for _ in range(self.choices)]
        self._tokens = [[] for _ in range(self.choices)]

    def take(self, events: Iterable[Event]) -> None:
        """Note what happened."""
        for event in events:
            if isinstance(event, Began):
                self.version, self.usage.prompt = event.version, event.prompt_tokens
            elif isinstance(event, Piece):
                self._texts[event.choice].append(event.text)
                self._tokens[event.choice] += event.tokens
            elif isinstance(event, Ended):
                self._finish[event.choice] = event.finish
                self.usage.completion += event.tokens

    def completion(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
                "logprobs": _logprobs(self._tokens[index]) if self.logprobs else None,
                "finish_reason": self._finish[index],
            }
            for index, texts in enumerate(self._texts)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage.body()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The first chunk of each choice, which says whose words follow."""
        for index in range(self.choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """The chunks of some events, which are taken as well."""
        for event in events:
            self.take((event,))
            if isinstance(event, Piece):
                yield self._chunk(event.choice, {"content": event.text}, tokens=event.tokens)
            elif isinstance(event, Ended):
                yield self._chunk(event.choice, {}, finish=event.finish)

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that ends a stream whose usage was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage.body()}

    def _chunk(
        self, index: int, delta: dict[str, Any], *, tokens: tuple[TokenLogprob, ...] = (),
        finish: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        logprobs = _logprobs(tokens) if self.logprobs and tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.version,
        }  # fmt: skip


def framed(body: dict[str, Any]) -> bytes:
    """One server-sent event; JSON has no raw line ends, so no content can forge another event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    content = [
        {
            "token": token.text,
            "logprob": token.logprob,
            # A token may be a part of a character, which has no text of its own.
            "bytes": None if "\ufffd" in token.text else list(token.text.encode()),
            "top_logprobs": [],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}
