"""Luck first, work after: an environment in which it matters who is blamed for what.

The user asks for a guess, which wins or loses by the toss of a coin, and then to say back some words, which
are paid for at the end. A policy that is told only how the whole conversation went must find out over many
conversations that the words had no part in the luck before them; one whose turns answer only for what came
after them (`grpo.credit = "return_to_go"`) need not. It is made for that comparison (docs/learning.md) and
teaches nothing that `Echo` does not.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from stateset_ray.environments.base import Environment
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import ConfigError
from stateset_ray.types import Message, Step, Task, derive_seed

__all__ = ["Blame"]


class Blame(Environment):
    """One guess by luck, then `words` of `Echo` by skill.

    The guess wins or loses `luck`. Which of both hangs on its every character and on the task, by a hash:
    each reply wins on half of the tasks, so that no policy that cannot see the task's seed earns anything in
    expectation, and what won once says nothing of another task. Members of a group who guess alike have the
    same luck, as they have the same task.

    The words earn what `Echo` gives, times `1 - luck`, all of it with the last one. So what is left to earn
    before each word is on average what a conversation earns, with which `return_to_go` compares it.

    Args:
        luck: the share of the reward that is luck, from 0 to below 1.
        words: turns after the guess.
        length: letters of a word.
        alphabet: their letters, at least two.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> import asyncio
        >>> blame = Blame(luck=0.25, words=2)
        >>> step, earned = asyncio.run(blame.reset(blame.task("train", 0), seed=0)), []
        >>> while not step.terminated:
        ...     step = asyncio.run(blame.step(Message("assistant", blame.expert())))
        ...     earned.append(step.reward)
        >>> earned
        [0.25, 0.0, 0.75]
    """

    def __init__(self, luck: float = 0.25, words: int = 3, length: int = 3, alphabet: str = "abc") -> None:
        if not 0 <= luck < 1:
            raise ConfigError("Blame needs a share of luck from 0 to below 1", given={"luck": luck})
        self._luck = luck
        self._echo = Echo(length=length, alphabet=alphabet, turns=words)
        self._first = Step()
        self._task_seed = 0
        self._guessed = False
        self._earned = 0.0

    async def reset(self, task: Task, seed: int) -> Step:
        """Ask for the guess; the coin and the words are functions of the task's seed."""
        self._task_seed, self._guessed, self._earned = task.seed, False, 0.0
        self._first = await self._echo.reset(task, seed)
        return Step((Message("user", "Guess!"),))

    async def step(self, message: Message) -> Step:
        """Toss the coin of the guess, or score a word; after the last pay for all of them."""
        if not self._guessed:
            self._guessed = True
            reward = self._luck if self._wins(message.content) else -self._luck
            return replace(self._first, reward=reward, info={"right": 0, "solved": False})
        said = await self._echo.step(message)
        self._earned += said.reward
        return replace(said, reward=self._earned * (1 - self._luck) if said.terminated else 0.0)

    def expert(self) -> str:
        """The word; before the words the first number that wins, known to who tosses the coin."""
        if self._guessed:
            return self._echo.expert()
        return next(str(n) for n in count() if self._wins(str(n)))

    def _wins(self, guess: str) -> bool:
        return derive_seed("coin", self._task_seed, guess) % 2 == 0
