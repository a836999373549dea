"""Linear layers in the CPU's own layout, for a model that only answers.

oneDNN multiplies by a weight that it has laid out itself. How quick that is beside a plain matrix depends on
the machine and the number of rows (docs/speed.md has the figures); a row's result does not depend
on how many other rows are beside it. It serves inference only: there is no gradient, and the plain matrix
is gone, so that no weight is held twice.

The operators are those that PyTorch's own compiler puts in place of linear layers when it freezes a model;
they have no public name, which is why `usable` tries them before anything is replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

__all__ = ["PackedLinear", "Piece", "usable"]

_ROWS = 32  # the number of rows that the layout is chosen for; any number works with it
# Fewer rows take kernels that are a tenth slower than that of four; and a single one's gives other last bits
# than the same row has in a batch.
_FEWEST = 4


@cache
def usable() -> bool:
    """Whether this build of PyTorch has the operators and they multiply as they should."""
    weight, rows = torch.linspace(-1, 1, 24).reshape(4, 6), torch.linspace(0, 1, 18).reshape(3, 6)
    try:
        packed = _pack(weight)
        found = _multiply(rows, packed, None), _multiply_add(rows, packed, None, torch.ones(3, 4)) - 1
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return all(torch.allclose(one, rows @ weight.T, atol=1e-6) for one in found)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
    return packed


def _multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return out


def _multiply_add(
    rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, plus: torch.Tensor
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, plus, packed, bias, "add")
    return out


@dataclass(frozen=True)
class Piece:
    """What one plain linear layer is in a packed one.

    Attributes:
        weight: its name in the model's state.
        bias: likewise; "" where it has none.
        rows: its output features.
    """

    weight: str
    bias: str
    rows: int


class PackedLinear(torch.nn.Module):
    """Stands in the place of linear layers that read the same rows: `rows @ weight.T + bias`, side by side.

    Float32, without gradient.

    Args:
        linears: whose weights and biases are packed, below each other; all of them have a bias, or none.
        names: of their weights and biases in the model's state, (weight, bias or "").
    """

    def __init__(
        self, linears: Sequence[torch.nn.Linear], names: Sequence[tuple[str, str]] | None = None
    ) -> None:
        super().__init__()
        names = names or [("", "")] * len(linears)
        self.pieces = tuple(
            Piece(weight, bias, linear.out_features)
            for linear, (weight, bias) in zip(linears, names, strict=True)
        )
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        # No parameters and no buffers: a packed tensor cannot be saved, moved or compared like a plain one.
        self._packed: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self.pack([linear.weight for linear in linears], [linear.bias for linear in linears])

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        # PyTorch cannot copy a packed tensor. It is replaced and never changed, so that copies may share it.
        memo[id(self._packed)] = self._packed
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of what `take` wants."""
        found = {piece.weight: torch.Size((piece.rows, self.in_features)) for piece in self.pieces}
        return found | {piece.bias: torch.Size((piece.rows,)) for piece in self.pieces if piece.bias}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take other weights and biases, by the names of the model's state."""
        self.pack(
            [tensors[piece.weight] for piece in self.pieces],
            [tensors[piece.bias] if piece.bias else None for piece in self.pieces],
        )

    @torch.no_grad()
    def pack(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        """Take another weight and bias for each piece: [its rows, in_features], [its rows]."""
        one = weights[0] if len(weights) == 1 else torch.cat([weight.float() for weight in weights])
        self._packed = _pack(one.float())
        given = [bias.float() for bias in biases if bias is not None]
        self._bias = torch.cat(given) if given else None

    def drop(self) -> None:
        """Give the memory back; `take` must come before the next pass."""
        self._packed = self._bias = None

    def forward(self, rows: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]; `plus`, of the latter shape, is added."""
        assert self._packed is not None  # nothing is asked of an engine without weights
        flat = rows.reshape(-1, self.in_features)
        added = None if plus is None else plus.reshape(-1, self.out_features)
        count = len(flat)
        if count < _FEWEST:
            flat = _filled_up(flat)
            added = None if added is None else _filled_up(added)
        if added is None:
            out = _multiply(flat, self._packed, self._bias)
        else:
            out = _multiply_add(flat, self._packed, self._bias, added)
        return out[:count].view(*rows.shape[:-1], self.out_features)


def _filled_up(rows: torch.Tensor) -> torch.Tensor:
    """As many rows as the quickest kernel for few of them takes; who fills up does not matter."""
    return torch.cat((rows,) * _FEWEST)[:_FEWEST]
