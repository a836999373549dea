"""KL estimates as values and as losses, the KL still to come, its steering, off-policy weights."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.grpo.divergence import correction_weights, kl_estimate, kl_returns, next_kl_coef
from stateset_ray.grpo.loss import Tokens, policy_loss
from stateset_ray.objective import ObjectiveConfig

LOGITS = [0.9, -0.3, 0.1, -1.2]
REFERENCE = [-0.4, 0.8, 0.2, -0.5]


def _policy() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a categorical policy, its log-probabilities, and those of a reference."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor(REFERENCE, dtype=torch.float64), -1)
    return logits, torch.log_softmax(logits, -1), reference


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_by_hand(estimator: Any) -> None:
    xs = [-2.0, -0.3, 0.0, 0.4, 1.5]
    ours = kl_estimate(torch.tensor(xs, dtype=torch.float64) - 3, torch.full((5,), -3.0).double(), estimator)
    by_hand = {
        "k1": xs,
        "k2": [x * x / 2 for x in xs],
        "k3": [math.exp(-x) + x - 1 for x in xs],
    }[estimator]
    assert ours.tolist() == pytest.approx(by_hand, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_the_kl_in_expectation(estimator: Any) -> None:
    _, l, ref = _policy()  # noqa: E741
    kl = (l.exp() * (l - ref)).sum()
    torch.testing.assert_close((l.exp() * kl_estimate(l, ref, estimator)).sum(), kl, rtol=1e-14, atol=0)


def test_k2_is_close_to_the_kl_where_policies_are() -> None:
    _, l, _ = _policy()  # noqa: E741
    near = torch.log_softmax(torch.tensor(LOGITS).double() + torch.tensor([0.01, -0.02, 0.0, 0.02]), -1)
    kl = (l.exp() * (l - near)).sum().item()
    assert (l.exp() * kl_estimate(l, near, "k2")).sum().item() == pytest.approx(kl, rel=0.02)


def _reverse(l: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:  # noqa: E741
    return (l.exp() * (l - ref)).sum()


def _forward(l: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:  # noqa: E741
    return (ref.exp() * (ref - l)).sum()


@pytest.mark.parametrize(("estimator", "divergence"), [("k2", _reverse), ("k3", _forward)])
def test_expected_gradient_as_a_loss(estimator: Any, divergence: Any) -> None:
    # Each token once, weighted by its probability: the expectation over tokens of the current policy.
    logits, l, ref = _policy()  # noqa: E741
    tokens = Tokens(
        l, l.detach(), torch.zeros(4).double(), l.detach().exp(), torch.arange(4), 4, reference_logprobs=ref
    )
    loss = policy_loss(tokens, ObjectiveConfig(kl_coef=1.0, kl_estimator=estimator), denominator=1).loss
    [ours] = torch.autograd.grad(loss, logits, retain_graph=True)
    [exact] = torch.autograd.grad(divergence(l, ref), logits, retain_graph=True)
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-16)
    [other] = torch.autograd.grad(
        (_forward if divergence is _reverse else _reverse)(l, ref), logits, retain_graph=True
    )
    assert float((ours - other).abs().max()) > 1e-2


def test_k1_as_a_loss_teaches_nothing() -> None:
    logits, l, ref = _policy()  # noqa: E741
    [gradient] = torch.autograd.grad((l.detach().exp() * kl_estimate(l, ref, "k1")).sum(), logits)
    assert float(gradient.abs().max()) < 1e-16


def test_the_kl_in_the_loss_is_not_multiplied_by_the_ratio(rectangle: Any, terms: Any) -> None:
    # Times a differentiable ratio, k3 would have the gradient of another divergence.
    batch = rectangle(3)
    kl = kl_estimate(batch.logprobs, batch.reference, "k3")[batch.mask].sum() / 5
    with_kl = terms(batch, ObjectiveConfig(kl_coef=0.5), denominator=5)
    without = terms(batch, ObjectiveConfig(), denominator=5)
    torch.testing.assert_close(with_kl.loss, without.loss + 0.5 * kl, rtol=1e-13, atol=0)
    assert with_kl.sums["kl_reference"].item() == pytest.approx(5 * kl.item())


@pytest.mark.parametrize("discount_of_baseline", [0.0, 1.3])
def test_the_kl_in_the_reward_is_the_kl_of_whole_sequences(discount_of_baseline: float) -> None:
    # Two tokens, the second one's distribution depending on the first: REINFORCE with minus the KL still to
    # come (and any constant beside it) has, in expectation, the gradient of KL(policy || reference).
    first = torch.tensor(LOGITS[:2], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([LOGITS[1:3], LOGITS[2:]], dtype=torch.float64, requires_grad=True)
    ref_first = torch.log_softmax(torch.tensor(REFERENCE[:2]).double(), -1)
    ref_second = torch.log_softmax(torch.tensor([REFERENCE[1:3], REFERENCE[2:]]).double(), -1)
    l1, l2 = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    pairs = list(product(range(2), repeat=2))
    l = torch.stack([x for a, b in pairs for x in (l1[a], l2[a, b])])  # noqa: E741
    ref = torch.stack([x for a, b in pairs for x in (ref_first[a], ref_second[a, b])])
    rows = torch.arange(4).repeat_interleave(2)
    of_rows = torch.stack([(l1[a] + l2[a, b]).exp() for a, b in pairs])
    penalties = kl_returns(kl_estimate(l.detach(), ref, "k1"), rows, 4)
    advantages = discount_of_baseline - penalties
    tokens = Tokens(l, l.detach(), advantages, of_rows.detach()[rows], rows, 4)
    loss = policy_loss(tokens, ObjectiveConfig(kl_coef=1.0, kl_in="reward", kl_estimator="k1"), denominator=1)
    kl = (of_rows * torch.stack([l[rows == r].sum() - ref[rows == r].sum() for r in range(4)])).sum()
    ours = torch.autograd.grad(loss.loss, [first, second], retain_graph=True)
    for mine, exact in zip(ours, torch.autograd.grad(kl, [first, second]), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-15)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), max_size=5), max_size=5))
def test_kl_returns_are_the_sums_of_what_follows(rows: list[list[float]]) -> None:
    flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    index = torch.tensor([r for r, row in enumerate(rows) for _ in row], dtype=torch.long)
    expected = [sum(row[t:]) for row in rows for t in range(len(row))]
    assert kl_returns(flat, index, len(rows)).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (0.1, 0.5),  # at the target: stays
        (0.11, 0.5 * 1.01),  # 10 % above: 1 % more
        (0.09, 0.5 * 0.99),
        (0.12, 0.5 * 1.02),  # from 20 % on, no faster
        (9.0, 0.5 * 1.02),
        (0.08, 0.5 * 0.98),
        (-0.3, 0.5 * 0.98),  # an estimate of a KL may be negative
    ],
)
def test_the_coefficient_is_steered_to_its_target(measured: float, expected: float) -> None:
    assert next_kl_coef(0.5, measured, target=0.1) == pytest.approx(expected, rel=1e-12)


def _weights(d: list[float], rows: list[int], **parts: Any) -> list[float]:
    objective = ObjectiveConfig(trust="proximal", **parts)
    proximal = torch.tensor(d, dtype=torch.float64).requires_grad_()
    weights = correction_weights(proximal, torch.zeros_like(proximal), torch.tensor(rows), 3, objective)
    assert not weights.requires_grad
    return [round(weight, 12) for weight in weights.tolist()]


def _logs(*ratios: float) -> list[float]:
    return [math.log(ratio) for ratio in ratios]


def test_weights_per_token() -> None:
    d, rows = _logs(0.3, 0.5000001, 1.0, 1.9999999, 2.5), [0, 0, 1, 1, 2]
    assert _weights(d, rows) == [1.0] * 5
    assert _weights(d, rows, correction="tis") == [0.3, 0.5000001, 1.0, 1.9999999, 2.0]
    assert _weights(d, rows, correction="mis") == [0.0, 0.5000001, 1.0, 1.9999999, 0.0]


def test_bounds_of_mis_are_inside() -> None:
    # AReaL and prime-rl keep a weight that lies on a bound; so do we. (Row 1 of three has no token.)
    assert _weights([0.0, 0.0], [0, 2], correction="mis", correction_low=1.0, correction_high=2.0) == [1, 1]
    assert _weights([0.0, 0.0], [0, 2], correction="mis", correction_low=0.5, correction_high=1.0) == [1, 1]


def test_weights_per_sequence_are_geometric_means() -> None:
    d, rows = _logs(1.0, 4.0, 0.5, 0.5, 8.0), [0, 0, 1, 1, 2]
    level: dict[str, Any] = {"correction_level": "sequence", "correction_high": 3.0, "correction_low": 0.6}
    assert _weights(d, rows, correction="tis", **level) == [2.0, 2.0, 0.5, 0.5, 3.0]
    assert _weights(d, rows, correction="mis", **level) == [2.0, 2.0, 0.0, 0.0, 0.0]


def test_a_weight_per_sequence_does_not_punish_length() -> None:
    level: dict[str, Any] = {"correction": "mis", "correction_level": "sequence"}
    short, long = (_weights([0.1] * n, [0] * n, **level)[0] for n in (2, 200))
    assert short == long == round(math.exp(0.1), 12)


def test_dropped_tokens_stay_in_the_denominator(rectangle: Any, terms: Any) -> None:
    batch = rectangle(3)
    drop_all = ObjectiveConfig(
        trust="proximal", correction="mis", correction_low=0.0, correction_high=1e-9, loss="importance"
    )
    assert terms(batch, drop_all, denominator=9).loss.item() == 0
    # Half of the tokens dropped: the others weigh what they weighed.
    kept = ObjectiveConfig(trust="proximal", correction="mis", correction_low=1.0, correction_high=9.0,
                           loss="importance")  # fmt: skip
    [gradient] = torch.autograd.grad(terms(batch, kept, denominator=9).loss, batch.logprobs)
    d = batch.proximal - batch.sampler
    ratio = (batch.logprobs.detach() - batch.proximal).exp()
    expected = -batch.advantages * ratio * d.exp() * (d >= 0) * batch.mask / 9
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
