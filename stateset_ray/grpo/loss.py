"""The objective, as pure functions over the sampled tokens of a micro-batch.

Letters: N sampled (masked) tokens of one micro-batch, end to end; V vocabulary; S samples. Every loss is a
weighted sum over its tokens divided by `denominator`, which belongs to the WHOLE optimizer step over all
ranks: so the gradient is the same however the step is cut into micro-batches and ranks. With weights of 1
and the count of masked tokens it is the token mean; `actors.credit` has the other aggregations.

What a token's loss is depends on the method: `grpo.surrogate`. Corrections, KL: `grpo.divergence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stateset_ray.grpo.divergence import correction_weights, kl_estimate
from stateset_ray.grpo.surrogate import surrogate
from stateset_ray.objective import ObjectiveConfig

__all__ = ["MAXIMA", "SUMS", "LossTerms", "Tokens", "policy_loss", "supervised_loss", "token_logprobs"]

SUMS = (
    "loss",
    "tokens",
    "ratio",
    "clipped_low",
    "clipped_high",
    "mismatch_k1",
    "mismatch_k3",
    "correction",
    "correction_squared",
    "corrected",
    "kl_reference",
    "entropy",
)
"""Diagnostics that add up over micro-batches and ranks; all but `loss` are then divided by `tokens`."""

MAXIMA = ("ratio", "inverse_ratio")
"""Diagnostics of which the largest over micro-batches and ranks is kept."""


@dataclass(frozen=True)
class Tokens:
    """What is known of the sampled tokens of a micro-batch.

    Attributes:
        logprobs: [N] under the policy being trained, with gradient.
        sampler_logprobs: [N] captured at sampling time, at the same temperature.
        advantages: [N] credit per token.
        weights: [N] of each token in the loss.
        rows: int64 [N] the sample of each token, in [0, samples).
        samples: S.
        proximal_logprobs: [N] under the policy as the step began; None where that is the policy being
            trained, as in the first (or only) optimizer step on a batch.
        reference_logprobs: [N] under the frozen reference, if there is one.
        entropies: [N] of the distribution that each token was drawn from, in nats; with gradient if the
            objective has an entropy bonus.
    """

    logprobs: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    samples: int
    proximal_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
    entropies: torch.Tensor | None = None


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
    tokens: Tokens, objective: ObjectiveConfig, *, denominator: float, kl_coef: float | None = None
) -> LossTerms:
    """The policy gradient of one micro-batch, composed as the objective says.

    `sum(w_t c_t surrogate_t + kl_coef kl_t - entropy_coef H_t) / denominator` with the token's weight on all
    three: `surrogate` is `grpo.surrogate`, `c` the off-policy correction, the KL stands here only with
    `kl_in = "loss"` and is not multiplied by the ratio (TRL does so by default, which changes the gradient
    even at r = 1).

    The ratio is taken against what was captured when the tokens were sampled (`trust = "sampler"`), so that
    staleness and the difference between sampler and trainer are corrected by the same clip and no second
    forward pass is needed; or against the policy as the step began (`"proximal"`), with the correction
    beside it: decoupled PPO (Hilton et al. 2022, arXiv:2110.00641; Fu et al. 2025, arXiv:2505.24298).
    On tokens of the current policy, all of them have the gradient of REINFORCE.

    Args:
        denominator: of the whole step.
        kl_coef: weight of the KL, instead of `objective.kl_coef`, where it is steered.
    """
    current = tokens.logprobs.detach()
    proximal = current if tokens.proximal_logprobs is None else tokens.proximal_logprobs
    around = tokens.sampler_logprobs if objective.trust == "sampler" else proximal
    cut = surrogate(tokens.logprobs, around, tokens.advantages, tokens.rows, tokens.samples, objective)
    weights = correction_weights(proximal, tokens.sampler_logprobs, tokens.rows, tokens.samples, objective)
    per_token = cut.losses if objective.correction == "none" else cut.losses * weights
    sums: dict[str, torch.Tensor] = {}
    if tokens.reference_logprobs is not None:
        kl = kl_estimate(tokens.logprobs, tokens.reference_logprobs, objective.kl_estimator)
        if objective.kl_in == "loss":
            per_token = per_token + (objective.kl_coef if kl_coef is None else kl_coef) * kl
        sums["kl_reference"] = _sum(kl)
    if tokens.entropies is not None:
        if objective.entropy_coef:
            per_token = per_token - objective.entropy_coef * tokens.entropies
        sums["entropy"] = _sum(tokens.entropies)
    loss = (per_token * tokens.weights).sum() / denominator
    with torch.no_grad():
        # KL(sampler || trainer) from the sampler's own tokens: k1 is s - o, k3 is w - 1 - log w.
        log_mismatch = proximal - tokens.sampler_logprobs
        sums |= {
            "loss": loss.detach().double(),
            "tokens": _count(current),
            "ratio": _sum(cut.ratios),
            "clipped_low": _sum(cut.cut_low),
            "clipped_high": _sum(cut.cut_high),
            "mismatch_k1": _sum(-log_mismatch),
            "mismatch_k3": _sum(log_mismatch.exp() - 1 - log_mismatch),
        }
        if objective.correction != "none":
            sums["correction"] = _sum(weights)
            sums["correction_squared"] = _sum(weights.square())
            sums["corrected"] = _sum((weights == 0) | (weights == objective.correction_high))
        ratios = cut.ratios.detach()
        maxima = {"ratio": ratios, "inverse_ratio": 1 / ratios} if ratios.numel() else {}
    return LossTerms(loss, sums, {name: values.max().double() for name, values in maxima.items()})


def supervised_loss(logprobs_N: torch.Tensor, weights_N: torch.Tensor, *, denominator: float) -> LossTerms:
    """Minus the log-likelihood of the masked tokens, `-sum(w l) / denominator`: the warm start."""
    loss = -(logprobs_N * weights_N).sum() / denominator
    return LossTerms(loss, {"loss": loss.detach().double(), "tokens": _count(logprobs_N)}, {})


def _sum(values_N: torch.Tensor) -> torch.Tensor:
    return values_N.detach().sum(dtype=torch.float64)


def _count(values_N: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(values_N.numel()), dtype=torch.float64, device=values_N.device)
