"""What the off-policy correction is for, on a policy so small that every expectation is a sum.

A softmax over A actions for each of P prompts, moved away from the one that sampled. In expectation over the
sampler, the gradient with untruncated correction is that of fresh samples; without correction it is not; what
truncation and masking leave is given by a formula. Letters: P prompts, A actions, N = P * A.
"""

from dataclasses import dataclass

import pytest
import torch

from stateset_ray.grpo.loss import Tokens, policy_loss
from stateset_ray.objective import ObjectiveConfig

Tensor = torch.Tensor

UNCUT = 1e30


@dataclass(frozen=True)
class Bandit:
    """Logits of the policy, of the one that samples, of the policy as the step began; rewards. All [P, A]."""

    logits: Tensor
    sampler: Tensor
    proximal: Tensor
    rewards: Tensor

    def gradient(
        self, objective: ObjectiveConfig, *, fresh: bool = False, recomputed: bool = False
    ) -> Tensor:
        """The expected gradient [P, A] of our loss, over all prompts and actions.

        Args:
            fresh: sampled by the policy itself.
            recomputed: the ratio is to `proximal`, as in the second optimizer step of a batch.
        """
        logits = self.logits.clone().requires_grad_()
        current = logits.log_softmax(-1)
        sampled = (current.detach() if fresh else self.sampler.log_softmax(-1)).flatten()
        baseline = (sampled.exp().view_as(logits) * self.rewards).sum(-1, keepdim=True)
        tokens = Tokens(
            logprobs=current.flatten(), sampler_logprobs=sampled,
            advantages=(self.rewards - baseline).flatten(), weights=sampled.exp(),
            rows=torch.arange(logits.numel()), samples=logits.numel(),
            proximal_logprobs=self.proximal.log_softmax(-1).flatten() if recomputed else None,
        )  # fmt: skip
        loss = policy_loss(tokens, objective, denominator=float(len(logits))).loss
        return torch.autograd.grad(loss, logits)[0]

    def weighted(self, weights: Tensor) -> Tensor:
        """The gradient by hand, if the reward of each action counts as often as `weights` [P, A] says."""
        probabilities = self.logits.softmax(-1)
        baseline = (self.sampler.softmax(-1) * self.rewards).sum(-1, keepdim=True)
        pull = weights * (self.rewards - baseline)
        return -(pull - probabilities * pull.sum(-1, keepdim=True)) / len(self.logits)


@pytest.fixture(params=[0, 1, 2])
def bandit(request: pytest.FixtureRequest) -> Bandit:
    generator = torch.Generator().manual_seed(request.param)

    def normal() -> Tensor:
        return torch.randn(5, 7, generator=generator, dtype=torch.float64)

    sampler = 2 * normal()
    return Bandit(sampler + 1.5 * normal(), sampler, sampler + normal(), normal())


def objective(correction: str = "none", **parts: object) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"trust": "proximal", "correction": correction, **parts})


def test_corrected_without_a_cut_it_is_the_gradient_of_fresh_samples(bandit: Bandit) -> None:
    fresh = bandit.gradient(objective(), fresh=True)
    corrected = bandit.gradient(objective("tis", correction_high=UNCUT))
    torch.testing.assert_close(corrected, fresh, rtol=1e-12, atol=1e-14)


def test_in_a_later_step_of_the_batch_the_ratio_makes_up_for_the_rest(bandit: Bandit) -> None:
    """exp(proximal - sampler) times exp(policy - proximal): decoupled PPO where its clip does not bind."""
    fresh = bandit.gradient(objective(), fresh=True)
    parts = {"correction_high": UNCUT, "loss": "importance"}
    corrected = bandit.gradient(objective("tis", **parts), recomputed=True)
    torch.testing.assert_close(corrected, fresh, rtol=1e-12, atol=1e-14)


def test_uncorrected_it_is_the_step_that_the_old_policy_should_have_taken(bandit: Bandit) -> None:
    """Its gradient by the logits is that of the old policy, at the old policy: a push that comes too late."""
    fresh = bandit.gradient(objective(), fresh=True)
    stale = bandit.gradient(objective())
    old = Bandit(bandit.sampler, bandit.sampler, bandit.sampler, bandit.rewards)
    torch.testing.assert_close(stale, old.gradient(objective(), fresh=True), rtol=1e-12, atol=1e-14)
    assert torch.cosine_similarity(stale.flatten(), fresh.flatten(), dim=0) < 0.9


@pytest.mark.parametrize("cut", [1.2, 2.0])
def test_truncation_counts_what_became_likelier_for_too_little(bandit: Bandit, cut: float) -> None:
    """TIS: as if an action were drawn with min(policy, cut * sampler): never more than by the policy."""
    policy, sampler = bandit.logits.softmax(-1), bandit.sampler.softmax(-1)
    assert (policy > cut * sampler).any()
    found = bandit.gradient(objective("tis", correction_high=cut))
    wanted = bandit.weighted(torch.minimum(policy, cut * sampler))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_masking_counts_what_moved_far_not_at_all(bandit: Bandit) -> None:
    """MIS: as if an action were drawn by the policy, or not at all outside of the bounds."""
    policy, sampler = bandit.logits.softmax(-1), bandit.sampler.softmax(-1)
    kept = (policy >= 0.5 * sampler) & (policy <= 2 * sampler)
    assert not kept.all()
    found = bandit.gradient(objective("mis", correction_low=0.5, correction_high=2.0))
    torch.testing.assert_close(found, bandit.weighted(policy * kept), rtol=1e-12, atol=1e-14)
