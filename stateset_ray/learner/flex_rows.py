"""The learner's attention as one fused kernel for a whole packed batch, on GPUs.

`models.TreeRows` calls a kernel for every stretch of tokens; with many short conversations in a batch a
GPU waits for the calls. FlexAttention (https://arxiv.org/abs/2412.05496) compiles one kernel that skips the
blocks in which nobody may look at anybody, forward and backward. It has no backward pass on a CPU, where a
call costs nothing beside its work anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

__all__ = ["FlexRows"]


@cache
def _compiled() -> Any:
    # Every packed batch has another length: one kernel for all of them.
    return torch.compile(flex.flex_attention, dynamic=True)


class FlexRows:
    """Like `models.TreeRows`, for all stretches at once.

    Args:
        segments: (length, parent) of each stretch, see `models.TreeRows`.
        device: where the model computes.
        compiled: False runs the same mathematics without a fused kernel, to be compared with.
    """

    def __init__(self, segments: Sequence[tuple[int, int]], device: str, *, compiled: bool = True) -> None:
        lengths = torch.tensor([length for length, _ in segments], device=device)
        parents = torch.tensor([parent for _, parent in segments], device=device)
        own_N = torch.repeat_interleave(torch.arange(len(segments), device=device), lengths)
        above_N = parents[own_N]

        def may_look(_b: Any, _h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            within = (own_N[query] == own_N[key]) & (query >= key)
            return within | (above_N[query] == own_N[key])

        total = len(own_N)
        self._mask = flex.create_block_mask(may_look, None, None, total, total, device=device)
        self._attention = _compiled() if compiled else flex.flex_attention

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `models.Rows.attend`."""
        grouped = query.shape[1] != key.shape[1]
        out: torch.Tensor = self._attention(
            query, key, value, block_mask=self._mask, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
