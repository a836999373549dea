"""The objective against formulas in plain Python, one token at a time, with derivatives taken by hand.

Nothing here shares code with the implementation, nor with automatic differentiation.
"""

import math
from itertools import product
from typing import Any

import pytest
import torch

from stateset_ray.objective import ObjectiveConfig

Floats = list[list[float]]


# One token: (loss, derivative with respect to its log-probability).


def _importance(ratio: float, l: float, o: float, a: float, c: ObjectiveConfig) -> tuple[float, float]:  # noqa: E741
    return -ratio * a, -ratio * a


def _ppo(ratio: float, l: float, o: float, a: float, c: ObjectiveConfig) -> tuple[float, float]:  # noqa: E741
    if a > 0 and ratio > 1 + c.clip_high:
        return -(1 + c.clip_high) * a, 0.0
    if a < 0 and ratio < 1 - c.clip_low:
        return -(1 - c.clip_low) * a, 0.0
    if a < 0 and c.dual_clip and ratio > c.dual_clip:
        return -c.dual_clip * a, 0.0
    return -ratio * a, -ratio * a


def _cispo(ratio: float, l: float, o: float, a: float, c: ObjectiveConfig) -> tuple[float, float]:  # noqa: E741
    weight = min(ratio, 1 + c.clip_high)
    return -weight * a * l, -weight * a


def _sapo(ratio: float, l: float, o: float, a: float, c: ObjectiveConfig) -> tuple[float, float]:  # noqa: E741
    tau = c.sapo_tau_positive if a > 0 else c.sapo_tau_negative
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    return -4 / tau * gate * a, -4 * gate * (1 - gate) * ratio * a


def _dppo(ratio: float, l: float, o: float, a: float, c: ObjectiveConfig) -> tuple[float, float]:  # noqa: E741
    moved = math.exp(l) - math.exp(o)
    gone = moved > c.clip_high if a > 0 else moved < -c.clip_low
    policy = 0.0 if gone else -a * math.exp(l - o)
    penalty = c.log_ratio_penalty
    return policy + penalty * (l - o) ** 2, policy + 2 * penalty * (l - o)


_KINDS = {"importance": _importance, "ppo": _ppo, "cispo": _cispo, "sapo": _sapo, "dppo": _dppo}


def _correction(d: float, c: ObjectiveConfig) -> float:
    if c.correction == "none":
        return 1.0
    weight = math.exp(d)
    if c.correction == "tis":
        return min(weight, c.correction_high)
    return weight if c.correction_low <= weight <= c.correction_high else 0.0


def _kl(x: float, estimator: str) -> tuple[float, float]:
    if estimator == "k2":
        return x * x / 2, x
    return math.exp(-x) + x - 1, 1 - math.exp(-x)


def _expected(
    data: dict[str, Floats], c: ObjectiveConfig, denominator: float
) -> tuple[float, Floats, Floats]:
    """Loss, its gradient with respect to log-probabilities, and to entropies."""
    mask = data["mask"]
    total = 0.0
    gradient = [[0.0] * len(row) for row in mask]
    by_entropy = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        sampled = [t for t, m in enumerate(row) if m]
        old = data["sampler"] if c.trust == "sampler" else data["proximal"]
        mean_ratio = math.exp(sum(data["logprobs"][b][t] - old[b][t] for t in sampled) / len(sampled))
        mean_d = sum(data["proximal"][b][t] - data["sampler"][b][t] for t in sampled) / len(sampled)
        for t in sampled:
            l, o, a = data["logprobs"][b][t], old[b][t], data["advantages"][b][t]  # noqa: E741
            ratio = mean_ratio if c.ratio == "sequence" else math.exp(l - o)
            loss, slope = _KINDS[c.loss](ratio, l, o, a, c)
            d = data["proximal"][b][t] - data["sampler"][b][t]
            w = _correction(mean_d if c.correction_level == "sequence" else d, c)
            loss, slope = w * loss, w * slope
            if c.kl_coef and c.kl_in == "loss":
                kl, kl_slope = _kl(l - data["reference"][b][t], c.kl_estimator)
                loss, slope = loss + c.kl_coef * kl, slope + c.kl_coef * kl_slope
            loss -= c.entropy_coef * data["entropies"][b][t]
            share = 1 / len(sampled) if c.aggregation == "sequence_mean" else 1.0
            total += share * loss / denominator
            gradient[b][t] = share * slope / denominator
            by_entropy[b][t] = -share * c.entropy_coef / denominator
    return total, gradient, by_entropy


_LOSSES: dict[str, dict[str, Any]] = {
    "importance": {"loss": "importance"},
    "ppo": {"loss": "ppo"},
    "ppo_asymmetric": {"loss": "ppo", "clip_low": 0.1, "clip_high": 0.4},
    "dual_clip": {"loss": "ppo", "dual_clip": 1.5},
    "gspo": {"loss": "ppo", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.08},
    "gspo_dual_clip": {
        "loss": "ppo",
        "ratio": "sequence",
        "clip_low": 0.02,
        "clip_high": 0.03,
        "dual_clip": 1.1,
    },
    "cispo": {"loss": "cispo", "clip_high": 0.3},
    "sapo": {"loss": "sapo"},
    "dppo": {"loss": "dppo", "clip_low": 0.05, "clip_high": 0.08, "log_ratio_penalty": 0.02},
}
_CORRECTIONS: list[dict[str, Any]] = [
    {"trust": "sampler"},
    # "proximal" without a correction is what AReaL calls PPO; with one it is decoupled PPO.
    {"trust": "proximal"},
    {"trust": "proximal", "correction": "tis", "correction_high": 1.2},
    {"trust": "proximal", "correction": "mis", "correction_low": 0.7, "correction_high": 1.3},
    {"trust": "proximal", "correction": "tis", "correction_level": "sequence", "correction_high": 1.05},
    {
        "trust": "proximal",
        "correction": "mis",
        "correction_level": "sequence",
        "correction_low": 0.9,
        "correction_high": 1.1,
    },
]
_EXTRAS: list[dict[str, Any]] = [
    {},
    {"kl_coef": 0.3, "kl_estimator": "k2", "aggregation": "sequence_mean"},
    {"kl_coef": 0.2, "kl_estimator": "k3", "entropy_coef": 0.05, "aggregation": "constant"},
    # In the reward, the KL is not the loss's business.
    {"kl_coef": 0.2, "kl_estimator": "k1", "kl_in": "reward"},
]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("extra", range(len(_EXTRAS)))
@pytest.mark.parametrize(
    ("name", "correction"),
    [
        (name, k)
        for name, k in product(_LOSSES, range(len(_CORRECTIONS)))
        if name != "dppo" or _CORRECTIONS[k]["trust"] == "sampler"
    ],
)
def test_bug_51_value_and_gradient_equal_the_formulas(
    name: str, correction: int, extra: int, per_token: bool, rectangle: Any, terms: Any, aggregation: Any
) -> None:
    objective = ObjectiveConfig(**{**_LOSSES[name], **_CORRECTIONS[correction], **_EXTRAS[extra]})
    batch = rectangle(11 + extra, rows=6, per_token=per_token)
    weights, denominator = aggregation(batch, objective.aggregation)
    denominator += 3  # as if there were other micro-batches
    ours = terms(batch, objective, weights=weights, denominator=denominator)
    loss, gradient, by_entropy = _expected(batch.lists(), objective, denominator)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-14)
    _close(torch.autograd.grad(ours.loss, batch.logprobs, retain_graph=True)[0], gradient)
    if objective.entropy_coef:
        _close(torch.autograd.grad(ours.loss, batch.entropies)[0], by_entropy)


def _close(ours: torch.Tensor, theirs: Floats) -> None:
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ["ppo", "dual_clip", "gspo_dual_clip", "cispo", "dppo"])
def test_both_sides_of_every_bound_were_met(name: str, rectangle: Any, terms: Any) -> None:
    # The comparison above would hold for a clip that is never reached.
    sums = terms(rectangle(11, rows=6, per_token=True), ObjectiveConfig(**_LOSSES[name])).sums
    assert 0 < sums["clipped_high"] < sums["tokens"]
    assert (sums["clipped_low"] > 0) == (name != "cispo")


@pytest.mark.parametrize("correction", range(2, len(_CORRECTIONS)))
def test_corrections_were_at_work(correction: int, rectangle: Any, terms: Any) -> None:
    sums = terms(rectangle(11, rows=6), ObjectiveConfig(**_CORRECTIONS[correction])).sums
    assert 0 < sums["corrected"] < sums["tokens"]


def test_the_steered_coefficient_replaces_the_configured_one(rectangle: Any, terms: Any) -> None:
    batch = rectangle(4)
    steered = terms(batch, ObjectiveConfig(kl_coef=0.3), kl_coef=0.1).loss
    assert steered.item() == pytest.approx(terms(batch, ObjectiveConfig(kl_coef=0.1)).loss.item(), rel=1e-14)


def test_a_positive_advantage_knows_no_dual_clip(rectangle: Any, terms: Any, changed: Any) -> None:
    batch = rectangle(4)
    batch = changed(batch, advantages=batch.advantages.abs())
    with_bound = terms(batch, ObjectiveConfig(dual_clip=1.3)).loss
    assert with_bound.item() == terms(batch, ObjectiveConfig()).loss.item()
