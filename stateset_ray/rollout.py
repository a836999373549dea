"""THE INNER LOOP: one environment, one policy, one conversation -> a Trajectory.

Async and without Ray: hundreds of these run side by side in one process. This is the only place that
decides why a conversation ends, and the only one that writes down which tokens were sampled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stateset_ray.config import RolloutConfig
from stateset_ray.deadline import DeadlinePassed, within
from stateset_ray.environments.base import Environment
from stateset_ray.environments.boundary import ask, close
from stateset_ray.errors import EnvironmentFault, InfrastructureFault, RewardFault, TemplateError
from stateset_ray.policies.base import Policy, Reply, ReplyRequest
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Message, Step, StopReason, Task, Trajectory, Turn, derive_seed

__all__ = ["rollout"]

_NOTHING = Step()


@dataclass(slots=True)
class _Conversation:
    """What is known of a conversation while it runs."""

    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    sampled: int = 0


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
        playing = _play(
            environment, task, policy, renderer, limits, talk,
            id=id, seed=seed, sample=sample, temperature=heat,
        )  # fmt: skip
        reason = await within(limits.conversation_timeout, playing)
    except EnvironmentFault as fault:
        reason, error = StopReason.ENVIRONMENT_ERROR, str(fault)
    except RewardFault as fault:
        reason, error = StopReason.REWARD_ERROR, str(fault)
    except InfrastructureFault as fault:
        reason, error = StopReason.INFRASTRUCTURE_ERROR, str(fault)
    except DeadlinePassed:
        reason = StopReason.TIMEOUT
        error = f"the conversation took longer than {limits.conversation_timeout} s"
    except TimeoutError as fault:
        reason, error = StopReason.TIMEOUT, str(fault)
    finally:
        policy.release(id)
        closing = await close(environment, limits.environment_timeout)
    return Trajectory(
        id, task, sample, tuple(talk.messages), tuple(talk.turns), reason,
        info=talk.info, error=error or closing, seconds=time.monotonic() - started,
    )  # fmt: skip


async def _play(
    environment: Environment, task: Task, policy: Policy, renderer: Renderer, limits: RolloutConfig,
    talk: _Conversation, *, id: str, seed: int, sample: int, temperature: float,
) -> StopReason:  # fmt: skip
    step = await ask(environment, "reset", limits.environment_timeout, task, seed)
    talk.messages += step.messages
    talk.info = dict(step.info)
    if step.terminated or step.truncated or not step.messages:
        raise EnvironmentFault("the environment's reset left nothing for the policy to answer", given=task.id)
    if step.reward:
        raise RewardFault("reset earns nothing, because no reply was given yet", given=step.reward)
    context, forked = _rendered(lambda: (renderer.opening(talk.messages), False))
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
        talk.sampled += len(reply.token_ids)
        step = _NOTHING
        try:
            step = await ask(environment, "step", limits.environment_timeout, message)
        finally:  # a turn was sampled, whatever becomes of its reward
            paid = step.reward, forked, dict(step.rewards)
            turn = Turn(context, reply.token_ids, reply.logprobs, reply.policy_version, *paid)
            talk.turns.append(turn)
        talk.messages += step.messages
        talk.info = dict(step.info)
        reason = _end(step, reply, limits, len(talk.turns), budget)
        if reason is not None:
            return reason
        said, stopped = len(step.messages), reply.finish == "stop"
        context, forked = _rendered(
            lambda: renderer.next_prompt(talk.ids, talk.messages, said, stopped=stopped)  # noqa: B023
        )


def _rendered(render: Callable[[], tuple[tuple[int, ...], bool]]) -> tuple[tuple[int, ...], bool]:
    """What an environment said as a prompt; that its template refuses it is the environment's fault."""
    try:
        return render()
    except TemplateError as error:
        raise EnvironmentFault(error.problem, error.given, error.mend) from error


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
        reply = await within(timeout, policy.reply(request))
    except TimeoutError:
        raise TimeoutError(f"a reply took longer than rollout.turn_timeout = {timeout} s") from None
    if not reply.token_ids or len(reply.logprobs) != len(reply.token_ids):
        raise InfrastructureFault(
            "the policy returned no tokens, or not one log-probability for each",
            given=f"{len(reply.token_ids)} tokens, {len(reply.logprobs)} log-probabilities",
        )
    if not all(p is not None and math.isfinite(p) for p in reply.logprobs):
        raise InfrastructureFault("the policy returned log-probabilities that are not finite")
    return reply
