"""One row of a data set: what it has to say for each thing that can be done with it, checked.

    generate  {"id": "a", "messages": [{"role": "user", "content": "Where is my parcel?"}]}
    score     {"id": "b", "messages": [... at least one reply of the assistant among them]}
    play      {"id": "c", "index": 3, "split": "heldout"}          a task that the environment makes
              {"id": "d", "seed": 7, "data": {...}}                a task as it is

A row that cannot be used has a `problem` and no content; it ends in the output like any other. Fields that
are not named above are left alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from stateset_ray.types import Message, Role, Split, Task

__all__ = ["TASK_FIELDS", "Id", "Mode", "Row", "checked_id", "row_of", "row_of_line"]

Mode = Literal["generate", "score", "play"]
Id = str | int

TASK_FIELDS = ("split", "index", "seed", "data")
"""What a row may say of a task."""
_LONGEST_ID = 512  # characters


@dataclass(frozen=True, slots=True)
class Row:
    """One row, ready to be worked on; exactly one of the last four is there.

    Attributes:
        index: of a task of the environment, with its split.
        problem: why it cannot be used.
    """

    id: Id
    messages: tuple[Message, ...] = ()
    task: Task | None = None
    index: tuple[Split, int] | None = None
    problem: str = ""


def row_of_line(line: bytes, number: int, mode: Mode) -> Row:
    """The row that a line of JSON holds; `number` names it where it has no id."""
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return Row(f"row-{number}", problem=f"this line is no JSON: {error}")
    if not isinstance(content, dict):
        return Row(f"row-{number}", problem=f"a row is an object, not {type(content).__name__}")
    return row_of(content, number, mode)


def row_of(content: dict[str, Any], number: int, mode: Mode) -> Row:
    """A row's content, checked; None is nothing, as Parquet has no other way to leave a field out."""
    content = {name: value for name, value in content.items() if value is not None}
    id, problem = checked_id(content.get("id"), number)
    if problem:
        return Row(id, problem=problem)
    try:
        if mode == "play":
            return _task(id, content)
        return Row(id, messages=_messages(content, mode))
    except _Unusable as error:
        return Row(id, problem=str(error))


class _Unusable(Exception):
    """Why a row cannot be used."""


def checked_id(value: Any, number: int) -> tuple[Id, str]:
    """A row's id, or a name for it and what is wrong with the one that was given."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, ""
    if isinstance(value, str) and 0 < len(value) <= _LONGEST_ID and _writable(value):
        return value, ""
    wrong = "it has no id" if value is None else f"its id is {value!r:.80}"
    return f"row-{number}", f"{wrong}; a row needs one, a number or a text of up to {_LONGEST_ID} characters"


def _messages(content: dict[str, Any], mode: Mode) -> tuple[Message, ...]:
    said = content.get("messages")
    if isinstance(said, str):  # a Parquet column may hold JSON
        try:
            said = json.loads(said)
        except (ValueError, RecursionError) as error:
            raise _Unusable(f"messages is a text that is no JSON: {error}") from None
    if not isinstance(said, list) or not said:
        raise _Unusable("messages must be a list of at least one message")
    messages = tuple(_message(message, index) for index, message in enumerate(said))
    roles = [message.role for message in messages]
    if mode == "generate" and roles[-1] == "assistant":
        raise _Unusable("the last message is the assistant's, so there is nothing to reply to")
    if mode == "score":
        if "assistant" not in roles:
            raise _Unusable("there is no message of the assistant, so there is nothing to score")
        if roles[0] == "assistant" or ("assistant", "assistant") in pairwise(roles):
            raise _Unusable("every message of the assistant needs one before it that it replies to")
    return messages


def _message(value: Any, index: int) -> Message:
    """One message in the shape that OpenAI's clients send; what it says beside its text is refused."""
    if not isinstance(value, dict):
        raise _Unusable(f"messages[{index}] is no object")
    value = {name: part for name, part in value.items() if part is not None}
    if foreign := value.keys() - {"role", "content"}:
        raise _Unusable(f"messages[{index}] has {min(foreign)!r}, which is not supported")
    role, content = value.get("role"), value.get("content")
    known: dict[Any, Role] = {role: role for role in get_args(Role)} | {"developer": "system"}
    if not isinstance(role, str) or role not in known:
        raise _Unusable(f"messages[{index}].role is {role!r:.80}, not one of {', '.join(known)}")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not _writable(content):
        raise _Unusable(f"messages[{index}].content is no text")
    return Message(known[role], content)


def _task(id: Id, content: dict[str, Any]) -> Row:
    split, index, seed, data = (content.get(name) for name in TASK_FIELDS)
    if split not in (None, *get_args(Split)):
        raise _Unusable(f"split is {split!r:.80}, not one of {', '.join(get_args(Split))}")
    which: Split = "heldout" if split is None else split
    if (index is None) == (seed is None):
        raise _Unusable("a task needs an index, or a seed with its data, one of the two")
    for name, number in (("index", index), ("seed", seed)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
            raise _Unusable(f"{name} is {number!r:.80}, not a number of 0 or more")
    if index is not None:
        if data is not None:
            raise _Unusable("data goes with a seed: the task of an index is the environment's own")
        return Row(id, index=(which, index))
    if not isinstance(data or {}, dict):
        raise _Unusable("data is no object")
    return Row(id, task=Task(str(id), int(seed or 0), which, dict(data or {})))


def _writable(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON can name half of a pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
