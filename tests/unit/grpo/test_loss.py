"""The objective without formulas: finite differences, identities, invariances, a bandit, diagnostics."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stateset_ray.grpo.advantages import step_advantages
from stateset_ray.grpo.divergence import correction_weights
from stateset_ray.grpo.loss import MAXIMA, SUMS, Tokens, policy_loss, supervised_loss, token_logprobs
from stateset_ray.objective import ObjectiveConfig

KINDS: dict[str, dict[str, Any]] = {
    "importance": {"loss": "importance"},
    "ppo": {"loss": "ppo"},
    "dual_clip": {"loss": "ppo", "dual_clip": 1.6},
    "gspo": {"loss": "ppo", "ratio": "sequence"},
    "cispo": {"loss": "cispo"},
    "sapo": {"loss": "sapo"},
    "dppo": {"loss": "dppo"},
}


class _TwoLayers(torch.nn.Module):
    """Features -> hidden -> logits, in float64: a model small enough to differentiate by trying."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = torch.nn.Parameter(torch.randn(4, 6, generator=generator, dtype=torch.float64) / 2)
        self.second = torch.nn.Parameter(torch.randn(6, 7, generator=generator, dtype=torch.float64) / 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(features @ self.first) @ self.second


@pytest.mark.parametrize("name", [name for name in KINDS if name != "cispo"])
def test_gradient_of_a_model_equals_finite_differences(name: str) -> None:
    objective = ObjectiveConfig(
        **KINDS[name], kl_coef=0.3, entropy_coef=0.1,
        **({} if name == "dppo" else {"trust": "proximal", "correction": "tis", "correction_high": 1.1,
                                      "correction_level": "sequence"}),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = _TwoLayers()
    features, ids = normal(24, 4), torch.randint(0, 7, (24,), generator=generator)
    rows = torch.arange(24) // 6
    base = token_logprobs(model(features), ids, 0.7).detach()
    data = Tokens(
        logprobs=base, sampler_logprobs=base + 0.3 * normal(24), proximal_logprobs=base + 0.3 * normal(24),
        reference_logprobs=base + 0.2 * normal(24), rows=rows, samples=4, weights=1 + normal(4).abs()[rows],
        # One advantage and one weight per row: with a ratio per row, only then is our gradient the loss's.
        advantages=normal(4)[rows],
    )  # fmt: skip

    def loss() -> torch.Tensor:
        logits = model(features)
        log_p = torch.log_softmax(logits / 0.7, -1)
        entropies = -(log_p.exp() * log_p).sum(-1)
        tokens = replace(data, logprobs=token_logprobs(logits, ids, 0.7), entropies=entropies)
        return policy_loss(tokens, objective, denominator=24).loss

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    step = 1e-6
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        for place in range(parameter.numel()):
            flat = parameter.data.view(-1)
            kept = flat[place].item()
            with torch.no_grad():
                flat[place] = kept + step
                above = loss().item()
                flat[place] = kept - step
                below = loss().item()
                flat[place] = kept
            assert gradient.view(-1)[place].item() == pytest.approx(
                (above - below) / (2 * step), rel=1e-6, abs=1e-8
            )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("name", "trust"),
    # DPPO compares with the sampler's probabilities only.
    [(n, t) for n, t in product(KINDS, ("sampler", "proximal")) if n != "dppo" or t == "sampler"],
)
def test_on_tokens_of_the_current_policy_every_loss_is_reinforce(
    name: str, trust: str, per_token: bool, rectangle: Any, terms: Any, changed: Any
) -> None:
    batch = rectangle(2, per_token=per_token)
    if trust == "sampler":
        batch = changed(batch, sampler=batch.logprobs.detach().clone())
    # With "proximal" the sampler may be far away: without a correction it plays no part.
    objective = ObjectiveConfig(**KINDS[name], trust=trust)
    ours = terms(batch, objective, denominator=7, recomputed=False).loss
    [gradient] = torch.autograd.grad(ours, batch.logprobs)
    [reinforce] = torch.autograd.grad(
        -(batch.advantages * batch.logprobs)[batch.mask].sum() / 7, batch.logprobs
    )
    torch.testing.assert_close(gradient, reinforce, rtol=1e-13, atol=1e-16)


_EVERYTHING = {"kl_coef": 0.3, "entropy_coef": 0.1}
_CORRECTED = {"trust": "proximal", "correction": "mis", "correction_level": "sequence",
              "correction_low": 0.9, "correction_high": 1.1}  # fmt: skip


def _objective(name: str, corrected: bool) -> ObjectiveConfig:
    return ObjectiveConfig(**{**KINDS[name], **_EVERYTHING, **(_CORRECTED if corrected else {})})


def _cases() -> list[tuple[str, bool]]:
    return [
        (name, corrected)
        for name, corrected in product(KINDS, (False, True))
        if name != "dppo" or not corrected
    ]


@pytest.mark.parametrize("cuts", [[[3, 0, 5, 1, 4, 2]], [[0], [1, 2, 3, 4, 5]], [[5, 2], [], [0, 4], [1, 3]]])
@pytest.mark.parametrize(("name", "corrected"), _cases())
def test_cutting_a_step_into_micro_batches_changes_nothing(
    name: str, corrected: bool, cuts: list[list[int]], rectangle: Any, terms: Any
) -> None:
    objective = _objective(name, corrected)
    batch = rectangle(6, rows=6, per_token=True)
    denominator = float(batch.mask.sum())
    whole = terms(batch, objective, denominator=denominator)
    parts = [terms(batch.rows(rows), objective, denominator=denominator) for rows in cuts]
    [gradient] = torch.autograd.grad(whole.loss, batch.logprobs)
    total = torch.stack([part.loss for part in parts]).sum()
    [pieces] = torch.autograd.grad(total, batch.logprobs)
    torch.testing.assert_close(pieces, gradient, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-15)
    for key, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[key] for part in parts), value, rtol=1e-12, atol=1e-12)
    for key, value in whole.maxima.items():
        assert max(part.maxima[key] for part in parts if part.maxima) == pytest.approx(float(value))


@pytest.mark.parametrize(("name", "corrected"), _cases())
def test_the_order_of_tokens_and_rows_does_not_matter(name: str, corrected: bool, rectangle: Any) -> None:
    objective = _objective(name, corrected)
    batch = rectangle(8, rows=4, per_token=True)
    mask = batch.mask
    rows = torch.arange(4)[:, None].expand_as(mask)[mask]
    tokens = Tokens(
        batch.logprobs[mask], batch.sampler[mask], batch.advantages[mask], 1 / (1.0 + rows.double()), rows, 4,
        batch.proximal[mask], batch.reference[mask], batch.entropies[mask],
    )  # fmt: skip
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    names = torch.tensor([2, 0, 3, 1])
    shuffled = Tokens(
        samples=4, rows=names[rows[order]],
        **{
            key: getattr(tokens, key)[order]
            for key in ("logprobs", "sampler_logprobs", "advantages", "weights", "proximal_logprobs",
                        "reference_logprobs", "entropies")
        },
    )  # fmt: skip
    ours, theirs = (policy_loss(t, objective, denominator=3).loss for t in (tokens, shuffled))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)
    gradients = [torch.autograd.grad(loss, batch.logprobs, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "corrected"), _cases())
def test_places_that_no_one_sampled_do_not_matter(
    name: str, corrected: bool, rectangle: Any, terms: Any
) -> None:
    objective = _objective(name, corrected)
    batch = rectangle(8, per_token=True)
    ours, theirs = (terms(b, objective, denominator=3).loss for b in (batch, batch.padded(2, 4)))
    assert ours.item() == theirs.item()
    gradients = [torch.autograd.grad(loss, batch.logprobs, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert not gradients[0][~batch.mask].any()


def test_a_micro_batch_without_a_token_still_has_a_gradient_of_zero(rectangle: Any, terms: Any) -> None:
    # Backward is collective in ZeRO: a rank with nothing to learn must take part all the same.
    batch = rectangle(0)
    for name in KINDS:
        empty = terms(batch.rows([]), _objective(name, corrected=False))
        [gradient] = torch.autograd.grad(empty.loss, batch.logprobs)
        assert empty.loss.item() == 0
        assert not gradient.any()


# A two-armed bandit: theta -> p = sigmoid(theta), arm 1 pays 1. Everything can be written down.


def _bandit_gradient(p: float, n: int, advantage: str, **parts: Any) -> float:
    """The exact expectation of our gradient with respect to theta, to be descended, over all groups of n."""
    objective = ObjectiveConfig(advantage=advantage, **parts)  # type: ignore[arg-type]
    total = 0.0
    for arms in product((0, 1), repeat=n):
        theta = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
        logits = torch.stack([torch.zeros_like(theta), theta]).expand(n, 2)
        logprobs = token_logprobs(logits, torch.tensor(arms), 1.0)
        [credits] = step_advantages([[{"": [float(arm)]} for arm in arms]], objective)
        tokens = Tokens(
            logprobs, logprobs.detach(),
            torch.tensor([credit[0] for credit in credits if credit], dtype=torch.float64),
            torch.ones(n, dtype=torch.float64), torch.arange(n), n,
        )  # fmt: skip
        [gradient] = torch.autograd.grad(policy_loss(tokens, objective, denominator=n).loss, theta)
        total += p ** sum(arms) * (1 - p) ** (n - sum(arms)) * gradient.item()
    return total


@pytest.mark.parametrize("name", [name for name in KINDS if name != "dual_clip"])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("n", [2, 4])
def test_expected_gradient_of_a_bandit(p: float, n: int, name: str) -> None:
    exact = -p * (1 - p)  # of -E[reward]
    parts = KINDS[name]
    assert _bandit_gradient(p, n, "rloo", **parts) == pytest.approx(exact, rel=1e-12)
    # A mean that counts the member itself shortens the gradient, alike everywhere.
    assert _bandit_gradient(p, n, "mean", **parts) == pytest.approx(exact * (n - 1) / n, rel=1e-12)
    # Divided by its own group's mean, a group with k successes pulls with (n - k) / n, if any succeeded.
    max_rl = -((1 - p) - (1 - p) ** n)
    assert _bandit_gradient(p, n, "max_rl", **parts) == pytest.approx(max_rl, rel=1e-12)
    # A group with k successes has the spread sqrt(k (n - k) / (n (n - 1))).
    std = -sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        * k * (n - k) / n**2 / (math.sqrt(k * (n - k) / (n * (n - 1))) + 1e-4)
        for k in range(n + 1)
    )  # fmt: skip
    assert _bandit_gradient(p, n, "mean_std", **parts) == pytest.approx(std, rel=1e-12)


def test_importance_weights_make_a_strangers_samples_our_own() -> None:
    # Drawn with q, weighted with p / q: the gradient of the expectation under p, whatever q is.
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.85, 0.15], dtype=torch.float64)
    pays = torch.tensor([0.3, 2.0], dtype=torch.float64)
    logprobs = torch.log_softmax(torch.stack([torch.zeros_like(theta), theta]), -1)
    tokens = Tokens(logprobs, q.log(), pays, q, torch.arange(2), 2)
    loss = policy_loss(tokens, ObjectiveConfig(loss="importance"), denominator=1).loss
    [gradient] = torch.autograd.grad(loss, theta, retain_graph=True)
    [exact] = torch.autograd.grad(-(logprobs.exp() * pays).sum(), theta)
    torch.testing.assert_close(gradient, exact, rtol=1e-13, atol=0)


def test_clipping_counts_only_where_it_removed_the_gradient() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.27], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    terms = _simple(ratio.log().requires_grad_(), torch.zeros(6, dtype=torch.float64), advantages)
    assert (terms[1] == 0).tolist() == [True, False, False, True, False, False]
    assert terms[0].sums["clipped_high"] == 1
    assert terms[0].sums["clipped_low"] == 1
    assert terms[0].loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8 + 1.0 + 1.27))


@pytest.mark.parametrize("name", ["ppo", "dual_clip", "dppo"])
def test_what_counts_as_clipped_is_what_has_no_gradient(name: str, rectangle: Any, terms: Any) -> None:
    batch = rectangle(3, rows=12, per_token=True)
    extra = {"log_ratio_penalty": 0.0, "clip_low": 0.05, "clip_high": 0.1} if name == "dppo" else {}
    ours = terms(batch, ObjectiveConfig(**{**KINDS[name], **extra}))
    [gradient] = torch.autograd.grad(ours.loss, batch.logprobs)
    still = int((gradient[batch.mask] == 0).sum())
    assert still == int(ours.sums["clipped_low"] + ours.sums["clipped_high"]) > 0


def test_mismatch_is_signed_from_the_sampler(rectangle: Any, terms: Any) -> None:
    sums = _simple(torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -2.0]), torch.ones(2))[0].sums
    assert sums["mismatch_k1"].item() == pytest.approx(0.5)
    assert sums["mismatch_k3"].item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    # With a recomputed policy the mismatch is that of sampler and trainer, not of two updates.
    batch = rectangle(1)
    d = (batch.proximal - batch.sampler)[batch.mask]
    sums = terms(batch, ObjectiveConfig()).sums
    assert sums["mismatch_k1"].item() == pytest.approx(-d.sum().item())
    assert sums["mismatch_k3"].item() == pytest.approx((d.exp() - 1 - d).sum().item())


def test_diagnostics_are_the_announced_ones(rectangle: Any, terms: Any) -> None:
    batch = rectangle(1)
    plain = terms(batch, ObjectiveConfig())
    full = terms(batch, _objective("ppo", corrected=True))
    assert set(plain.sums) < set(full.sums) == set(SUMS)
    assert set(plain.maxima) == set(MAXIMA)
    assert plain.sums["tokens"] == batch.mask.sum()
    ratios = (batch.logprobs - batch.sampler).exp()[batch.mask]
    assert plain.sums["ratio"].item() == pytest.approx(ratios.sum().item())
    assert plain.maxima["ratio"].item() == pytest.approx(ratios.max().item())
    assert plain.maxima["inverse_ratio"].item() == pytest.approx(1 / ratios.min().item())
    assert full.sums["entropy"].item() == pytest.approx(batch.entropies[batch.mask].sum().item())
    objective = _objective("ppo", corrected=True)
    rows = torch.arange(len(batch.mask))[:, None].expand_as(batch.mask)[batch.mask]
    weights = correction_weights(
        batch.proximal[batch.mask], batch.sampler[batch.mask], rows, len(batch.mask), objective
    )
    assert full.sums["correction"].item() == pytest.approx(weights.sum().item())
    assert full.sums["correction_squared"].item() == pytest.approx(weights.square().sum().item())
    assert full.sums["corrected"] == (weights == 0).sum()
    for value in (*full.sums.values(), *full.maxima.values()):
        assert value.dtype == torch.float64
        assert not value.requires_grad


def test_supervised_is_the_cross_entropy() -> None:
    logits = torch.randn(40, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (40,))
    weights = torch.rand(40, dtype=torch.float64)
    ours = supervised_loss(token_logprobs(logits, ids, 1.0), weights, denominator=3).loss
    theirs = (F.cross_entropy(logits, ids, reduction="none") * weights).sum() / 3
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


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


def _simple(logprobs: torch.Tensor, sampler: torch.Tensor, advantages: torch.Tensor) -> tuple[Any, Any]:
    """Default loss of tokens of one row, and its gradient if there is one."""
    tokens = Tokens(
        logprobs,
        sampler,
        advantages,
        torch.ones_like(sampler),
        torch.zeros(len(sampler), dtype=torch.long),
        1,
    )
    terms = policy_loss(tokens, ObjectiveConfig(), denominator=1)
    gradient = torch.autograd.grad(terms.loss, logprobs)[0] if logprobs.requires_grad else None
    return terms, gradient
