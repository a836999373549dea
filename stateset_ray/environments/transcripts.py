"""Logged conversations, replayed: the partner says what it said, the expert replies what was replied.

It is what a sample of served conversations (`transcripts.folder` of an endpoint) is fed back through: warm
start (`train.warm_start.steps`) learns the logged replies, through the same rollout, mask and optimizer as
everything else. Each line of a file is one conversation, with at least

    {"messages": [{"role": "user", "content": "hi"}], "replies": [{"content": "Hello!"}]}

A reply that was cut, by its limit (`"finish"` is not `"stop"`) or by stop strings of the client (`"stops"`
names some), is no example of one: it is left out, and so is what was said after it.

Nobody answers what the policy says here: after a reply that differs, the partner goes on as if it had not.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from stateset_ray.environments.base import Environment
from stateset_ray.errors import ConfigError
from stateset_ray.types import Message, Role, Split, Step, Task, derive_seed

__all__ = ["Transcripts"]

_HELD_OUT = 10  # one conversation in so many


class Transcripts(Environment):
    """Replays logged conversations; a reply earns how much of its words are those that were logged.

    A line that is the beginning of another (an earlier turn of the same conversation) is left out. About a
    tenth of the conversations, chosen by their words, are held out.

    Args:
        path: a file of lines, or a folder of `*.jsonl`; it must stay as it is while a run goes on.
        versions: only what was answered by versions whose names begin so; "" for all.

    Raises:
        ConfigError: there is no such file, a line of it is none of the above, or nothing is left.
    """

    def __init__(self, path: str, versions: str = "") -> None:
        self._conversations = _load(path, versions)
        self._said: Sequence[Message] = ()
        self._place = 0
        self._turns = 1

    def task(self, split: Split, index: int) -> Task:
        """The conversations of a split in turn, in another order each time round."""
        numbers = [
            n for n, (held_out, _) in enumerate(self._conversations) if held_out == (split == "heldout")
        ]
        if not numbers:  # too few to hold any out
            numbers = list(range(len(self._conversations)))
        turn, place = divmod(index, len(numbers))
        random.Random(derive_seed("transcripts", split, turn)).shuffle(numbers)
        task = super().task(split, index)
        return Task(id=task.id, seed=task.seed, split=split, data={"conversation": numbers[place]})

    async def reset(self, task: Task, seed: int) -> Step:
        """Say what was said before the first reply; nothing is random."""
        self._said = self._conversations[task.data["conversation"]][1]
        self._turns = sum(message.role == "assistant" for message in self._said)
        self._place = 0
        return Step(self._next())

    async def step(self, message: Message) -> Step:
        """Compare a reply with the logged one, and go on as the log does."""
        reward = _alike(message.content, self.expert()) / self._turns
        self._place += 1
        following = self._next()
        return Step(following, reward=reward, terminated=self._place == len(self._said))

    def expert(self) -> str:
        """The reply that was logged here."""
        return self._said[self._place].content

    def _next(self) -> tuple[Message, ...]:
        """The messages up to the next reply."""
        first = self._place
        while self._place < len(self._said) and self._said[self._place].role != "assistant":
            self._place += 1
        return tuple(self._said[first : self._place])


_Conversation = tuple[bool, tuple[Message, ...]]  # (held out, messages, the last of them a reply)


@lru_cache(8)
def _load(path: str, versions: str) -> tuple[_Conversation, ...]:
    """Read once in a process: every conversation has an environment of its own."""
    root = Path(path)
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    found, cut = set[tuple[Message, ...]](), set[tuple[Message, ...]]()
    for file in files:
        for talk, record in _read(file):
            if _is_cut(record):
                cut.add(talk)
            elif _playable(talk) and str(record.get("version", "")).startswith(versions):
                found.add(talk)
    found = {talk for talk in found if not any(talk[:end] in cut for end in range(1, len(talk)))}
    beginnings = {talk[:end] for talk in found for end in range(1, len(talk))}
    kept = sorted(found - beginnings, key=lambda talk: [(m.role, m.content) for m in talk])
    if not kept:
        raise ConfigError(
            "there are no conversations to replay", given=path,
            mend="give a file or a folder of transcripts (docs/serving.md says how they are logged)",
        )  # fmt: skip
    return tuple((_held_out(talk), talk) for talk in kept)


def _held_out(talk: Sequence[Message]) -> bool:
    # By its opening: what begins alike is on one side, else a policy would be examined in what it has read.
    return derive_seed("heldout", *(m.content for m in talk[:1])) % _HELD_OUT == 0


def _is_cut(record: dict[str, Any]) -> bool:
    """Whether its reply may be only the beginning of one."""
    return record["replies"][0].get("finish", "stop") != "stop" or bool(record.get("stops"))


def _read(file: Path) -> Iterator[tuple[tuple[Message, ...], dict[str, Any]]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the transcripts cannot be read", given=str(file)) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            messages = [
                *record["messages"],
                {"role": "assistant", "content": record["replies"][0]["content"]},
            ]
            talk = tuple(_message(message) for message in messages)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"line {number} of the transcripts is no conversation", given=str(file),
                mend='each line is {"messages": [{"role", "content"}, ...], "replies": [{"content"}]}',
            ) from error  # fmt: skip
        yield talk, record


def _playable(talk: Sequence[Message]) -> bool:
    """Whether each reply says something, and answers something."""
    replies = [place for place, message in enumerate(talk) if message.role == "assistant"]
    return all(p > 0 and talk[p].content.strip() and talk[p - 1].role != "assistant" for p in replies)


def _message(body: dict[str, Any]) -> Message:
    role, content = body["role"], body["content"]
    if role not in get_args(Role) or not isinstance(content, str):
        raise ValueError(role)
    return Message(role, content)


def _alike(one: str, other: str) -> float:
    """How much two texts share of their words: the harmonic mean of both shares."""
    mine, theirs = (Counter(re.findall(r"\w+|[^\w\s]", text.casefold())) for text in (one, other))
    shared = (mine & theirs).total()
    return 2 * shared / max(1, mine.total() + theirs.total())
