"""The loss without an oracle: identities, hand values, invariances."""

import math

import pytest
import torch

from stateset_ray.grpo.loss import SUMS, LossTerms, k3, policy_loss, supervised_loss, token_logprobs

_N = 40


def _data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(_N, generator=generator, dtype=torch.float64)
    sampler = logprobs + 0.4 * torch.randn(_N, generator=generator, dtype=torch.float64)
    advantages = torch.randn(_N, generator=generator, dtype=torch.float64)
    return logprobs.requires_grad_(), sampler, advantages


def _policy(l: torch.Tensor, s: torch.Tensor, a: torch.Tensor, denominator: float = _N) -> LossTerms:  # noqa: E741
    return policy_loss(l, s, a, clip_low=0.2, clip_high=0.28, denominator=denominator)


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    logprobs, _, advantages = _data()
    [ours] = torch.autograd.grad(_policy(logprobs, logprobs.detach(), advantages).loss, logprobs)
    [theirs] = torch.autograd.grad(-(advantages * logprobs).sum() / _N, logprobs)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


def test_gradient_equals_finite_differences() -> None:
    logprobs, sampler, advantages = _data()
    reference = sampler + 0.1
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(
            x, sampler, advantages, clip_low=0.2, clip_high=0.28, denominator=7,
            reference_logprobs_N=reference, kl_coef=0.3,
        ).loss,
        logprobs,
    )  # fmt: skip


@pytest.mark.parametrize("cuts", [[_N], [1, 39], [10, 10, 10, 10], [3, 0, 17, 20]])
def test_splitting_and_permuting_changes_neither_loss_gradient_nor_diagnostics(cuts: list[int]) -> None:
    logprobs, sampler, advantages = _data()
    whole = _policy(logprobs, sampler, advantages)
    [gradient] = torch.autograd.grad(whole.loss, logprobs)
    order = torch.randperm(_N, generator=torch.Generator().manual_seed(1))
    parts = [
        _policy(*chunk)
        for chunk in zip(*(x[order].split(cuts) for x in (logprobs, sampler, advantages)), strict=True)
    ]
    [pieces] = torch.autograd.grad(sum((part.loss for part in parts), torch.zeros(())), logprobs)
    torch.testing.assert_close(pieces, gradient, rtol=1e-12, atol=1e-15)
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value, rtol=1e-12, atol=1e-12)
    largest = max(float(part.maxima["ratio"]) for part in parts if part.maxima)
    assert largest == float(whole.maxima["ratio"])


def test_clipping_counts_only_where_it_removed_the_gradient() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.27], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()
    terms = _policy(logprobs, torch.zeros(6, dtype=torch.float64), advantages, denominator=1)
    [gradient] = torch.autograd.grad(terms.loss, logprobs)
    assert (gradient == 0).tolist() == [True, False, False, True, False, False]
    assert terms.sums["clipped_high"] == 1
    assert terms.sums["clipped_low"] == 1
    assert terms.loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8 + 1.0 + 1.27))


def test_mismatch_is_signed_from_the_sampler() -> None:
    terms = _policy(torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -2.0]), torch.ones(2))
    assert terms.sums["mismatch_k1"].item() == pytest.approx(0.5)
    assert terms.sums["mismatch_k3"].item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert set(terms.sums) < set(SUMS)


def test_k3_is_the_kl_in_expectation_and_enters_unmultiplied_by_the_ratio() -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    kl = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * k3(p.log(), q.log())).sum(), kl)
    logprobs, sampler, advantages = _data()
    reference = sampler - 0.2
    with_kl = policy_loss(
        logprobs, sampler, advantages, clip_low=0.2, clip_high=0.28, denominator=_N,
        reference_logprobs_N=reference, kl_coef=0.5,
    )  # fmt: skip
    expected = _policy(logprobs, sampler, advantages).loss + 0.5 * k3(logprobs, reference).sum() / _N
    torch.testing.assert_close(with_kl.loss, expected)


def test_supervised_is_the_cross_entropy() -> None:
    logits = torch.randn(_N, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (_N,))
    ours = supervised_loss(token_logprobs(logits, ids, 1.0), denominator=_N).loss
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, ids))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = torch.randn(5, 11)
    ids = torch.randint(0, 11, (5,))
    expected = torch.log_softmax(logits / temperature, -1)[torch.arange(5), ids]
    torch.testing.assert_close(token_logprobs(logits, ids, temperature), expected)


def test_logprobs_are_float32_for_bfloat16_logits() -> None:
    logits = (30 * torch.randn(5, 11)).bfloat16()
    ids = torch.arange(5)
    expected = torch.log_softmax(logits.float() / 0.7, -1)[torch.arange(5), ids]
    ours = token_logprobs(logits, ids, 0.7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)
