"""An environment that rewards by chance: what is measured with it is speed, not learning."""

from __future__ import annotations

import random

from stateset_ray.environments.base import Environment
from stateset_ray.types import Message, Step, Task

__all__ = ["Chance"]

_WORDS = "order parcel lamp refund card address week chair blue late thanks please where when box shop"


class Chance(Environment):
    """Says so many words, hears replies, and draws a reward that differs with what they say.

    Args:
        words: of the opening.
    """

    def __init__(self, words: int = 64) -> None:
        self._words = words

    async def reset(self, task: Task, seed: int) -> Step:
        opening = " ".join(random.Random(task.seed).choices(_WORDS.split(), k=self._words))
        return Step((Message("system", "You help the customers of a shop."), Message("user", opening)))

    async def step(self, message: Message) -> Step:
        return Step((Message("user", "And then?"),), reward=random.Random(message.content).random())
