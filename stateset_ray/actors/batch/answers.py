"""Rows for an engine: conversations that get a reply, and tasks that are played.

The engine and the renderer are those of the rollouts, so that a batch gives the reply that a rollout and the
endpoint give. Everything random about a row follows from its id (of a task: from the task's, as in an
evaluation), and not from what else is worked on beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from stateset_ray.actors.batch.results import Ended, error, prompt_of
from stateset_ray.actors.held_engine import HeldEngine, renderer_of
from stateset_ray.config import Config
from stateset_ray.dataset.rows import Row
from stateset_ray.deadline import within
from stateset_ray.environments.base import Environment, construct, load_environment
from stateset_ray.environments.threads import THREADS
from stateset_ray.errors import InfrastructureFault
from stateset_ray.policies.base import Reply, ReplyRequest
from stateset_ray.rollout import rollout
from stateset_ray.types import StopReason, Task, Trajectory, derive_seed

__all__ = ["Player", "Replier"]

_BUILT_IN: dict[str, Any] = {
    "lineage": 0,
    "handle": None,
}  # nothing is published: the weights it is built with


class Replier:
    """Gives one reply to each conversation, `rollout.slots` at a time; implements `Answers`.

    Args:
        config: of the run.
        peers: engines that share this machine's cores.

    Raises:
        StatesetError: the model or the hardware is not as configured.
    """

    def __init__(self, config: Config, peers: int) -> None:
        self._config = config
        self._renderer = renderer_of(config)
        self._runner = asyncio.Runner()  # the engine's own task lives on its loop between two pieces
        self._held = HeldEngine(config, peers, self._renderer)
        # What an async environment sends to a thread itself must not starve the others either.
        self._runner.get_loop().set_default_executor(THREADS)

    def answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """See `Answers.answer`."""
        return self._runner.run(self._all(rows))

    async def _all(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        await self._held.hold(0, _BUILT_IN)
        places = asyncio.Semaphore(self._config.rollout.slots)

        async def one(row: Row) -> dict[str, Any]:
            async with places:
                try:
                    return {"id": row.id} | await self._one(row)
                except Ended as end:
                    return error(row.id, end.kind, end.message)

        return list(await asyncio.gather(*[one(row) for row in rows]))

    async def _one(self, row: Row) -> dict[str, Any]:
        config, limits = self._config, self._config.rollout
        prompt = prompt_of(self._renderer, row.messages, limits.max_context)
        request = ReplyRequest(
            f"batch/{row.id!r}", prompt, row.messages,
            min(limits.max_context - len(prompt), limits.max_turn_tokens),
            config.evaluate.temperature, derive_seed(config.run.seed, "batch", row.id),
        )  # fmt: skip
        reply = await self._reply(request)
        return {
            "message": {"role": "assistant", "content": self._renderer.text(reply.token_ids)},
            "finish_reason": reply.finish,
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(reply.token_ids)},
            "logprob": float(sum(reply.logprobs)),
        }

    async def _reply(self, request: ReplyRequest) -> Reply:
        limits = self._config.rollout
        for attempt in range(limits.retries + 1):
            try:
                return await within(limits.turn_timeout, self._held.reply(request))
            except TimeoutError:
                text = f"the reply took longer than rollout.turn_timeout = {limits.turn_timeout:g} s"
                raise Ended("timeout", text) from None
            except InfrastructureFault as fault:
                if attempt == limits.retries:
                    raise Ended("infrastructure_error", str(fault)) from None
            finally:
                self._held.release(request.conversation)
        raise AssertionError("the last attempt returns or raises")


class Player(Replier):
    """Plays tasks of the environment; implements `Answers`."""

    def __init__(self, config: Config, peers: int) -> None:
        section = config.environment
        self._environment: type[Environment] = load_environment(section.path, section.options)
        super().__init__(config, peers)

    async def _one(self, row: Row) -> dict[str, Any]:
        config = self._config
        try:
            task = row.task or self._new().task(*(row.index or ("heldout", 0)))
        except Exception as fault:  # an environment's own code raises what it likes
            raise Ended(StopReason.ENVIRONMENT_ERROR, f"{type(fault).__name__}: {fault}") from None
        for attempt in range(config.rollout.retries + 1):
            # Seed and temperature are those of an evaluation, which plays the same conversation.
            played = await rollout(
                self._new(), task, self._held, self._renderer, config.rollout,
                id=f"heldout/{task.id}/0/{attempt}", seed=derive_seed("heldout", task.id),
                temperature=config.evaluate.temperature,
            )  # fmt: skip
            if played.stop_reason is not StopReason.INFRASTRUCTURE_ERROR:
                break
        return _told(task, played)

    def _new(self) -> Environment:
        return construct(self._environment, self._config.environment.options)


def _told(task: Task, played: Trajectory) -> dict[str, Any]:
    """A conversation as it stands in the output."""
    facts = {
        "task": task.id,
        "reward": played.reward,
        "stop_reason": played.stop_reason.value,
        "turns": len(played.turns),
        "tokens": played.sampled_tokens,
        "messages": [{"role": m.role, "content": m.content} for m in played.messages],
        "info": dict(played.info),
    }
    if played.stop_reason.failed:
        facts["error"] = {"kind": played.stop_reason.value, "message": played.error or ""}
    return facts
