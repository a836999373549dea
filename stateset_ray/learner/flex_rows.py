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

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import flex_attention as flex

__all__ = ["FlexRows"]

_BLOCK = 128
"""Tokens of a block's side, as the kernel's own default."""


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
        lengths = np.array([length for length, _ in segments])
        own = np.repeat(np.arange(len(segments)), lengths)
        own_N = torch.from_numpy(own).to(device)
        above_N = torch.from_numpy(np.array([parent for _, parent in segments])[own]).to(device)

        def may_look(_b: Any, _h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            within = (own_N[query] == own_N[key]) & (query >= key)
            return within | (above_N[query] == own_N[key])

        partial, full = (_listed(blocks, device) for blocks in _blocks(segments))
        self._mask = flex.BlockMask.from_kv_blocks(
            *partial, *full, BLOCK_SIZE=_BLOCK, mask_mod=may_look, seq_lengths=(len(own), len(own))
        )
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


def _blocks(segments: Sequence[tuple[int, int]]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which blocks of [queries, keys] hold something, and which hold everything: bool [Q, K], disjoint.

    Counted from the stretches: `flex.create_block_mask` would evaluate the mask for all pairs of tokens
    first, N * N bytes and several copies of them. Here a row of blocks at a time exists, N numbers.
    """
    lengths = np.array([length for length, _ in segments])
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    size = -(-total // _BLOCK)
    counts = np.zeros((size, size), np.int64)
    own = np.repeat(np.arange(len(segments)), lengths)
    parents = np.array([parent for _, parent in segments])[own]
    # A token sees two ranges of keys, [first, last): of its own stretch up to itself, and all of the parent.
    first = np.stack([starts[own], np.where(parents < 0, 0, starts[parents])])
    last = np.stack([np.arange(total) + 1, np.where(parents < 0, 0, starts[parents] + lengths[parents])])
    for row in range(size):
        queries = slice(row * _BLOCK, (row + 1) * _BLOCK)
        steps = np.zeros(size * _BLOCK + 1, np.int64)
        np.add.at(steps, first[:, queries], 1)
        np.add.at(steps, last[:, queries], -1)
        seen = np.cumsum(steps)[:-1]  # of each key, by how many of these queries
        counts[row] = seen.reshape(size, _BLOCK).sum(1)
    full = counts == _BLOCK * _BLOCK
    return (counts > 0) & ~full, full


def _listed(blocks: npt.NDArray[np.bool_], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row has, int32 [1, 1, Q], and which, before all others: int32 [1, 1, Q, K]."""
    columns = np.argsort(~blocks, axis=1, kind="stable")
    numbers = (torch.from_numpy(a.astype(np.int32)) for a in (blocks.sum(1), columns))
    count, index = (n[None, None].to(device) for n in numbers)
    return count, index
