"""What a conversation earned -> what it is trained on: limits and overlong replies. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stateset_ray.objective import ObjectiveConfig

__all__ = ["overlong_penalty", "shaped"]


def overlong_penalty(sampled: int, limit: int, objective: ObjectiveConfig) -> float:
    """What a conversation loses for nearing its limit of sampled tokens; between 0 and `overlong_penalty`.

    Nothing before the last `overlong_share` of the limit, then growing linearly to the whole at the limit:
    the soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13).

    Args:
        sampled: tokens that the policy sampled in the whole conversation.
        limit: the most it could have.

    Example:
        >>> overlong_penalty(95, 100, ObjectiveConfig(overlong_share=0.1))
        0.5
    """
    if not objective.overlong_share:
        return 0.0
    span = objective.overlong_share * limit
    return objective.overlong_penalty * min(1.0, max(0.0, (sampled - (limit - span)) / span))


def shaped(
    rewards: Sequence[float], *, truncated: bool, penalty: float, objective: ObjectiveConfig
) -> list[float]:
    """The turn rewards to train on; what changes the return is booked on the last turn.

    Args:
        rewards: one per turn.
        truncated: whether a limit ended the conversation.
        penalty: what it loses for its length (`overlong_penalty`).

    Example:
        >>> clamp = ObjectiveConfig(truncated="clamp")
        >>> shaped([1.0, 0.5], truncated=True, penalty=0.25, objective=clamp)
        [1.0, -1.25]
    """
    total = math.fsum(rewards)
    wanted = min(total, 0.0) if truncated and objective.truncated == "clamp" else total
    change = wanted - total - penalty
    if not rewards or not change:
        return list(rewards)
    return [*rewards[:-1], rewards[-1] + change]
