"""THE INNER LOOP: one environment, one policy, one conversation -> a Trajectory.

Async and without Ray: hundreds of these run side by side in one process. This is the only place that
decides why a conversation ends, and the only one that writes down which tokens were sampled.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

from stateset_ray.config import RolloutConfig
from stateset_ray.environments.base import Environment, call
from stateset_ray.errors import EnvironmentFault, InfrastructureFault, RewardFault
from stateset_ray.policies.base import Policy, Reply, ReplyRequest
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Message, Step, StopReason, Task, Trajectory, Turn, derive_seed

__all__ = ["rollout"]


@dataclass
class _Conversation:
    """What is known of a conversation while it runs."""

    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def sampled(self) -> int:
        return sum(len(turn.token_ids) for turn in self.turns)


async def rollout(
    environment: Environment,
    task: Task,
    policy: Policy,
    renderer: Renderer,
    limits: RolloutConfig,
    *,
    id: str,
    seed: int,
    sample: int = 0,
    temperature: float | None = None,
) -> Trajectory:
    """Play one conversation to its end and close the environment, whatever happens.

    Args:
        environment: a fresh instance; it is closed here.
        id: names the trajectory, `run/step/task/sample/attempt`.
        seed: of the group: the environment is reset with it, and every reply's seed is derived from it,
            the sample's index and the turn's index.
        temperature: of the replies; by default `limits.temperature`.

    Returns:
        The trajectory. A failure (environment, reward, policy, time) is a trajectory too: its
        `stop_reason.failed` is True, its reward None. Only cancellation is raised.
    """
    talk = _Conversation()
    started = time.monotonic()
    error: str | None = None
    heat = limits.temperature if temperature is None else temperature
    try:
        async with asyncio.timeout(limits.conversation_timeout):
            reason = await _play(
                environment, task, policy, renderer, limits, talk,
                id=id, seed=seed, sample=sample, temperature=heat,
            )  # fmt: skip
    except EnvironmentFault as fault:
        reason, error = StopReason.ENVIRONMENT_ERROR, str(fault)
    except RewardFault as fault:
        reason, error = StopReason.REWARD_ERROR, str(fault)
    except InfrastructureFault as fault:
        reason, error = StopReason.INFRASTRUCTURE_ERROR, str(fault)
    except TimeoutError as fault:
        reason = StopReason.TIMEOUT
        error = str(fault) or f"the conversation took longer than {limits.conversation_timeout} s"
    finally:
        policy.release(id)
        closing = await _close(environment, limits.environment_timeout)
    return Trajectory(
        id, task, sample, tuple(talk.messages), tuple(talk.turns), reason,
        info=talk.info, error=error or closing, seconds=time.monotonic() - started,
    )  # fmt: skip


async def _play(
    environment: Environment, task: Task, policy: Policy, renderer: Renderer, limits: RolloutConfig,
    talk: _Conversation, *, id: str, seed: int, sample: int, temperature: float,
) -> StopReason:  # fmt: skip
    step = await _ask(environment, "reset", limits, task, seed)
    talk.messages += step.messages
    talk.info = dict(step.info)
    if step.terminated or step.truncated or not step.messages:
        raise EnvironmentFault("the environment's reset left nothing for the policy to answer", given=task.id)
    if step.reward:
        raise RewardFault("reset earns nothing, because no reply was given yet", given=step.reward)
    context, forked = renderer.opening(talk.messages), False
    while True:
        # The limits that a next turn would pass are checked before it is begun, so that ids, mask and
        # messages never hold a prompt that nothing was sampled for.
        prompt = context if forked else (*talk.ids, *context)
        room = limits.max_context - len(prompt)
        left = limits.max_sampled_tokens - talk.sampled
        if min(room, left) < 1:
            return StopReason.CONTEXT if room < 1 else StopReason.SAMPLED_TOKENS
        budget = min(limits.max_turn_tokens, room, left)
        request = ReplyRequest(
            id, prompt, tuple(talk.messages), budget, temperature,
            derive_seed(seed, "reply", sample, len(talk.turns)),
        )  # fmt: skip
        reply = await _reply(policy, request, limits.turn_timeout)
        message = Message("assistant", renderer.text(reply.token_ids))
        talk.ids = [*prompt, *reply.token_ids]
        talk.messages.append(message)
        turn = Turn(context, reply.token_ids, reply.logprobs, reply.policy_version, forked=forked)
        talk.turns.append(turn)
        step = await _ask(environment, "step", limits, message)
        talk.turns[-1] = replace(turn, reward=step.reward)
        talk.messages += step.messages
        talk.info = dict(step.info)
        reason = _end(step, reply, limits, len(talk.turns), budget)
        if reason is not None:
            return reason
        context, forked = renderer.next_prompt(
            talk.ids, talk.messages, len(step.messages), stopped=reply.finish == "stop"
        )


def _end(step: Step, reply: Reply, limits: RolloutConfig, turns: int, budget: int) -> StopReason | None:
    """Why the conversation ends after this step, or None if it goes on."""
    if step.terminated:
        return StopReason.COMPLETED
    if step.truncated:
        return StopReason.ENVIRONMENT_LIMIT
    if turns >= limits.max_turns:
        return StopReason.MAX_TURNS
    # A reply cut by the context or the token budget goes on: the next turn finds no room and names it.
    if reply.finish == "length" and budget == limits.max_turn_tokens and limits.on_cut_reply == "end":
        return StopReason.TURN_TOKENS
    return None


async def _reply(policy: Policy, request: ReplyRequest, timeout: float) -> Reply:
    try:
        async with asyncio.timeout(timeout):
            reply = await policy.reply(request)
    except TimeoutError:
        raise TimeoutError(f"a reply took longer than rollout.turn_timeout = {timeout} s") from None
    if not reply.token_ids or not all(map(math.isfinite, reply.logprobs)):
        raise InfrastructureFault("the policy returned no tokens, or log-probabilities that are not finite")
    return reply


async def _ask(environment: Environment, method: str, limits: RolloutConfig, *args: Any) -> Step:
    """Call reset or step with its timeout, and check what comes back."""
    name = f"{type(environment).__name__}.{method}"
    try:
        async with asyncio.timeout(limits.environment_timeout) as clock:
            step = await call(getattr(environment, method), *args)
    except TimeoutError as error:
        if not clock.expired():
            raise EnvironmentFault(f"{name} raised TimeoutError: {error}") from error
        raise EnvironmentFault(
            f"{name} took longer than rollout.environment_timeout = {limits.environment_timeout} s",
            mend="make it faster, or raise the limit",
        ) from None
    except Exception as error:
        raise EnvironmentFault(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(step, Step) or not all(isinstance(m, Message) for m in step.messages):
        raise EnvironmentFault(
            f"{name} must return a Step whose messages are Message objects", given=repr(step)[:200]
        )
    if any(m.role == "assistant" for m in step.messages) and method == "step":
        raise EnvironmentFault(f"{name} returned an assistant message; only the policy speaks as assistant")
    if not isinstance(step.reward, int | float) or not math.isfinite(step.reward):
        raise RewardFault(f"{name} gave a reward that is not a finite number", given=step.reward)
    return step


async def _close(environment: Environment, timeout: float) -> str | None:
    """Close the environment, shielded from cancellation; returns what went wrong."""

    async def close() -> None:
        async with asyncio.timeout(timeout):
            await call(environment.close)

    try:
        await asyncio.shield(close())
    except Exception as error:  # a failing close must not hide how the conversation ended
        return f"{type(environment).__name__}.close raised {type(error).__name__}: {error}"
    return None
