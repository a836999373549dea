"""Where an environment is called: with a limit, and never trusting what it raises or returns."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, cast

from stateset_ray.deadline import DeadlinePassed, within
from stateset_ray.environments.base import Environment, call
from stateset_ray.errors import EnvironmentFault, RewardFault
from stateset_ray.types import Message, Step

__all__ = ["ask", "ask_expert", "close"]


async def ask(environment: Environment, method: str, timeout: float, *args: Any) -> Step:
    """Call `reset` or `step` with its timeout, and check what comes back.

    Args:
        timeout: seconds.

    Raises:
        EnvironmentFault: it raised, took too long, or returned what is no Step of text.
        RewardFault: a reward is not a finite number.
    """
    name = f"{type(environment).__name__}.{method}"
    try:
        step: Step = await within(timeout, call(getattr(environment, method), *args))
    except DeadlinePassed:
        raise EnvironmentFault(
            f"{name} took longer than rollout.environment_timeout = {timeout} s",
            mend="make it faster, or raise the limit",
        ) from None
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Nobody cancelled this conversation: the environment awaited something of its own that was.
        raise EnvironmentFault(f"{name} raised CancelledError: what it awaited was cancelled") from error
    except Exception as error:
        raise EnvironmentFault(f"{name} raised {type(error).__name__}: {error}") from error
    _check_kinds(name, step)
    for message in step.messages:
        if not _is_text(message.content):
            raise EnvironmentFault(
                f"{name} returned a message that is no text: half of a surrogate pair, or not a string",
                given=repr([m.content for m in step.messages])[:200],
                mend="decode what comes from outside with errors='replace'",
            )
        if message.role == "assistant" and method == "step":
            raise EnvironmentFault(
                f"{name} returned an assistant message; only the policy speaks as assistant"
            )
    usual = True
    for reward in (step.reward, *step.rewards.values()):
        if not _is_finite(reward):
            raise RewardFault(f"{name} gave a reward that is not a finite number", given=repr(reward)[:200])
        usual = usual and isinstance(reward, int | float)
    if usual:
        return step
    rewards = {key: float(value) for key, value in step.rewards.items()}
    return replace(step, reward=float(step.reward), rewards=rewards)  # numpy's numbers


def _check_kinds(name: str, step: object) -> None:
    """Refuse what is no Step, or one whose fields are not what they are said to be."""
    if not isinstance(step, Step):
        raise EnvironmentFault(f"{name} must return a Step", given=repr(step)[:200])
    messages, rewards, info = cast("tuple[Any, Any, Any]", (step.messages, step.rewards, step.info))
    for right, what in (
        (_holds(messages, tuple | list, Message), "messages are Message objects"),
        (_holds(rewards, Mapping, str), "rewards are numbers by name"),
        (isinstance(info, Mapping), "info is a mapping"),
    ):
        if not right:
            raise EnvironmentFault(f"{name} must return a Step whose {what}", given=repr(step)[:200])


def _holds(several: Any, kind: Any, of: type) -> bool:
    return isinstance(several, kind) and all(isinstance(one, of) for one in several)


def ask_expert(environment: Environment) -> str:
    """What its expert would reply now.

    Raises:
        EnvironmentFault: it raised, or said what is no text.
    """
    name = f"{type(environment).__name__}.expert"
    try:
        said = environment.expert()
    except Exception as error:
        raise EnvironmentFault(f"{name} raised {type(error).__name__}: {error}") from error
    if not _is_text(said):
        raise EnvironmentFault(f"{name} must return a text", given=repr(said)[:200])
    return said


async def close(environment: Environment, timeout: float) -> str | None:
    """Close the environment, shielded from cancellation; returns what went wrong."""
    if getattr(environment.close, "__func__", None) is Environment.close:
        return None  # holds nothing: not worth a thread of its own

    async def closing() -> None:
        async with asyncio.timeout(timeout):
            await call(environment.close)

    try:
        await asyncio.shield(closing())
    except Exception as error:  # a failing close must not hide how the conversation ended
        return f"{type(environment).__name__}.close raised {type(error).__name__}: {error}"
    return None


def _is_finite(reward: object) -> bool:
    try:
        return isinstance(reward, Real) and math.isfinite(reward)
    except OverflowError:  # an integer that no float holds
        return False


def _is_text(content: object) -> bool:
    """Whether something is a string that can be written down."""
    try:
        return isinstance(content, str) and (content.isascii() or content.encode() is not None)
    except UnicodeEncodeError:
        return False
