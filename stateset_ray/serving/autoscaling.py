"""How many replicas there should be: as many as the tokens that wait need.

Requests are a bad measure for chat: one may ask for 8 tokens or for 8,000. What a replica has before it is
counted in tokens, those of prompts not read yet and those that replies may still take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["METRIC", "TokensPerReplica", "replicas_wanted"]

METRIC = "tokens"
"""What `PolicyReplica.record_autoscaling_stats` calls the tokens before it."""


def replicas_wanted(
    tokens: Mapping[str, float], running: float, queued: float, *,
    replicas: int, target: float, low: int, high: int,
) -> int:  # fmt: skip
    """Replicas for this load.

    Requests that no replica has taken yet are worth what those under way are on average, and one target at
    most, as where nothing is known of any.

    Args:
        tokens: of each running replica, queued and still to sample.
        running: requests that replicas have taken.
        queued: requests that wait in the ingress replicas.
        replicas: that there are now.
        target: tokens that one replica should have before it.
        low: bound of the answer.
        high: the other bound.

    Example:
        >>> replicas_wanted({"a": 3000.0, "b": 3000.0}, 60, 0, replicas=2, target=2000, low=1, high=8)
        3
    """
    known = sum(tokens.values())
    # Serve's numbers are of windows of their own: what has tokens before it has a request at least.
    each = known / max(running, sum(map(bool, tokens.values()))) if known else target
    wanted = math.ceil((known + queued * min(each, target)) / target)
    # A replica that reports nothing yet is starting: what it will take is still with the others.
    if len(tokens) < replicas:
        wanted = max(wanted, replicas)
    return max(low, min(high, wanted))


class TokensPerReplica:
    """Serve's custom autoscaling policy; delays and factors are applied by Serve.

    Args:
        target: tokens that one replica should have before it.
    """

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas for the state of the deployment (`ray.serve.config.AutoscalingContext`)."""
        reported = (context.aggregated_metrics or {}).get(METRIC) or {}
        running = set(context.running_replicas)
        tokens = {str(replica): float(value) for replica, value in reported.items() if replica in running}
        wanted = replicas_wanted(
            tokens, float(context.total_running_requests or 0), float(context.total_queued_requests or 0),
            replicas=context.current_num_replicas, target=self._target,
            low=context.capacity_adjusted_min_replicas, high=context.capacity_adjusted_max_replicas,
        )  # fmt: skip
        return wanted, {}
