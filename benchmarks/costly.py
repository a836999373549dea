"""An environment in which a mistake costs and silence is free: whoever is put off too early never learns.

It is made for `benchmarks.offpolicy` and teaches nothing that `Echo` does not.
"""

from __future__ import annotations

import random

from stateset_ray.environments.base import Environment
from stateset_ray.errors import ConfigError
from stateset_ray.types import Message, Step, Task

__all__ = ["Costly"]

_LETTERS = "abcdefgh"
_PASS = "-"


class Costly(Environment):
    """The user names one of some letters; the policy says it back (1), passes (0), or says anything else.

    Anything else costs: `-cost`. The expert knows the letter in a share of the tasks only, and else names any
    letter or passes, one as often as the other: it is what a policy begins with (`train.warm_start`). Such a
    policy loses by answering, so that passing pays at once; to answer pays once it has learned to do so
    surely, which it can only while it still answers.

    Args:
        letters: how many there are, from 2 to 8.
        cost: of a reply that is neither right nor a pass.
        known: the share of tasks in which the expert knows the letter.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> import asyncio
        >>> costly = Costly()
        >>> opening = asyncio.run(costly.reset(costly.task("train", 0), seed=0))
        >>> asyncio.run(costly.step(Message("assistant", "-"))).reward
        0.0
    """

    def __init__(self, letters: int = 4, cost: float = 2.0, known: float = 0.3) -> None:
        if not 2 <= letters <= len(_LETTERS) or cost < 0 or not 0 <= known <= 1:
            raise ConfigError(
                "Costly needs 2 to 8 letters, a cost of at least 0 and a share between 0 and 1",
                given={"letters": letters, "cost": cost, "known": known},
            )
        self._letters, self._cost, self._share = _LETTERS[:letters], cost, known
        self._wanted = ""
        self._said = ""

    async def reset(self, task: Task, seed: int) -> Step:
        """Name the letter of the task."""
        self._wanted = self._letters[task.seed // 2 % len(self._letters)]  # the last bit is the split
        expert, choices = random.Random(seed), self._letters + _PASS
        self._said = self._wanted if expert.random() < self._share else expert.choice(choices)
        return Step((Message("user", f"Say: {self._wanted}"),))

    async def step(self, message: Message) -> Step:
        """Score the reply and end."""
        reply = message.content.strip()
        right, passed = reply == self._wanted, reply == _PASS
        reward = 1.0 if right else 0.0 if passed else -self._cost
        return Step(reward=reward, terminated=True, info={"right": right, "passed": passed})

    def expert(self) -> str:
        """The letter where it is known, else any or a pass."""
        return self._said
