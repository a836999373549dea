"""The loss against TRL's: `GRPOTrainer._compute_loss`, called without a trainer or a model."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stateset_ray.grpo.loss import policy_loss

trl = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle of this test")

B, T = 5, 9
LOW, HIGH = 0.2, 0.28


def _identity(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _trainer(logprobs_BT: torch.Tensor, beta: float) -> SimpleNamespace:
    """Everything that `_compute_loss` asks of a trainer, for one process and one micro-batch."""
    return SimpleNamespace(
        loss_type="dapo", epsilon_low=LOW, epsilon_high=HIGH, beta=beta,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        max_completion_length=T, aux_loss_enabled=False, _entropy_bonus_enabled=False, use_vllm=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=_identity, gather_for_metrics=_identity,
            reduce=_identity,
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprobs_BT, torch.zeros_like(logprobs_BT), None
        ),
    )  # fmt: skip


@pytest.mark.parametrize("per_token_credit", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_value_and_gradient_equal_trl_in_float64(beta: float, per_token_credit: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sampler_BT = -normal(B, T).abs()
    logprobs_BT = (sampler_BT + 0.4 * normal(B, T)).requires_grad_()
    reference_BT = sampler_BT + 0.3 * normal(B, T)
    advantages = normal(B, T) if per_token_credit else normal(B)
    mask_BT = torch.rand(B, T, generator=generator) < 0.6
    count = int(mask_BT.sum()) + 11  # tokens of other micro-batches of the step

    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": torch.ones(B, T, dtype=torch.long),
        "tool_mask": mask_BT.long(),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(count),
        "old_per_token_logps": sampler_BT,
        "ref_per_token_logps": reference_BT,
    }
    theirs = trl.GRPOTrainer._compute_loss(_trainer(logprobs_BT, beta), None, inputs)
    credit_BT = advantages if per_token_credit else advantages[:, None].expand(B, T)
    ours = policy_loss(
        logprobs_BT[mask_BT], sampler_BT[mask_BT], credit_BT[mask_BT],
        clip_low=LOW, clip_high=HIGH, denominator=count,
        reference_logprobs_N=reference_BT[mask_BT] if beta else None, kl_coef=beta,
    )  # fmt: skip
    assert ours.sums["clipped_low"] > 0
    assert ours.sums["clipped_high"] > 0
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-13, atol=0)
    [our_gradient] = torch.autograd.grad(ours.loss, logprobs_BT)
    [their_gradient] = torch.autograd.grad(theirs, logprobs_BT)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-13, atol=1e-16)
