"""What a policy loss does with one token: the part of the objective that differs between methods.

Letters: N sampled tokens of one micro-batch, end to end; S samples they belong to. `l` log-probabilities
under the policy being trained, `o` under the policy that its trust region is around, `s` as sampled,
`r = exp(l - o)`, `A` the advantage, `sg` without gradient. All functions return losses [N], to be minimized.

    ppo          -min(r A, clip(r, 1 - low, 1 + high) A)          Schulman et al. 2017, arXiv:1707.06347
                 with `dual_clip` c: for A < 0 at most -c A       Ye et al. 2020, arXiv:1912.09729
    ppo, r per sequence: r = exp(mean over the sequence of l - o) GSPO, Zheng et al. 2025, arXiv:2507.18071
                 as r exp(l - sg(l)) with r constant ("GSPO-token"): the same number, and the same gradient if
                 A is the same on the whole sequence; if not, each token still answers for its own A
    importance   -r A
    cispo        -sg(min(r, 1 + high)) A l                        MiniMax 2025, arXiv:2506.13585
    sapo         -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A   Gao et al. 2025, arXiv:2511.20347
    dppo         -keep A r + penalty (l - o)^2, keep = 0 where e^l - e^o has passed +high (A > 0) or
                 -low (A <= 0)                                    prime-rl's default, around the sampler
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stateset_ray.objective import ObjectiveConfig

__all__ = ["Surrogate", "row_means", "surrogate"]


@dataclass(frozen=True)
class Surrogate:
    """Losses and what was cut.

    Attributes:
        losses: [N] with gradient.
        ratios: [N] the ratios that the losses used; one value per sequence with `ratio = "sequence"`.
        cut_low: bool [N] tokens whose gradient the lower bound removed (or shrank).
        cut_high: bool [N] tokens whose gradient the upper bound removed (or shrank).
    """

    losses: torch.Tensor
    ratios: torch.Tensor
    cut_low: torch.Tensor
    cut_high: torch.Tensor


def row_means(values_N: torch.Tensor, rows_N: torch.Tensor, rows: int) -> torch.Tensor:
    """The mean of each row's values, at every token of the row.

    Args:
        values_N: [N]
        rows_N: int64 [N] in [0, rows).

    Example:
        >>> row_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 2).tolist()
        [2.0, 2.0, 5.0]
    """
    zeros_S = values_N.new_zeros(rows)
    counts_S = zeros_S.index_add(0, rows_N, torch.ones_like(values_N))
    means_S = zeros_S.index_add(0, rows_N, values_N) / counts_S.clamp(min=1)
    return means_S[rows_N]


def surrogate(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    rows_N: torch.Tensor,
    rows: int,
    objective: ObjectiveConfig,
) -> Surrogate:
    """The configured loss of each token.

    Args:
        logprobs_N: [N] `l`, with gradient.
        old_logprobs_N: [N] `o`.
        advantages_N: [N]
        rows_N: int64 [N] the sequence of each token, in [0, rows).
        objective: loss, ratio and bounds.
    """
    low, high = objective.clip_low, objective.clip_high
    log_ratio_N = logprobs_N - old_logprobs_N
    if objective.ratio == "sequence":
        # The gradient of the mean itself would give every token the sequence's mean advantage.
        own_N = logprobs_N - logprobs_N.detach()
        log_ratio_N = row_means(log_ratio_N.detach(), rows_N, rows) + own_N
    ratio_N = log_ratio_N.exp()
    up_N, down_N = advantages_N > 0, advantages_N < 0
    never_N = torch.zeros_like(up_N)
    if objective.loss == "importance":
        return Surrogate(-ratio_N * advantages_N, ratio_N, never_N, never_N)
    if objective.loss == "cispo":
        weight_N = ratio_N.detach().clamp(max=1 + high)
        return Surrogate(-weight_N * advantages_N * logprobs_N, ratio_N, never_N, ratio_N > 1 + high)
    if objective.loss == "sapo":
        # Of two plain numbers, `where` would make float32, whatever the ratios are.
        above, below = map(ratio_N.new_tensor, (objective.sapo_tau_positive, objective.sapo_tau_negative))
        tau_N = torch.where(up_N, above, below)
        gate_N = torch.sigmoid(tau_N * (ratio_N - 1)) * 4 / tau_N
        return Surrogate(-gate_N * advantages_N, ratio_N, never_N, never_N)
    if objective.loss == "dppo":
        with torch.no_grad():
            moved_N = logprobs_N.exp() - old_logprobs_N.exp()
            cut_high_N, cut_low_N = up_N & (moved_N > high), ~up_N & (moved_N < -low)
        kept_N = ratio_N.masked_fill(cut_high_N | cut_low_N, 0.0)
        losses_N = -kept_N * advantages_N + objective.log_ratio_penalty * log_ratio_N.square()
        return Surrogate(losses_N, ratio_N, cut_low_N, cut_high_N)
    losses_N = -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - low, 1 + high) * advantages_N)
    cut_high_N = up_N & (ratio_N > 1 + high)
    if objective.dual_clip:
        bound_N = -objective.dual_clip * advantages_N
        losses_N = torch.where(down_N, torch.minimum(losses_N, bound_N), losses_N)
        cut_high_N = cut_high_N | (down_N & (ratio_N > objective.dual_clip))
    # The clip matters only where it removed the gradient, which the sign of A decides.
    return Surrogate(losses_N, ratio_N, down_N & (ratio_N < 1 - low), cut_high_N)
