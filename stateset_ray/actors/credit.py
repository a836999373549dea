"""From what was collected to what is learned: rewards -> advantages, and the account of trajectories.

Only metadata is touched here; the samples stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from stateset_ray.actors.jobs import Counts
from stateset_ray.actors.learner_group import SampleRef
from stateset_ray.actors.rollout_pool import Collected, GroupHandle
from stateset_ray.config import Config
from stateset_ray.errors import RunError
from stateset_ray.grpo.advantages import group_advantages, shuffled
from stateset_ray.types import derive_seed

__all__ = ["Batch", "policy_batch", "supervised_batch"]


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        samples: those with gradient; may be empty.
        denominator: masked tokens of all scorable trajectories, those without gradient included.
        counts: every trajectory that was dispatched, accounted for.
    """

    samples: list[SampleRef]
    denominator: int
    counts: Counts


def policy_batch(collected: Collected, config: Config) -> Batch:
    """GRPO: each trajectory's credit is its advantage within its group.

    With a KL to the reference every scorable trajectory has a gradient; without one, those of advantage 0
    are filtered.
    """
    batch = Batch([], 0, collected.counts)
    for handle in collected.groups:
        rewards = list(handle.report.rewards)
        if config.grpo.shuffle_rewards:
            rewards = shuffled(rewards, derive_seed(handle.report.job.seed, "shuffle"))
        advantages = group_advantages(rewards, config.grpo.advantage)
        batch = _with(batch, handle, advantages, keep_all=config.grpo.kl_coef > 0)
    return _balanced(batch)


def supervised_batch(collected: Collected) -> Batch:
    """Warm start: every dialogue that the expert finished counts alike."""
    batch = Batch([], 0, collected.counts)
    for handle in collected.groups:
        credit = [None if r is None else 1.0 for r in handle.report.rewards]
        batch = _with(batch, handle, credit, keep_all=True)
    return _balanced(batch)


def _with(batch: Batch, handle: GroupHandle, credit: list[float | None], *, keep_all: bool) -> Batch:
    """The batch with one group more."""
    report, counts = handle.report, batch.counts
    for reason, reward, value in zip(report.stop_reasons, report.rewards, credit, strict=True):
        if value is None:
            # A scorable trajectory without an advantage had no one left to be compared with.
            counts.dropped[reason if reward is None else "group_too_small"] += 1
        elif value == 0 and not keep_all:
            counts.filtered += 1
        else:
            counts.trained += 1
    scored = [(size, credit[size.trajectory]) for size in report.sizes]
    samples = [
        SampleRef(handle.payload, size, value)
        for size, value in scored
        if value is not None and (value != 0 or keep_all) and size.masked
    ]
    masked = sum(size.masked for size, value in scored if value is not None)
    return Batch(batch.samples + samples, batch.denominator + masked, counts)


def _balanced(batch: Batch) -> Batch:
    if not batch.counts.balanced:
        raise RunError(
            "the account of trajectories does not balance: some were lost or counted twice",
            given=batch.counts.as_dict(),
            mend="this is a bug of stateset_ray: please report it with the run folder",
        )
    return batch
