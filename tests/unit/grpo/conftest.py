"""Batches as rectangles [B, T] with a mask, as other systems hold them, and our loss on them.

Letters: B trajectories, one sample each; T places of a row, of which the mask chooses the sampled ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from stateset_ray.grpo.loss import LossTerms, Tokens, policy_loss
from stateset_ray.objective import ObjectiveConfig

Tensor = torch.Tensor


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Rectangle:
    """What is known of a batch; every tensor is float64 [B, T], but for the mask, which is bool."""

    logprobs: Tensor
    sampler: Tensor
    proximal: Tensor
    reference: Tensor
    entropies: Tensor
    advantages: Tensor
    mask: Tensor

    def lists(self) -> dict[str, list[list[float]]]:
        """The numbers without tensors, for formulas written in plain Python."""
        return {name: getattr(self, name).tolist() for name in self.__dataclass_fields__}

    def rows(self, chosen: Sequence[int]) -> "Rectangle":
        """Some of its rows."""
        index = torch.tensor(chosen, dtype=torch.long)
        return Rectangle(**{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    def padded(self, left: int, right: int) -> "Rectangle":
        """The same batch with places that no one sampled, full of numbers that must not matter."""

        def pad(values_BT: Tensor) -> Tensor:
            fill = False if values_BT.dtype == torch.bool else -7.0
            return torch.nn.functional.pad(values_BT, (left, right), value=fill)

        return Rectangle(**{name: pad(getattr(self, name)) for name in self.__dataclass_fields__})


def _rectangle(seed: int, *, rows: int = 5, places: int = 9, per_token: bool = False) -> Rectangle:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sampler = -normal(rows, places).abs() - 0.3
    # Log-probabilities must be below 0; ratios reach far beyond every bound, on both sides.
    proximal = (sampler + 0.35 * normal(rows, places)).clamp(max=-0.01)
    logprobs = (proximal + 0.35 * normal(rows, places)).clamp(max=-0.02)
    mask = torch.rand(rows, places, generator=generator) < 0.65
    mask[:, 1] = True  # no row without a sampled token
    return Rectangle(
        logprobs=logprobs.requires_grad_(),
        sampler=sampler,
        proximal=proximal,
        reference=sampler + 0.3 * normal(rows, places),
        entropies=(0.5 + normal(rows, places).abs()).requires_grad_(),
        advantages=normal(rows, places) if per_token else normal(rows, 1).expand(rows, places).clone(),
        mask=mask,
    )


@pytest.fixture(scope="session")
def rectangle() -> Callable[..., Rectangle]:
    """`rectangle(seed, rows=, places=, per_token=)`: random numbers with gradient."""
    return _rectangle


def _terms(
    batch: Rectangle,
    objective: ObjectiveConfig,
    *,
    weights: Tensor | None = None,
    denominator: float = 1.0,
    recomputed: bool = True,
    **extra: Any,
) -> LossTerms:
    mask = batch.mask
    rows = torch.arange(len(mask))[:, None].expand_as(mask)
    tokens = Tokens(
        logprobs=batch.logprobs[mask],
        sampler_logprobs=batch.sampler[mask],
        advantages=batch.advantages[mask],
        weights=(torch.ones_like(batch.sampler) if weights is None else weights)[mask],
        rows=rows[mask],
        samples=len(mask),
        proximal_logprobs=batch.proximal[mask] if recomputed else None,
        reference_logprobs=batch.reference[mask] if objective.kl_coef else None,
        entropies=batch.entropies[mask] if objective.entropy_coef else None,
    )
    return policy_loss(tokens, objective, denominator=denominator, **extra)


@pytest.fixture(scope="session")
def terms() -> Callable[..., LossTerms]:
    """`terms(rectangle, objective, weights=, denominator=, recomputed=)`: our loss on its masked places."""
    return _terms


def _value_and_gradient(loss: Tensor, batch: Rectangle) -> tuple[float, Tensor]:
    [gradient] = torch.autograd.grad(loss, batch.logprobs, retain_graph=True)
    return loss.item(), gradient


@pytest.fixture(scope="session")
def value_and_gradient() -> Callable[[Tensor, Rectangle], tuple[float, Tensor]]:
    """`value_and_gradient(loss, rectangle)`: the number, and its gradient with respect to `logprobs`."""
    return _value_and_gradient


@pytest.fixture(scope="session")
def aggregation() -> Callable[[Rectangle, str], tuple[Tensor, float]]:
    """`aggregation(rectangle, name)` -> (weights, denominator) of the objective's aggregations, by hand."""

    def choose(batch: Rectangle, name: str) -> tuple[Tensor, float]:
        ones = torch.ones_like(batch.sampler)
        if name == "token_mean":
            return ones, float(batch.mask.sum())
        if name == "sequence_mean":
            return ones / batch.mask.sum(1, keepdim=True), float(len(batch.mask))
        return ones, float(batch.mask.numel())  # constant: trajectories times the longest that could be

    return choose


@pytest.fixture(scope="session")
def changed() -> Callable[..., Rectangle]:
    """`changed(rectangle, advantages=...)`: the same batch with something else in it."""
    return replace
