"""What rows end as, and what they end with before a model is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stateset_ray.dataset.rows import Id, Row
from stateset_ray.errors import TemplateError
from stateset_ray.policies.renderer import Renderer, characters
from stateset_ray.types import Message

__all__ = ["Answers", "Ended", "check_characters", "counted", "error", "prompt_of"]


class Answers(Protocol):
    """Works on rows."""

    def answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What becomes of each row, in order; a row that fails is an `error`.

        Args:
            rows: without a problem.
        """
        ...


class Ended(Exception):
    """A row ends with an error.

    Attributes:
        kind: one word, by which errors are counted.
        message: for people.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


def error(id: Id, kind: str, message: str) -> dict[str, Any]:
    """What a row that failed ends as."""
    return {"id": id, "error": {"kind": str(kind), "message": message}}


def counted(done: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many rows ended with which error; "" is none.

    Example:
        >>> counted([{"id": 1}, {"id": 2}, error(3, "invalid", "it has no messages")])
        {'': 2, 'invalid': 1}
    """
    return dict(Counter(row["error"]["kind"] if "error" in row else "" for row in done))


def check_characters(renderer: Renderer, messages: Sequence[Message], most: int) -> None:
    """Refuse what is far too long before rendering it costs anything.

    Raises:
        Ended: so many characters cannot be `most` tokens.
    """
    said = characters(messages)
    if said > most * renderer.longest_token:
        raise Ended("too_long", f"{said} characters cannot fit into rollout.max_context = {most} tokens")


def prompt_of(renderer: Renderer, messages: Sequence[Message], most: int) -> tuple[int, ...]:
    """A conversation as a prompt, with room for one more token.

    Args:
        most: tokens of a conversation, `rollout.max_context`.

    Raises:
        Ended: it is too long, or the chat template refuses it.
    """
    check_characters(renderer, messages, most)
    try:
        prompt = renderer.opening(messages)
    except TemplateError as fault:
        raise Ended("template", fault.problem) from None
    if len(prompt) >= most:
        raise Ended("too_long", f"{len(prompt)} tokens leave no room in rollout.max_context = {most}")
    return prompt
