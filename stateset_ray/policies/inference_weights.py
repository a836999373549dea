"""The weights of a model that only answers, and how new ones get into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stateset_ray.models import Hardware, state_tensors
from stateset_ray.policies.fused_layer import FusedLayer, fusible
from stateset_ray.policies.packed_linear import PackedLinear, usable

__all__ = ["InferenceWeights"]


class InferenceWeights:
    """A model's weights, in the layout that its hardware answers with.

    On a CPU in float32 the model's layers are replaced by fused ones, or where these are not known its linear
    layers by packed ones; elsewhere it stays as it is. The model is changed in place and belongs to whoever
    made this; its names and shapes are those that it had before, also where an earlier one of these has
    packed it already.

    Args:
        model: any module.
        hardware: where it sits.
    """

    def __init__(self, model: torch.nn.Module, hardware: Hardware) -> None:
        plain = state_tensors(model)
        self.shapes = {name: tensor.shape for name, tensor in plain.items()}
        """Name -> shape of everything that `load` takes."""
        for before in _packed(model):
            self.shapes |= before.shapes
        if hardware.device == "cpu" and hardware.dtype == torch.float32 and usable():
            _pack(model, plain)
        self._packed = _packed(model)
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
        for module in self._packed:
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
        for module in self._packed:
            module.take(tensors)


def _packed(model: torch.nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def _pack(model: torch.nn.Module, plain: Mapping[str, torch.Tensor]) -> None:
    """Put fused layers and packed linear layers in place of the model's."""
    by_place = {tensor.data_ptr(): name for name, tensor in plain.items()}
    names = {id(p): by_place[p.data_ptr()] for p in model.parameters() if p.data_ptr() in by_place}

    def replace(place: str, module: torch.nn.Module) -> None:
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, module)

    for place, layer in [(p, m) for p, m in model.named_modules() if fusible(m)]:
        replace(place, FusedLayer(layer, names))
    for place, linear in [(p, m) for p, m in model.named_modules() if type(m) is torch.nn.Linear]:
        found = names[id(linear.weight)], names.get(id(linear.bias), "")
        replace(place, PackedLinear([linear], [found]))
