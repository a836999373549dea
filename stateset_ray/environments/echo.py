"""The smallest useful environment: say back the word that the user says.

Rewards are dense, so that even a policy that starts from noise learns from them, and no reply that
ignores the user's word earns anything in expectation.
"""

from __future__ import annotations

import random
from functools import lru_cache

from stateset_ray.environments.base import Environment
from stateset_ray.errors import ConfigError
from stateset_ray.types import Message, Step, Task

__all__ = ["Echo"]

_FAR = 128
"""The distance between two character codes at which a wrong character is as wrong as it can be."""


class Echo(Environment):
    """The user says "Say: cab" and the policy must answer "cab".

    Every position of the longer of word and reply is scored and the turn earns the mean, divided by
    `turns`: a perfect conversation totals 1.0 and none totals less than -1.0.

    | position                                  | score                                          |
    |-------------------------------------------|------------------------------------------------|
    | the right letter                          | 1                                              |
    | a wrong letter of the alphabet            | -1 / (letters - 1): guessing earns 0 on average |
    | a character from outside the alphabet     | that to -1, the worse the further its code lies |
    | nothing, or a character beyond the word   | -1                                             |

    Every letter occurs equally often in a word, as far as its length allows, so that one letter
    repeated earns nothing either.

    Args:
        length: letters per word.
        alphabet: the letters, at least two.
        turns: words per conversation.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> import asyncio
        >>> echo = Echo(turns=1)
        >>> opening = asyncio.run(echo.reset(echo.task("train", 0), seed=0))
        >>> asyncio.run(echo.step(Message("assistant", echo.expert()))).reward
        1.0
    """

    def __init__(self, length: int = 3, alphabet: str = "abc", turns: int = 2) -> None:
        if length < 1 or turns < 1:
            raise ConfigError(
                "Echo needs length and turns of at least 1", given={"length": length, "turns": turns}
            )
        if len(set(alphabet)) != len(alphabet) or len(alphabet) < 2 or any(c.isspace() for c in alphabet):
            raise ConfigError(
                "Echo needs an alphabet of two or more different letters",
                given=alphabet,
                mend='set environment.options.alphabet, for instance to "abc"',
            )
        self._length, self._alphabet, self._turns = length, alphabet, turns
        self._words: tuple[str, ...] = ()
        self._turn = 0
        self._right = 0

    async def reset(self, task: Task, seed: int) -> Step:
        """Draw the words from the task's seed and say the first; nothing else is random."""
        self._words = _words(task.seed, self._length, self._alphabet, self._turns)
        self._turn = self._right = 0
        return Step((self._say(),))

    async def step(self, message: Message) -> Step:
        """Score one reply and say the next word, or end after the last."""
        word, reply = self.expert(), message.content.strip()
        self._turn += 1
        self._right += word == reply
        ended = self._turn == self._turns
        return Step(
            messages=() if ended else (self._say(),),
            reward=self._score(word, reply) / self._turns,
            terminated=ended,
            info={"right": self._right, "solved": self._right == self._turns},
        )

    def expert(self) -> str:
        """The word that was asked for."""
        if not self._turn < len(self._words):
            raise RuntimeError("the conversation is over or has not begun: call reset first")
        return self._words[self._turn]

    def _say(self) -> Message:
        return Message("user", f"Say: {self.expert()}")

    def _score(self, word: str, reply: str) -> float:
        if reply == word:
            return 1.0
        positions = max(len(word), len(reply))
        scores = [self._match(want, got) for want, got in zip(word, reply, strict=False)]
        return (sum(scores) - (positions - len(scores))) / positions

    def _match(self, want: str, got: str) -> float:
        if got == want:
            return 1.0
        wrong = -1 / (len(self._alphabet) - 1)
        if got in self._alphabet:
            return wrong
        # The distance tells a policy that starts from random bytes which way to go.
        far = min(1.0, abs(ord(got) - ord(want)) / _FAR)
        return wrong + (-1 - wrong) * (0.5 + far / 2)


@lru_cache(1024)
def _words(seed: int, length: int, alphabet: str, count: int) -> tuple[str, ...]:
    """The words of a task, drawn once for all who play it: a generator's seeding is half of a reset."""
    rng, words = random.Random(seed), list[str]()
    rounds, rest = divmod(length, len(alphabet))
    for _ in range(count):
        letters = [*(alphabet * rounds), *rng.sample(alphabet, rest)]
        rng.shuffle(letters)
        words.append("".join(letters))
    return tuple(words)
