"""Held-out evaluation: the same tasks with the same seeds, whatever policy plays them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ray.exceptions import ObjectLostError

from stateset_ray.actors.flight import GroupHandle
from stateset_ray.actors.jobs import GroupJob, GroupPayload, distinct
from stateset_ray.actors.remote import get
from stateset_ray.actors.rollout_pool import RolloutPool
from stateset_ray.config import Config
from stateset_ray.environments.base import Environment
from stateset_ray.errors import RunError
from stateset_ray.types import Message, derive_seed

__all__ = ["Evaluation", "evaluate_heldout"]


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        reward: mean over the scorable conversations.
        rewards: task id -> reward, None where the conversation failed; an id that repeats is numbered.
        stop_reasons: how often each occurred.
        conversation: the first task's, to be read; empty if all have died with their nodes.
    """

    reward: float
    rewards: dict[str, float | None]
    stop_reasons: dict[str, int]
    conversation: tuple[Message, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the conversation."""
        return {
            "reward": self.reward,
            "tasks": len(self.rewards),
            "failed": sum(r is None for r in self.rewards.values()),
            "stop_reasons": self.stop_reasons,
        }


def evaluate_heldout(
    pool: RolloutPool, environment: Environment, config: Config, should_stop: Callable[[], bool]
) -> Evaluation:
    """Play `evaluate.tasks` held-out tasks once each.

    Raises:
        RunError: not one conversation could be scored.
    """
    jobs: dict[str, GroupJob] = {}
    for index in range(config.evaluate.tasks):
        task = environment.task("heldout", index)
        name, parts = distinct("", task, index, jobs)
        # Not derived from the run's seed: two runs with different seeds are measured alike.
        seed = derive_seed("heldout", *parts)
        jobs[name] = GroupJob(f"heldout/{name}", task, seed, 1, config.evaluate.temperature)
    collected = pool.collect(list(jobs.values()), should_stop)
    reports = [handle.report for handle in collected.groups]
    # A task that was given up has no report: it failed like any other, and is not left out.
    rewards: dict[str, float | None] = dict.fromkeys(jobs)
    rewards |= {report.job.id.removeprefix("heldout/"): report.rewards[0] for report in reports}
    scored = [reward for reward in rewards.values() if reward is not None]
    if not scored:
        errors = [error for report in reports for error in report.errors]
        raise RunError(
            "no held-out conversation could be scored", given=errors[:1], mend="mend the environment first"
        )
    return Evaluation(
        fmean(scored), rewards,
        dict(Counter(reason for report in reports for reason in report.stop_reasons)),
        _conversation(collected.groups, config.cluster.wait_seconds),
    )  # fmt: skip


def _conversation(groups: Sequence[GroupHandle], limit: float) -> tuple[Message, ...]:
    """The first conversation that did not die with its node."""
    for handle in groups:
        try:
            payload: GroupPayload = get(handle.payload, timeout=limit, waiting_for="a conversation")
        except ObjectLostError:
            continue
        return payload.group.trajectories[0].messages
    return ()
