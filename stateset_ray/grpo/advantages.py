"""Rewards of one group -> one advantage per trajectory. Plain Python, one rollout counted once."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

__all__ = ["STD_EPSILON", "AdvantageKind", "group_advantages", "shuffled"]

AdvantageKind = Literal["mean", "mean_std"]

STD_EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""


def group_advantages(rewards: Sequence[float | None], kind: AdvantageKind) -> list[float | None]:
    """How much better each trajectory of ONE group did than the group.

    `mean`: `r_i - mean(r)` (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
    `mean_std`: `(r_i - mean(r)) / (std(r) + 1e-4)` (GRPO, Shao et al. 2024, arXiv:2402.03300), the
    standard deviation with n - 1 and the epsilon as in TRL; numpy's default would divide by n.

    Failed members (None) stay None and do not enter the baseline. Fewer than two survivors have nothing
    to be compared with: all advantages are None and the group is dropped. Equal rewards teach nothing:
    their advantages are exactly 0, decided by comparing the rewards, since a mean may round.

    Args:
        rewards: one per trajectory of the group, in order; None where it failed.
        kind: how the difference is scaled.

    Returns:
        One advantage per trajectory, in the same order and the unit of the rewards (`mean`) or of
        standard deviations (`mean_std`).

    Raises:
        ValueError: a reward is not a finite number.

    Example:
        >>> group_advantages([1.0, 0.0, None], "mean")
        [0.5, -0.5, None]
    """
    scored = [float(reward) for reward in rewards if reward is not None]
    if not all(math.isfinite(reward) for reward in scored):
        raise ValueError(f"every reward must be finite or None, not {list(rewards)}")
    if len(scored) < 2:
        return [None] * len(rewards)
    if max(scored) == min(scored):
        return [None if reward is None else 0.0 for reward in rewards]
    mean = math.fsum(scored) / len(scored)
    scale = 1.0
    if kind == "mean_std":
        variance = math.fsum((reward - mean) ** 2 for reward in scored) / (len(scored) - 1)
        scale = math.sqrt(variance) + STD_EPSILON
    return [None if reward is None else (reward - mean) / scale for reward in rewards]


def shuffled(rewards: Sequence[float | None], seed: int) -> list[float | None]:
    """The control experiment: the rewards of one group, handed out at random inside the group.

    The mean, the spread and the failed members (None) stay where they are, so that everything but the
    link between a conversation and its reward is unchanged; a policy must not improve on this.

    Example:
        >>> sorted(shuffled([3.0, 1.0, 2.0], seed=0))
        [1.0, 2.0, 3.0]
    """
    pool = [reward for reward in rewards if reward is not None]
    random.Random(seed).shuffle(pool)
    handed_out = iter(pool)
    return [None if reward is None else next(handed_out) for reward in rewards]
