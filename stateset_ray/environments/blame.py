"""Luck first, work after: an environment in which it matters who is blamed for what.

The user asks for a guess, which wins or loses by the toss of a coin, and then for some replies of a kind that
anybody can learn. A policy that is told only how the whole conversation went must find out over many
conversations that the later replies had no part in the luck before them; one whose turns answer only for what
came after them (`grpo.credit = "return_to_go"`) need not. It is made for that comparison (docs/learning.md),
and so every turn of a policy that knows nothing earns 0 on average.
"""

from __future__ import annotations

import random
from itertools import count

from stateset_ray.environments.base import Environment
from stateset_ray.errors import ConfigError
from stateset_ray.types import Message, Step, Task, derive_seed

__all__ = ["Blame"]

_KINDS = {"plain": "a", "accent": "\N{LATIN SMALL LETTER E WITH ACUTE}"}
"""What is asked for, and a reply that is of the kind."""


class Blame(Environment):
    """One guess by luck, then `asks` replies by skill.

    The guess wins or loses `luck`. Which of both hangs on its every character and on the task, by a hash:
    each reply wins on half of the tasks, so that no policy that cannot see the task's seed earns anything in
    expectation, and what won once says nothing of another task. Members of a group who guess alike have the
    same luck, as they have the same task.

    Then the user says "plain" or "accent", each equally often in a conversation, and the reply wins or loses
    `(1 - luck) / asks` by its first character: an ASCII one, or any other. Whoever does not listen is right
    half of the time and earns nothing, a random policy on bytes too.

    Args:
        luck: the share of the reward that is luck, from 0 to below 1.
        asks: turns after the guess, an even number.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> import asyncio
        >>> blame = Blame(luck=0.5, asks=2)
        >>> step, earned = asyncio.run(blame.reset(blame.task("train", 0), seed=0)), []
        >>> while not step.terminated:
        ...     step = asyncio.run(blame.step(Message("assistant", blame.expert())))
        ...     earned.append(step.reward)
        >>> earned
        [0.5, 0.25, 0.25]
    """

    def __init__(self, luck: float = 0.5, asks: int = 4) -> None:
        if not 0 <= luck < 1 or asks < 2 or asks % 2:
            raise ConfigError(
                "Blame needs 0 <= luck < 1 and an even number of asks, at least 2",
                given={"luck": luck, "asks": asks},
            )
        self._luck, self._asks = luck, asks
        self._task_seed = 0
        self._ahead: list[str] = []
        self._turn = 0
        self._right = 0

    async def reset(self, task: Task, seed: int) -> Step:
        """Ask for the guess; the coin and what is asked are functions of the task's seed."""
        self._task_seed, self._turn, self._right = task.seed, 0, 0
        self._ahead = [*_KINDS] * (self._asks // 2)
        random.Random(task.seed).shuffle(self._ahead)
        return Step((Message("user", "guess"),))

    async def step(self, message: Message) -> Step:
        """Toss the coin, or look at the reply's first character; end after the last."""
        if self._turn == 0:
            won, stake = self._wins(message.content), self._luck
        else:
            won, stake = _kind(message.content) == self._ahead.pop(0), (1 - self._luck) / self._asks
            self._right += won
        self._turn += 1
        return Step(
            messages=tuple(Message("user", kind) for kind in self._ahead[:1]),
            reward=stake if won else -stake,
            terminated=not self._ahead,
            info={"right": self._right, "solved": self._right == self._asks},
        )

    def expert(self) -> str:
        """A reply of the kind; before that the first number that wins, known to who tosses the coin."""
        if self._turn:
            return _KINDS[self._ahead[0]]
        return next(str(n) for n in count() if self._wins(str(n)))

    def _wins(self, guess: str) -> bool:
        return derive_seed("coin", self._task_seed, guess) % 2 == 0


def _kind(reply: str) -> str:
    """What a reply is; of no kind if it is empty."""
    return "" if not reply else "plain" if reply[0].isascii() else "accent"
