"""Linear layers in the CPU's own layout, for a model that only answers.

oneDNN multiplies by a weight that it has laid out itself. That is quicker than by a plain matrix, most of
all for the few rows of a decoding step (docs/speed.md has the figures), and a row's result does not depend
on how many other rows are beside it. It serves inference only: there is no gradient, and the plain matrix
is gone, so that no weight is held twice.

The two operators are those that PyTorch's own compiler puts in place of linear layers when it freezes a
model; they have no public name, which is why `usable` tries them before anything is replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from stateset_ray.models import Hardware, state_tensors

__all__ = ["InferenceWeights", "PackedLinear", "usable"]

_ROWS = 32  # the number of rows that the layout is chosen for; any number works with it


@cache
def usable() -> bool:
    """Whether this build of PyTorch has the operators and they multiply as they should."""
    weight, rows = torch.linspace(-1, 1, 24).reshape(4, 6), torch.linspace(0, 1, 18).reshape(3, 6)
    try:
        found = _multiply(rows, _pack(weight), None)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return bool(torch.allclose(found, rows @ weight.T, atol=1e-6))


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
    return packed


def _multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return out


class PackedLinear(torch.nn.Module):
    """Stands in the place of a linear layer: `rows @ weight.T + bias`, float32, without gradient.

    Args:
        linear: whose weight is packed and whose bias is kept.
        name: of that weight in the model's state.
    """

    def __init__(self, linear: torch.nn.Linear, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # Not a buffer: a packed tensor cannot be saved, moved or compared like a plain one.
        self._packed: torch.Tensor | None = _pack(linear.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        # PyTorch cannot copy a packed tensor. It is replaced and never changed, so that copies may share it.
        memo[id(self._packed)] = self._packed
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def pack(self, weight: torch.Tensor) -> None:
        """Take another weight, [out_features, in_features]."""
        self._packed = _pack(weight)

    def drop(self) -> None:
        """Give the weight's memory back; `pack` must come before the next pass."""
        self._packed = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        assert self._packed is not None  # nothing is asked of an engine without weights
        flat = rows.reshape(-1, self.in_features)
        # A single row would take another kernel, and with it other last bits than the same row in a batch.
        out = _multiply(flat.expand(2, -1), self._packed, self.bias)[:1] if len(flat) == 1 else None
        if out is None:
            out = _multiply(flat, self._packed, self.bias)
        return out.view(*rows.shape[:-1], self.out_features)


class InferenceWeights:
    """The weights of a model that only answers, and how new ones get into them.

    On a CPU in float32 the model's linear layers are replaced by packed ones; elsewhere it stays as it is.
    The model is changed in place and belongs to whoever made this; its names and shapes are those that it
    had before, also where an earlier one of these has packed it already.

    Args:
        model: any module.
        hardware: where it sits.
    """

    def __init__(self, model: torch.nn.Module, hardware: Hardware) -> None:
        plain = state_tensors(model)
        self.shapes = {name: tensor.shape for name, tensor in plain.items()}
        """Name -> shape of everything that `load` takes."""
        self._packed: dict[str, list[PackedLinear]] = {}
        for before in [m for m in model.modules() if isinstance(m, PackedLinear)]:
            self._packed.setdefault(before.name, []).append(before)
            self.shapes[before.name] = torch.Size((before.out_features, before.in_features))
        if hardware.device == "cpu" and hardware.dtype == torch.float32 and usable():
            names = {tensor.data_ptr(): name for name, tensor in plain.items()}
            for place, linear in [(p, m) for p, m in model.named_modules() if type(m) is torch.nn.Linear]:
                packed = PackedLinear(linear, names[linear.weight.data_ptr()])
                self._packed.setdefault(packed.name, []).append(packed)
                parent, _, child = place.rpartition(".")
                setattr(model.get_submodule(parent), child, packed)
        # What no linear layer holds any more is not in the state; a tied embedding still is.
        left = state_tensors(model)
        self._plain = {name: left[name] for name in plain if name in left}
        self._model = model
        self._dropped: list[tuple[torch.Tensor, torch.Size]] = []

    def mismatch(self, tensors: Mapping[str, Any]) -> list[str]:
        """Names that are missing, foreign, or of another shape, in order."""
        wrong = set(self.shapes.keys() ^ tensors.keys())
        wrong |= {n for n, shape in self.shapes.items() if n not in wrong and shape != tensors[n].shape}
        return sorted(wrong)

    @torch.no_grad()
    def drop(self) -> None:
        """Give the memory of all weights back; `load` must come before the next pass."""
        if self._dropped:
            return
        loaded = self._model.state_dict().keys()  # what is computed from the configuration stays
        named = [*self._model.named_parameters(), *self._model.named_buffers()]
        self._dropped = [(tensor, tensor.shape) for name, tensor in named if name in loaded]
        for tensor, _ in self._dropped:
            tensor.data = tensor.new_empty(0)
        for module in [module for modules in self._packed.values() for module in modules]:
            module.drop()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take new weights; `mismatch` must have nothing against them."""
        if self._dropped:
            for tensor, shape in self._dropped:
                tensor.data = tensor.new_empty(shape)
            self._dropped = []
            left = state_tensors(self._model)
            self._plain = {name: left[name] for name in self._plain}
        for name, tensor in self._plain.items():
            tensor.copy_(tensors[name])
        for name, modules in self._packed.items():
            for module in modules:
                module.pack(tensors[name].to(torch.float32))
