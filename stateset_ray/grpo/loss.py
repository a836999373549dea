"""The objective, as pure functions over the sampled tokens of a micro-batch.

Letters: N sampled (masked) tokens of one micro-batch, end to end; V vocabulary. Every loss is a sum over
its tokens divided by `denominator`, the count of masked tokens of the WHOLE optimizer step over all ranks
(`learner.batch` says which tokens count): so the gradient is the same however the step is cut into
micro-batches and ranks, and a token weighs the same in a long conversation as in a short one.

Other objectives are other functions `(logprobs_N, sampler_logprobs_N, advantages_N, ...) -> LossTerms`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["MAXIMA", "SUMS", "LossTerms", "k3", "policy_loss", "supervised_loss", "token_logprobs"]

SUMS = (
    "loss",
    "tokens",
    "ratio",
    "clipped_low",
    "clipped_high",
    "mismatch_k1",
    "mismatch_k3",
    "kl_reference",
)
"""Diagnostics that add up over micro-batches and ranks; all but `loss` are then divided by `tokens`."""

MAXIMA = ("ratio",)
"""Diagnostics of which the largest over micro-batches and ranks is kept."""


@dataclass(frozen=True)
class LossTerms:
    """What one micro-batch contributes to the step.

    Attributes:
        loss: [] with gradient; the sum over micro-batches and ranks is the step's loss.
        sums: float64 [] without gradient, named as in `SUMS`.
        maxima: float64 [] without gradient, named as in `MAXIMA`.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]


def token_logprobs(logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability of each token under `softmax(logits / temperature)`, in float32.

    The temperature divides the logits, as in sampling; float32 whatever the model computes in.

    Args:
        logits_NV: [N, V] the logits that predict the tokens.
        ids_N: [N] the tokens.
        temperature: above 0.

    Returns:
        float32 [N] natural log-probabilities (float64 for float64 logits).

    Example:
        >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2]), 1.0).exp().tolist()
        [0.25]
    """
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    # log_softmax and the choice in one: on CPUs twice as fast, backwards, as logits minus logsumexp.
    return -F.cross_entropy(logits_NV, ids_N, reduction="none")


def policy_loss(
    logprobs_N: torch.Tensor,
    sampler_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    denominator: float,
    reference_logprobs_N: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> LossTerms:
    """The clipped policy gradient of one micro-batch.

    `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` with `r = exp(l - s)`: PPO (Schulman et al. 2017,
    arXiv:1707.06347) with the higher upper bound and the token-level sum of DAPO (Yu et al. 2025,
    arXiv:2503.14476). The ratio is taken against the log-probabilities `s` captured when the tokens were
    sampled, so that staleness and sampler/trainer mismatch are corrected by the same clip, and no second
    forward pass is needed. Where l = s the gradient is REINFORCE's.

    With a reference, `kl_coef * k3` is added per token, not multiplied by the ratio (TRL does so by
    default, which changes the gradient even at r = 1).

    Args:
        logprobs_N: [N] under the policy being trained, with gradient.
        sampler_logprobs_N: [N] captured at sampling time, at the same temperature.
        advantages_N: [N] credit per token.
        clip_low: in (0, 1); `clip_high` above 0.
        denominator: masked tokens of the whole step.
        reference_logprobs_N: [N] under the frozen reference, if any.
        kl_coef: weight of the KL term.
    """
    log_ratio_N = logprobs_N - sampler_logprobs_N
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    per_token_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    kl_N = None
    if reference_logprobs_N is not None:
        kl_N = k3(logprobs_N, reference_logprobs_N)
        per_token_N = per_token_N + kl_coef * kl_N
    loss = per_token_N.sum() / denominator
    with torch.no_grad():
        return LossTerms(
            loss,
            {
                "loss": loss.detach().double(),
                "tokens": _count(logprobs_N),
                "ratio": _sum(ratio_N),
                # The clip matters only where it removed the gradient, which the sign of A decides.
                "clipped_low": _sum((ratio_N < 1 - clip_low) & (advantages_N < 0)),
                "clipped_high": _sum((ratio_N > 1 + clip_high) & (advantages_N > 0)),
                # KL(sampler || trainer) from the sampler's own tokens: k1 is s - l, k3 is r - 1 - log r.
                "mismatch_k1": _sum(-log_ratio_N),
                "mismatch_k3": _sum(ratio_N - 1 - log_ratio_N),
                **({} if kl_N is None else {"kl_reference": _sum(kl_N)}),
            },
            {"ratio": ratio_N.detach().max().double()} if ratio_N.numel() else {},
        )


def supervised_loss(logprobs_N: torch.Tensor, *, denominator: float) -> LossTerms:
    """Minus the log-likelihood of the masked tokens, `-sum(l) / denominator`: the warm start."""
    loss = -logprobs_N.sum() / denominator
    return LossTerms(loss, {"loss": loss.detach().double(), "tokens": _count(logprobs_N)}, {})


def k3(logprobs_N: torch.Tensor, reference_logprobs_N: torch.Tensor) -> torch.Tensor:
    """Per-token estimate `exp(-x) + x - 1`, `x = l - ref`, of KL(policy || reference).

    Never negative, unbiased as a value (Schulman 2020, "Approximating KL Divergence"). As a loss on
    on-policy tokens its gradient is that of KL(reference || policy).

    Args:
        logprobs_N: [N] under the policy; `reference_logprobs_N` [N] under the frozen reference.

    Returns:
        [N] nats.
    """
    x_N = logprobs_N - reference_logprobs_N
    return torch.exp(-x_N) + x_N - 1


def _sum(values_N: torch.Tensor) -> torch.Tensor:
    return values_N.detach().sum(dtype=torch.float64)


def _count(values_N: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(values_N.numel()), dtype=torch.float64, device=values_N.device)
