"""How far two policies are apart, token by token, and what is done about it.

Letters: N sampled tokens of one micro-batch, end to end; S samples they belong to.
"""

from __future__ import annotations

from typing import Literal

import torch

from stateset_ray.grpo.surrogate import row_means
from stateset_ray.objective import ObjectiveConfig

__all__ = ["correction_weights", "kl_estimate", "kl_returns", "next_kl_coef"]


def kl_estimate(
    logprobs_N: torch.Tensor, reference_logprobs_N: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Per-token estimates of KL(policy || reference) from tokens of the policy, `x = l - ref`, in nats.

    `k1 = x`, `k2 = x^2 / 2`, `k3 = exp(-x) + x - 1` (Schulman 2020, "Approximating KL Divergence"). As values
    k1 and k3 are unbiased, k2 is close for small x. As losses on tokens of the current policy, k1 has an
    expected gradient of 0, k2 has that of KL(policy || reference), k3 that of KL(reference || policy).

    Args:
        logprobs_N: [N] under the policy.
        reference_logprobs_N: [N] under the frozen reference.

    Returns:
        [N]

    Example:
        >>> kl_estimate(torch.tensor([0.0]), torch.tensor([-2.0]), "k2").tolist()
        [2.0]
    """
    x_N = logprobs_N - reference_logprobs_N
    if estimator == "k1":
        return x_N
    if estimator == "k2":
        return x_N.square() / 2
    return torch.exp(-x_N) + x_N - 1


def kl_returns(estimates_N: torch.Tensor, rows_N: torch.Tensor, rows: int) -> torch.Tensor:
    """The KL still to come at each token: the sum of its row's estimates from that token on.

    It is what the KL in the reward takes from a token's return (REINFORCE++, Hu et al. 2025,
    arXiv:2501.03262, with discount 1).

    Args:
        estimates_N: [N], the tokens of a row in the order they were sampled.
        rows_N: int64 [N] in [0, rows), ascending.

    Example:
        >>> kl_returns(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 2).tolist()
        [3.0, 2.0, 4.0]
    """
    sums_S = estimates_N.new_zeros(rows).index_add(0, rows_N, estimates_N)
    before_S = sums_S.cumsum(0) - sums_S
    # What the row has already passed, this token not counted.
    passed_N = estimates_N.cumsum(0) - estimates_N - before_S[rows_N]
    return sums_S[rows_N] - passed_N


def correction_weights(
    proximal_logprobs_N: torch.Tensor,
    sampler_logprobs_N: torch.Tensor,
    rows_N: torch.Tensor,
    rows: int,
    objective: ObjectiveConfig,
) -> torch.Tensor:
    """Weights that make up for the sampler not being the policy at the start of the step.

    `w = exp(o - s)`. TIS cuts it at `correction_high` (Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"); MIS keeps it inside [`correction_low`, `correction_high`] and drops
    the rest (IcePop). At sequence level `w` is the geometric mean over the sequence, which unlike the product
    does not punish long conversations for being long. Dropped tokens stay in the loss's denominator.

    Args:
        proximal_logprobs_N: [N] `o`, under the policy as the step began.
        sampler_logprobs_N: [N] `s`, as sampled.
        rows_N: int64 [N] the sequence of each token, in [0, rows).

    Returns:
        [N] without gradient; ones for `correction = "none"`.
    """
    with torch.no_grad():
        log_N = proximal_logprobs_N - sampler_logprobs_N
        if objective.correction == "none":
            return torch.ones_like(log_N)
        if objective.correction_level == "sequence":
            log_N = row_means(log_N, rows_N, rows)
        weights_N = log_N.exp()
        if objective.correction == "tis":
            return weights_N.clamp(max=objective.correction_high)
        outside_N = (weights_N < objective.correction_low) | (weights_N > objective.correction_high)
        return weights_N.masked_fill(outside_N, 0.0)


_STEERING = 0.1
"""How far one step moves the coefficient, for an error of 100 %."""


def next_kl_coef(coef: float, measured: float, target: float) -> float:
    """The KL coefficient of the next step: larger if the KL was above its target, smaller if below.

    `coef * (1 + 0.1 * clip(measured / target - 1, -0.2, 0.2))`, the proportional controller of Ziegler et
    al. 2019, arXiv:1909.08593, with a horizon of ten steps.

    Args:
        measured: KL to the reference in nats per token.
        target: above 0.

    Example:
        >>> round(next_kl_coef(0.1, measured=1.0, target=0.1), 4)
        0.102
    """
    error = max(-0.2, min(0.2, measured / target - 1))
    return coef * (1 + _STEERING * error)
