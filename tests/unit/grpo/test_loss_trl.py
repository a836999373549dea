"""The objective against TRL's: `GRPOTrainer._compute_loss`, called without a trainer or a model.

Both in float64, so that what differs is a difference of formulas and not of rounding.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stateset_ray.objective import ObjectiveConfig

trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle of this test")

OTHERS = 11
"""Tokens of other micro-batches of the step, in the denominators that count tokens."""


def _identity(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _trainer(batch: Any, **options: Any) -> SimpleNamespace:
    """Everything that `_compute_loss` asks of a trainer, for one process and one micro-batch."""
    arguments = {
        "delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1,
        # As tensors, because torch.where of two plain numbers is float32 and rounds 1.05.
        "sapo_temperature_pos": _double(1.0), "sapo_temperature_neg": _double(1.05),
    }  # fmt: skip
    arguments |= {name: options.pop(name) for name in list(options) if name in arguments}
    settings = {
        "loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0,
        "importance_sampling_level": "token", "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "max_completion_length": batch.mask.shape[1], "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "entropy_coef": 0.0,
        "use_vllm": False, "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
    }  # fmt: skip
    return SimpleNamespace(
        **{**settings, **options},
        args=SimpleNamespace(**arguments),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=_identity, gather_for_metrics=_identity,
            reduce=_identity,
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, batch.entropies, None),
    )  # fmt: skip


def _theirs(batch: Any, *, correction: torch.Tensor | None = None, count: float, **options: Any) -> Any:
    """Their loss. Their "old" policy is what our ratio is taken against, so the caller says which it is."""
    inputs = {
        "prompt_ids": torch.zeros(len(batch.mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(batch.mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(batch.mask, dtype=torch.long),
        "completion_mask": torch.ones_like(batch.mask, dtype=torch.long),
        "tool_mask": batch.mask.long(),
        "advantages": options.pop("advantages", batch.advantages[:, 0]),
        "num_items_in_batch": torch.tensor(count),
        "old_per_token_logps": options.pop("old"),
        "ref_per_token_logps": batch.reference,
    }
    if correction is not None:
        inputs["importance_sampling_ratio"] = correction
        options |= {"use_vllm": True, "vllm_importance_sampling_correction": True}
    return trl.GRPOTrainer._compute_loss(_trainer(batch, **options), None, inputs)


METHODS = {
    # name: (what ours is called, what theirs is called)
    "grpo": ({"preset": "grpo"}, {"loss_type": "grpo", "epsilon_high": 0.2}),
    "dapo": ({"preset": "dapo"}, {"loss_type": "dapo"}),
    "dr_grpo": ({"preset": "dr_grpo"}, {"loss_type": "dr_grpo", "epsilon_high": 0.2}),
    # Their epsilon_high is the cap itself, ours is what the cap exceeds 1 by.
    "cispo": ({"preset": "cispo"}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "cispo_tight": ({"preset": "cispo", "clip_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "gspo": (
        {"preset": "gspo", "clip_low": 0.05, "clip_high": 0.06},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.05,
            "epsilon_high": 0.06,
        },
    ),
    # Theirs is a mean over sequences of means, whatever else is asked for.
    "sapo": ({"loss": "sapo", "aggregation": "sequence_mean"}, {"loss_type": "sapo"}),
    "sapo_temperatures": (
        {"loss": "sapo", "sapo_tau_positive": 0.6, "sapo_tau_negative": 2.5, "aggregation": "sequence_mean"},
        {"loss_type": "sapo", "sapo_temperature_pos": _double(0.6), "sapo_temperature_neg": _double(2.5)},
    ),
    # Two-sided clipping: their bound on the ratio in the branch without a clip is the dual clip.
    "dual_clip": ({"dual_clip": 1.4}, {"delta": 1.4}),
}


@pytest.mark.parametrize("trust", ["sampler", "proximal"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_bug_51_value_and_gradient_equal_trl(
    name: str, beta: float, trust: str, seed: int, rectangle: Any, terms: Any, aggregation: Any,
    value_and_gradient: Any,
) -> None:  # fmt: skip
    ours, theirs = METHODS[name]
    objective = ObjectiveConfig(**{**ours, "trust": trust, "kl_coef": beta})
    batch = rectangle(seed)
    weights, denominator = aggregation(batch, objective.aggregation)
    if objective.aggregation == "token_mean":
        denominator += OTHERS
    mine = terms(batch, objective, weights=weights, denominator=denominator)
    if name not in ("sapo", "sapo_temperatures", "cispo"):
        # Where nothing was cut, agreement would say nothing about the clip.
        assert mine.sums["clipped_high"] > 0
    old = batch.sampler if trust == "sampler" else batch.proximal
    reference = _theirs(batch, count=float(batch.mask.sum()) + OTHERS, old=old, beta=beta, **theirs)
    _agree(mine.loss, reference, batch, value_and_gradient)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "sapo", "dual_clip"])
def test_advantages_per_token_equal_trl(
    name: str, rectangle: Any, terms: Any, aggregation: Any, value_and_gradient: Any
) -> None:
    ours, theirs = METHODS[name]
    objective = ObjectiveConfig(**ours)
    batch = rectangle(7, per_token=True)
    weights, denominator = aggregation(batch, objective.aggregation)
    mine = terms(batch, objective, weights=weights, denominator=denominator)
    reference = _theirs(
        batch, count=float(batch.mask.sum()), old=batch.sampler, advantages=batch.advantages, **theirs
    )
    _agree(mine.loss, reference, batch, value_and_gradient)


def test_a_ratio_per_sequence_keeps_the_credit_of_each_token_where_trl_averages_it(
    rectangle: Any, terms: Any, value_and_gradient: Any, aggregation: Any
) -> None:
    # At ratio 1 the gradient of token t should be -A_t. The gradient of the mean of log-ratios gives all
    # tokens of a row the row's mean instead; ours is GSPO-token, which differs in nothing else.
    batch = rectangle(7, per_token=True)
    weights, denominator = aggregation(batch, "sequence_mean")
    mine = terms(batch, ObjectiveConfig(preset="gspo"), weights=weights, denominator=denominator,
                 recomputed=False)  # fmt: skip
    reference = _theirs(
        batch, count=1.0, old=None, advantages=batch.advantages, loss_type="grpo",
        importance_sampling_level="sequence",
    )  # fmt: skip
    (value, gradient), (their_value, their_gradient) = (
        value_and_gradient(loss, batch) for loss in (mine.loss, reference)
    )
    counts = batch.mask.sum(1, keepdim=True).double()
    means = (batch.advantages * batch.mask).sum(1, keepdim=True) / counts
    scale = batch.mask / counts / len(counts)
    assert value == pytest.approx(their_value, rel=1e-13)
    torch.testing.assert_close(gradient, -batch.advantages * scale, rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(their_gradient, -means * scale, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "sapo", "dual_clip"])
def test_truncated_importance_sampling_equals_trl(
    name: str, beta: float, rectangle: Any, terms: Any, aggregation: Any, value_and_gradient: Any,
) -> None:  # fmt: skip
    # With vLLM, TRL multiplies each token's loss (but not its KL) by min(exp(old - sampled), C).
    ours, theirs = METHODS[name]
    objective = ObjectiveConfig(
        **{**ours, "trust": "proximal", "correction": "tis", "correction_high": 1.2, "kl_coef": beta}
    )
    batch = rectangle(3)
    weights, denominator = aggregation(batch, objective.aggregation)
    mine = terms(batch, objective, weights=weights, denominator=denominator)
    assert mine.sums["corrected"] > 0
    correction = (batch.proximal - batch.sampler).exp().clamp(max=1.2)
    reference = _theirs(
        batch, count=float(batch.mask.sum()), old=batch.proximal, correction=correction, beta=beta, **theirs
    )
    _agree(mine.loss, reference, batch, value_and_gradient)


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_the_entropy_bonus_equals_trl(
    name: str, rectangle: Any, terms: Any, aggregation: Any, value_and_gradient: Any
) -> None:
    # TRL's bonus is a mean over tokens under every aggregation; ours follows the aggregation of the loss,
    # so that only the token means can be compared.
    ours, theirs = METHODS[name]
    batch = rectangle(5)
    weights, denominator = aggregation(batch, "token_mean")
    objective = ObjectiveConfig(**{**ours, "entropy_coef": 0.07})
    mine = terms(batch, objective, weights=weights, denominator=denominator)
    reference = _theirs(
        batch, count=denominator, old=batch.sampler, _entropy_bonus_enabled=True, entropy_coef=0.07, **theirs
    )
    _agree(mine.loss, reference, batch, value_and_gradient)
    gradients = [torch.autograd.grad(loss, batch.entropies)[0] for loss in (mine.loss, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-16)


def test_the_clip_fractions_are_trls(rectangle: Any, terms: Any) -> None:
    batch = rectangle(2, rows=8)
    mine = terms(batch, ObjectiveConfig())
    trainer = _trainer(batch)
    inputs = {
        "prompt_ids": torch.zeros(8, 1, dtype=torch.long), "prompt_mask": torch.ones(8, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(batch.mask, dtype=torch.long),
        "completion_mask": batch.mask.long(), "advantages": batch.advantages[:, 0],
        "num_items_in_batch": torch.tensor(1.0), "old_per_token_logps": batch.sampler,
    }  # fmt: skip
    trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    for side in ("low", "high"):
        # TRL reduces its counts in float32.
        [theirs] = trainer._metrics["train"][f"clip_ratio/{side}_mean"]
        assert float(mine.sums[f"clipped_{side}"] / mine.sums["tokens"]) == pytest.approx(theirs, rel=1e-6)
        assert theirs > 0


def _agree(mine: Any, reference: Any, batch: Any, value_and_gradient: Any) -> None:
    (value, gradient), (their_value, their_gradient) = (
        value_and_gradient(loss, batch) for loss in (mine, reference)
    )
    assert value == pytest.approx(their_value, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-12, atol=1e-15)
    assert float(their_gradient.abs().max()) > 1e-3
