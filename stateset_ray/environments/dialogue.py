"""Simulated users: pieces from which environments build somebody to talk to.

A user knows `Fact`s and tells each only when asked for it, in words drawn from a seed. It hears empty and
repeated replies (`Memory`), understands what it is told (`stated`), and has only so much patience.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Answer", "Fact", "Memory", "SimulatedUser", "pick", "stated"]

_REQUEST = re.compile(
    r"\?|\b(?:what|which|where|tell|give|provide|share|send|enter|need|may|could|can|please|require|confirm)\b",
    re.IGNORECASE,
)
# What, right before a wording, turns "it has shipped" into something else: "has not been shipped",
# "cannot be shipped", "could be shipped", "once shipped".
_DENIAL = re.compile(
    r"(?:\b(?:not|never|no|cannot|can|could|may|might|would|if|once|when|until|before|after)|n't)"
    r"(?: (?:yet|been|be|already|it|is|has))*\s*\Z",
    re.IGNORECASE,
)
_DENIAL_REACH = 40


def pick(rng: random.Random, phrasings: Sequence[str], **values: object) -> str:
    """One of several phrasings, with `{names}` filled in.

    Example:
        >>> pick(random.Random(0), ["It is {number}."], number=7)
        'It is 7.'
    """
    return rng.choice(phrasings).format(**values)


def stated(text: str, wordings: Mapping[str, str]) -> frozenset[str]:
    """Which values a text states, as opposed to denies or supposes.

    Args:
        text: what was said.
        wordings: for each value, a regular expression of the ways to say it.

    Example:
        >>> sorted(stated("It has shipped, it was not delivered.", {"out": "shipped", "in": "delivered"}))
        ['out']
    """
    return frozenset(
        value
        for value, wording in wordings.items()
        if any(
            not _DENIAL.search(text, max(0, match.start() - _DENIAL_REACH), match.start())
            for match in re.finditer(wording, text, re.IGNORECASE)
        )
    )


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that a user knows and tells when asked.

    Attributes:
        name: what the environment calls it.
        topic: a regular expression of what a question for it mentions.
        answers: what the user says the first time it is asked, the second time, and so on; each a choice
            of phrasings. After the last of them the fact is told.
        reminder: what it says when asked for what it has told already.

    Example:
        >>> Fact("order", r"number", answers=(("Hm, wait.",), ("It is 7.", "7.")), reminder="I said 7.").name
        'order'
    """

    name: str
    topic: str
    answers: tuple[tuple[str, ...], ...]
    reminder: str

    def asked_in(self, text: str) -> bool:
        """Whether a text asks for this fact."""
        return bool(_REQUEST.search(text) and re.search(self.topic, text, re.IGNORECASE))


@dataclass(frozen=True, slots=True)
class Answer:
    """How a user answers a question.

    Attributes:
        text: what it says; empty if nothing was asked that it knows.
        advanced: facts of which it told something new.
        again: facts that it was asked for though it had told them.
    """

    text: str = ""
    advanced: tuple[str, ...] = ()
    again: tuple[str, ...] = ()


class Memory:
    """Remembers replies, to notice those that say nothing or nothing new.

    Example:
        >>> memory = Memory()
        >>> [memory.fault(text) for text in ("Hello!", "hello", " ... ")]
        ['', 'repeated', 'empty']
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def fault(self, text: str) -> str:
        """What is wrong with a reply: "empty", "repeated" (but for case and punctuation), or ""."""
        words = " ".join(re.findall(r"\w+", text.casefold()))
        if not words:
            return "empty"
        if words in self._seen:
            return "repeated"
        self._seen.add(words)
        return ""


class SimulatedUser:
    """Somebody who answers questions, complains, and leaves when out of patience.

    Args:
        facts: what it knows.
        patience: at the how-manieth complaint it leaves.
        rng: chooses its words.
        complaints: for each kind of complaint its phrasings; "" is for all other kinds.

    Example:
        >>> fact = Fact("order", "number", (("It is 7.",),), "I said 7.")
        >>> user = SimulatedUser([fact], patience=2, rng=random.Random(0), complaints={"": ["Pardon?"]})
        >>> user.answer("What is the number?").text, user.complain("empty"), user.left
        ('It is 7.', 'Pardon?', False)
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        *,
        patience: int,
        rng: random.Random,
        complaints: Mapping[str, Sequence[str]],
    ) -> None:
        self._facts = tuple(facts)
        self._told = {fact.name: 0 for fact in facts}
        self._patience = patience
        self._rng = rng
        self._complaints = complaints

    @property
    def left(self) -> bool:
        """Whether its patience is used up."""
        return self._patience <= 0

    @property
    def untold(self) -> tuple[str, ...]:
        """The facts that it has not told in full, in order."""
        return tuple(fact.name for fact in self._facts if self._told[fact.name] < len(fact.answers))

    def times_asked(self, name: str) -> int:
        """How many of a fact's answers it has given."""
        return self._told[name]

    def answer(self, text: str) -> Answer:
        """Answer the questions in a text; repeats what it has told only if nothing new is asked."""
        said: list[str] = []
        advanced: list[str] = []
        again: list[Fact] = []
        for fact in self._facts:
            if not fact.asked_in(text):
                continue
            if self._told[fact.name] == len(fact.answers):
                again.append(fact)
                continue
            said.append(self._rng.choice(fact.answers[self._told[fact.name]]))
            self._told[fact.name] += 1
            advanced.append(fact.name)
        words = " ".join(said or [fact.reminder for fact in again])
        return Answer(words, tuple(advanced), tuple(fact.name for fact in again))

    def complain(self, kind: str) -> str:
        """Lose some patience and say so."""
        self._patience -= 1
        return self._rng.choice(self._complaints.get(kind) or self._complaints[""])
