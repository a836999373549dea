"""Clipping where the engine does it itself; the formula is DeepSpeed's, so that all engines clip alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stateset_ray.learner.protocol import StepResult

__all__ = ["clip"]

_ROW = 1024
"""Elements whose squares are added in float32."""


@torch.no_grad()
def clip(parameters: Sequence[torch.Tensor], max_norm: float) -> StepResult:
    """Scale the gradients so that their common L2 norm is at most `max_norm`.

    Where it is not finite, the gradients are dropped: an optimizer step then changes nothing.

    Returns:
        The norm before, and whether there is anything to apply.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _norm(gradients)
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
        return StepResult(norm, applied=False)
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        for gradient in gradients:
            gradient.mul_(factor)
    return StepResult(norm, applied=True)


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    # In one go a CPU adds the squares in float32: with 50 million of them the norm is 0.4 % off.
    norms = [torch.zeros(1)]
    for gradient in gradients:
        flat = gradient.flatten()
        rows = flat[: len(flat) // _ROW * _ROW].view(-1, _ROW)
        rest = flat[rows.numel() :]
        norms += [torch.linalg.vector_norm(rows, dim=1).cpu(), torch.linalg.vector_norm(rest).cpu()[None]]
    return float(torch.linalg.vector_norm(torch.cat(norms).double()))
