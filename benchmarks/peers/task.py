"""What every side of a comparison with a peer plays: a question, one reply, a reward from its text alone.

The reward is graded, so that a group of a small model's replies differs almost always:

| part                          | worth | how                                                          |
|-------------------------------|-------|--------------------------------------------------------------|
| the reply begins with `Sure`  | 0.5   | the share of these letters that it begins with               |
| it is short                   | 0.5   | falling from 1 to 0 at 120 characters; 0 where it says nothing |
"""

from __future__ import annotations

from stateset_ray.environments.base import Environment
from stateset_ray.types import Message, Split, Step, Task

__all__ = ["Question", "opening", "reward"]

_BEGINS = "Sure"
_LONG = 120
_SYSTEM = "You are a friendly helper. Begin every reply with the word Sure and keep it very short."
_THINGS = (
    "bread", "rain", "the moon", "a bicycle", "cheese", "the sea", "winter", "a violin", "honey", "a map",
    "tea", "the wind", "a river", "chess", "an owl", "glass", "a garden", "salt", "a train", "snow",
    "a clock", "paper", "a bridge", "coffee",
)  # fmt: skip


def opening(index: int) -> tuple[Message, ...]:
    """The prompt of a task: 62 or 63 tokens of SmolLM2's."""
    thing = _THINGS[index % len(_THINGS)]
    asked = (
        "Hello! I am writing a small page about things that we see every day, for my class. Could you tell me"
    )
    return Message("system", _SYSTEM), Message("user", f"{asked} something about {thing}?")


def reward(text: str) -> float:
    """What a reply earns, in [0, 1].

    Example:
        >>> reward("Sure, it is baked and warm."), reward("So it is, and it is good"), reward("")
        (0.8875, 0.525, 0.0)
    """
    text = text.strip()
    if not text:
        return 0.0
    begun = next((n for n in range(len(_BEGINS), 0, -1) if text.startswith(_BEGINS[:n])), 0)
    short = max(0.0, 1 - len(text) / _LONG)
    return 0.5 * begun / len(_BEGINS) + 0.5 * short


class Question(Environment):
    """One turn of it, as an environment."""

    def task(self, split: Split, index: int) -> Task:
        return Task(id=f"{split}-{index}", seed=index, split=split)

    async def reset(self, task: Task, seed: int) -> Step:
        return Step(opening(task.seed))

    async def step(self, message: Message) -> Step:
        return Step(reward=reward(message.content), terminated=True)
