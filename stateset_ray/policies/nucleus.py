"""What serving asks of sampling beyond training: the nucleus (`top_p`), and what else was likely.

A cut distribution is not the policy's own, so that ratios to it are biased: nothing that trains can ask for
one (`rollout.top_p` is refused, and a `ReplyRequest` has no place for it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Sampled", "likeliest", "nucleus"]

_LEAST = -9999.0  # what OpenAI writes for a token that cannot be: JSON has no infinity


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token as it was sampled.

    Attributes:
        logprob: natural log-probability under the policy at the request's temperature, before any nucleus; a
            greedy token's at temperature 1.
        top: (token, logprob) of the likeliest tokens, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def nucleus(probabilities: torch.Tensor, masses: Sequence[float]) -> torch.Tensor:
    """The distributions cut to their likeliest tokens that hold at least so much; not normalized again.

    Args:
        probabilities: [n, vocabulary].
        masses: [n], 0 to 1: 1 cuts nothing, 0 leaves one token.

    Returns:
        The same tensor where nothing is cut.

    Example:
        >>> nucleus(torch.tensor([[0.2, 0.5, 0.3]]), [0.6]).tolist()
        [[0.0, 0.5, 0.30000001192092896]]
    """
    rows = [i for i, mass in enumerate(masses) if mass < 1]
    if not rows:
        return probabilities
    cut = probabilities[rows]
    ordered, order = cut.sort(dim=-1, descending=True, stable=True)
    wanted = cut.new_tensor([masses[i] for i in rows])[:, None]
    beyond = ordered.cumsum(dim=-1) - ordered >= wanted
    beyond[:, 0] = False
    whole = probabilities.clone()
    whole[rows] = cut.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    return whole


def likeliest(probabilities: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens of one distribution [vocabulary], with their log-probabilities."""
    if not count:
        return ()
    values, tokens = probabilities.topk(min(count, len(probabilities)))
    return tuple(zip(tokens.tolist(), values.log().clamp_(min=_LEAST).tolist(), strict=True))
