"""The work of the training benchmark: customer-service conversations in which every side does the same.

What the customer and the tools say comes from dialogues of the real environment's expert; what the policy
says is sampled, but it is not judged, and every reply has the same number of tokens. So nothing that the
policy happens to say changes how much there is to compute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from stateset_ray.config import RolloutConfig
from stateset_ray.environments.base import Environment
from stateset_ray.environments.customer_service import CustomerService
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Message, Step, Task

__all__ = ["GROUP", "TURNS", "Partner", "Rendered", "Script", "limits", "render", "scripts"]

TURNS = 3
GROUP = 8
"""Conversations of one task; they share the opening."""


@dataclass(frozen=True)
class Script:
    """What the partner says in one conversation: the opening, then an answer to all but the last reply."""

    task: Task
    sample: int
    opening: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]


class Partner(Environment):
    """Plays a script, whatever the policy says, and ends after `TURNS` replies."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._turns = 0

    async def reset(self, task: Task, seed: int) -> Step:
        return Step(self._script.opening)

    async def step(self, message: Message) -> Step:
        self._turns += 1
        if self._turns == TURNS:
            return Step(reward=1.0, terminated=True)
        return Step(self._script.answers[self._turns - 1])


def scripts(conversations: int, seed: int) -> list[Script]:
    """Conversations in groups of `GROUP`, the wishes of the customers taking turns."""
    found: list[Script] = []
    for index in range(-(-conversations // GROUP)):
        environment = CustomerService(difficulty=1)
        task = environment.task("train", index)
        opening, answers = asyncio.run(_dialogue(environment, task, seed))
        found += [Script(task, sample, opening, answers) for sample in range(GROUP)]
    return found[:conversations]


async def _dialogue(
    environment: CustomerService, task: Task, seed: int
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    step = await environment.reset(task, seed)
    opening, answers = step.messages, []
    while len(answers) < TURNS - 1:
        step = await environment.step(Message("assistant", environment.expert()))
        if step.terminated or step.truncated:
            raise RuntimeError(f"the expert ended {task.id} after {len(answers) + 1} replies, not {TURNS}")
        answers.append(step.messages)
    return opening, tuple(answers)


Rendered = tuple[tuple[int, ...], list[tuple[int, ...]]]
"""The tokens of an opening, and those that follow each reply but the last."""


def render(script: Script, renderer: Renderer) -> Rendered:
    """The tokens of the opening, and those after each reply, which is cut and has to be closed."""
    return renderer.opening(script.opening), [renderer.suffix(a, stopped=False) for a in script.answers]


def limits(played: Sequence[Script], renderer: Renderer, tokens: int) -> RolloutConfig:
    """Limits under which every reply has `tokens` tokens and no conversation is cut."""
    longest = 0
    for script in played:
        opening, suffixes = render(script, renderer)
        longest = max(longest, len(opening) + sum(map(len, suffixes)) + TURNS * tokens)
    return RolloutConfig(
        concurrency=len(played), max_turns=TURNS, max_turn_tokens=tokens, max_context=longest,
        on_cut_reply="close", turn_timeout=3600, conversation_timeout=3600,
    )  # fmt: skip
