"""The objective against losses, gradients and advantages that prime-rl's and AReaL's own code computed.

The numbers are in golden.json, their origin and the others' formulas in golden.md. Here stands which of
our settings each of theirs is, and which of theirs we have no setting for.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stateset_ray.grpo.advantages import step_advantages
from stateset_ray.grpo.loss import Tokens, policy_loss
from stateset_ray.objective import ObjectiveConfig

CASES = {
    case["name"]: case
    for case in json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
}

NOT_OURS = {
    "prime_rl_ipo_with_square": "a bound on the change of a probability whatever the sign of the advantage",
    "prime_rl_ipo_wide_without_square": "the same",
    "prime_rl_ipo_defaults": "the same",
    "prime_rl_ipo_defaults_extreme_ratios": "the same",
    "prime_rl_ipo_tight_cap": "the same",
    "prime_rl_ppo_defaults_extreme_ratios": "a cap of 10,000 on the ratio, which keeps the gradient",
    "prime_rl_cispo_both_bounds": "a lower bound on CISPO's weight",
    "areal_cispo": "a lower bound on CISPO's weight",
    "areal_decoupled_token_clamp_two_sided": "a lower bound on a truncated weight",
    "areal_decoupled_token_clamp_two_sided_dual_clip": "the same",
    "areal_decoupled_sequence_clamp_two_sided": "the same",
    "areal_decoupled_sequence_clamp_two_sided_dual_clip": "the same",
    "areal_decoupled_sequence_clamp_sum": "the same",
    "areal_gspo_sequence_clamp": "the same",
    "areal_decoupled_sequence_mask_sum": "a sequence judged by the product of its tokens' weights",
    "areal_decoupled_sequence_mask_max": "a sequence judged by its largest weight",
    "areal_token_mask_kl_k1": "a mask by another number than the weight",
    "areal_token_mask_kl_k2": "the same",
    "areal_token_mask_kl_k3": "the same",
    "areal_token_mask_binary_kl": "the same",
    "areal_sequence_mask_kl_k1": "the same",
    "areal_sequence_mask_kl_k3": "the same",
    "areal_gspo_token_mask": "dropped tokens leave the mean over the sequence too",
    "areal_sapo_sequence": "SAPO with a ratio per sequence",
    "areal_m2po": "tokens dropped until a second moment is small, and dropped from the denominator",
}
"""Cases that no setting of ours is equal to, and why."""

LOSSES = [name for name, case in CASES.items() if case["kind"] == "loss" and name not in NOT_OURS]
ADVANTAGES = [name for name, case in CASES.items() if case["kind"] == "advantages"]


def _prime_rl(settings: dict[str, Any], function: str) -> dict[str, Any]:
    """Our objective for prime-rl's, whose ratio is always against the sampler and has a gradient."""
    if function == "default_loss_fn":
        return {
            "loss": "dppo", "clip_low": settings["dppo_mask_low"], "clip_high": settings["dppo_mask_high"],
            "log_ratio_penalty": settings["kl_tau"],
        }  # fmt: skip
    if function == "IcePopLoss.loss":
        # Theirs is keep * e^(l-s). With e^(l-s) as a constant weight, kept or dropped, beside a ratio to
        # the present policy (1, with its gradient), loss and gradient are the same.
        return {
            "loss": "importance", "trust": "proximal", "correction": "mis",
            "correction_low": settings["ratio_low"], "correction_high": settings["ratio_high"],
        }  # fmt: skip
    # Their bounds are those of the ratio itself, ours are distances from 1.
    if function == "PPOLoss.loss":
        return {"clip_low": 1 - settings["ratio_low"], "clip_high": settings["ratio_high"] - 1}
    assert function == "CISPOLoss.loss" and settings["ratio_low"] == 0
    return {"loss": "cispo", "clip_high": settings["ratio_high"] - 1}


def _areal(settings: dict[str, Any], function: str) -> dict[str, Any]:
    """Our objective for AReaL's, whose ratio is against the proximal policy (SAPO's against the sampler)."""
    if function == "sapo_loss_fn":
        return {
            "loss": "sapo",
            "sapo_tau_positive": settings["tau_pos"],
            "sapo_tau_negative": settings["tau_neg"],
        }
    correction = _areal_correction(settings)
    if function == "cispo_loss_fn":
        assert settings["eps_clip"] == 1  # a lower bound of 0: none
        return {"trust": "proximal", "loss": "cispo", "clip_high": settings["eps_clip_higher"], **correction}
    assert function == "ppo_actor_loss_fn"
    return {
        "trust": "proximal",
        "ratio": settings["importance_sampling_level"],
        "clip_low": settings["eps_clip"],
        "clip_high": settings["eps_clip_higher"] or settings["eps_clip"],
        "dual_clip": settings["c_clip"] or 0.0,
        **correction,
    }


def _areal_correction(settings: dict[str, Any]) -> dict[str, Any]:
    if "behav_imp_weight_cap" in settings:
        # The earlier form: a mask with an upper bound; without a cap the weight still stood.
        cap = settings["behav_imp_weight_cap"]
        if cap is None:
            return {"correction": "tis", "correction_high": 1e9}
        return {"correction": "mis", "correction_low": 0.0, "correction_high": cap}
    rejection = settings["rejection_sampling"]
    if rejection is None:
        return {}  # no weight at all, even though the policies differ
    assert rejection["metric"] == "ratio" and rejection["agg"] == "mean"
    bounds = {"correction_level": rejection["level"], "correction_high": rejection["upper"]}
    if rejection["action"] == "mask":
        # "mean" is the mean of log-ratios, and their bounds are kept on both sides as ours are.
        return {"correction": "mis", "correction_low": rejection["lower"] or 0.0, **bounds}
    assert not rejection["lower"]
    return {"correction": "tis", **bounds}


def _objective(case: dict[str, Any]) -> ObjectiveConfig:
    translate = _prime_rl if case["name"].startswith("prime_rl") else _areal
    return ObjectiveConfig(**translate(case["settings"], case["source"]["function"]))


def _double(rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _advantages(case: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    advantages = _double(case["inputs"]["advantages"])
    if case["settings"].get("importance_sampling_level") == "sequence":
        # AReaL's GSPO gives each token the mean advantage of its sequence; ours keeps each token's own.
        means = (advantages * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        advantages = means.expand_as(advantages)
    return advantages * case["settings"].get("adv_tau", 1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_bug_51_loss_and_gradient_are_those_of_their_code(name: str) -> None:
    case = CASES[name]
    inputs = case["inputs"]
    mask = torch.tensor(inputs["mask"]).bool()
    logprobs = _double(inputs["logprobs"]).requires_grad_()
    proximal = inputs["proximal_logprobs"]
    tokens = Tokens(
        logprobs=logprobs[mask],
        sampler_logprobs=_double(inputs["sampler_logprobs"])[mask],
        advantages=_advantages(case, mask)[mask],
        # Both are sums over tokens by a count that includes what was rejected: a token mean.
        weights=torch.ones(int(mask.sum()), dtype=torch.float64),
        rows=torch.arange(len(mask))[:, None].expand_as(mask)[mask],
        samples=len(mask),
        proximal_logprobs=None if proximal is None else _double(proximal)[mask],
    )
    loss = policy_loss(tokens, _objective(case), denominator=inputs["denominator"]).loss
    [gradient] = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-12, abs=1e-15)
    torch.testing.assert_close(gradient, _double(case["outputs"]["gradient"]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_those_of_their_code(name: str) -> None:
    case = CASES[name]
    rewards = [{"": [float(reward)]} for reward in case["inputs"]["rewards"]]
    [ours] = step_advantages([rewards], ObjectiveConfig(advantage="max_rl"))
    flat = [advantage[0] for advantage in ours if advantage is not None]
    # prime-rl computes in float32.
    assert flat == pytest.approx(case["outputs"]["advantages"], rel=1e-6, abs=1e-7)


def test_every_part_of_ours_that_they_have_is_compared() -> None:
    objectives = [_objective(CASES[name]) for name in LOSSES]
    for part, values in {
        "loss": {"ppo", "dppo", "importance", "cispo", "sapo"},
        "ratio": {"token", "sequence"},
        "correction": {"none", "tis", "mis"},
        "correction_level": {"token", "sequence"},
    }.items():
        assert {getattr(objective, part) for objective in objectives} == values
    assert any(objective.dual_clip for objective in objectives)
    assert set(NOT_OURS) <= set(CASES)
    assert len(ADVANTAGES) == 5
