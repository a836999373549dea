"""What clients get: OpenAI's completions, whole or in chunks, made from the events of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stateset_ray.serving.events import Began, Ended, Event, Halted, Piece, Stepped, TokenLogprob

__all__ = ["DONE", "AgentAnswer", "Answer", "TextAnswer", "Usage", "framed"]

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
    """Collects the events of one answer and gives its bodies: those of a chat completion.

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
                self.version = event.version
                self.usage.prompt += event.prompt_tokens
            elif isinstance(event, Piece):
                self._texts[event.choice].append(event.text)
                self._tokens[event.choice] += event.tokens
            elif isinstance(event, Ended):
                self._finish[event.choice] = event.finish
                self.usage.completion += event.tokens

    def text(self, choice: int = 0) -> str:
        """What was said so far."""
        return "".join(self._texts[choice])

    def finish(self, choice: int = 0) -> str:
        """How a choice ended; "" while it has not."""
        return self._finish.get(choice, "")

    def completion(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": self.text(index), "refusal": None},
                "logprobs": _logprobs(self._tokens[index]) if self.logprobs else None,
                "finish_reason": self._finish[index],
            }
            for index in range(self.choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage.body()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The first chunk of each choice, which says whose words follow."""
        for index in range(self.choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """The chunks of some events."""
        for event in events:
            if isinstance(event, Piece):
                yield self._piece(event)
            elif isinstance(event, Ended):
                yield self._end(event)

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that ends a stream whose usage was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage.body()}

    def _piece(self, event: Piece) -> dict[str, Any]:
        return self._chunk(event.choice, {"content": event.text}, tokens=event.tokens)

    def _end(self, event: Ended) -> dict[str, Any]:
        return self._chunk(event.choice, {}, finish=event.finish)

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


class AgentAnswer(Answer):
    """A chat completion with the tool calls that were made on the way.

    Attributes:
        steps: one for each call, as clients get it.
        stopped: the error that stopped the agent after it had called tools.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps: list[dict[str, Any]] = []
        self.stopped: dict[str, str] | None = None

    def take(self, events: Iterable[Event]) -> None:
        """See `Answer.take`."""
        for event in events:
            super().take((event,))
            if isinstance(event, Stepped):
                self.usage.completion += event.tokens
                self.version = event.version
                self.steps.append(_step(event))
            elif isinstance(event, Halted):
                self.stopped = _stopped(event)

    def completion(self) -> dict[str, Any]:
        """See `Answer.completion`."""
        return {**super().completion(), "steps": self.steps, "stopped": self.stopped}

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """See `Answer.chunks`; a step is a chunk without words."""
        for event in events:
            yield from super().chunks((event,))
            if isinstance(event, Stepped):
                yield {**self._chunk(0, {}), "steps": [_step(event)]}
            elif isinstance(event, Halted):
                yield {**self._chunk(0, {}), "stopped": _stopped(event)}


class TextAnswer(Answer):
    """The same as a plain completion (`/v1/completions`); its choices are those of all prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._offsets = [0] * self.choices

    def completion(self) -> dict[str, Any]:
        """See `Answer.completion`."""
        choices = [
            self._choice(index, self.text(index), self._tokens[index], self._finish[index])
            for index in range(self.choices)
        ]
        return {**self._head("text_completion"), "choices": choices, "usage": self.usage.body()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Nothing: a text has no role."""
        yield from ()

    def usage_chunk(self) -> dict[str, Any]:
        """See `Answer.usage_chunk`."""
        return {**self._head("text_completion"), "choices": [], "usage": self.usage.body()}

    def _piece(self, event: Piece) -> dict[str, Any]:
        choice = self._choice(event.choice, event.text, event.tokens, None)
        return {**self._head("text_completion"), "choices": [choice]}

    def _end(self, event: Ended) -> dict[str, Any]:
        choice = self._choice(event.choice, "", (), event.finish)
        return {**self._head("text_completion"), "choices": [choice]}

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.logprobs and tokens:
            begins = []
            for token in tokens:
                begins.append(self._offsets[index])
                self._offsets[index] += len(token.text)
            logprobs = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [dict(token.top) for token in tokens],
                "text_offset": begins,
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _stopped(event: Halted) -> dict[str, str]:
    return {"code": event.code, "message": event.message}


def _step(event: Stepped) -> dict[str, Any]:
    return {
        "tool": event.tool,
        "arguments": dict(event.arguments),
        "outcome": event.outcome,
        "seconds": round(event.seconds, 6),
        "version": event.version,
        "messages": [{"role": message.role, "content": message.content} for message in event.messages],
    }


def framed(body: dict[str, Any]) -> bytes:
    """One server-sent event; JSON has no raw line ends, so no content can forge another event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    content = [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": _bytes(token.text),
            "top_logprobs": [
                {"token": text, "logprob": logprob, "bytes": _bytes(text)} for text, logprob in token.top
            ],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _bytes(text: str) -> list[int] | None:
    # A token may be a part of a character, which has no text of its own.
    return None if "\ufffd" in text else list(text.encode())
