"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), put in by PEFT: y = W x + (alpha / rank) B A x.

A and B are trained, W is not. B begins as zeros, so that the policy begins as the model it adapts. What is
published is merged, W + (alpha / rank) B A, under the names of the model without adapters: samplers,
checkpoints and references never meet an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stateset_ray.config import LoraConfig
from stateset_ray.errors import ConfigError
from stateset_ray.learner.trainable import nearest

__all__ = ["Adapters"]

_NAME = "default"


class Adapters:
    """The adapters of a model; putting them in freezes everything else.

    Args:
        model: a Hugging Face model; changed in place.
        config: the `[learner.lora]` section, with a rank above 0.

    Raises:
        ConfigError: PEFT is not installed, or there is no such module to adapt.
    """

    def __init__(self, model: Any, config: LoraConfig) -> None:
        names = _targets(model, config.targets)
        try:
            import peft
        except ImportError as error:
            raise ConfigError(
                "learner.lora needs the package peft",
                given=f"learner.lora.rank = {config.rank}",
                mend="pip install 'stateset-ray[lora]', or set learner.lora.rank=0",
            ) from error
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same on every rank, and whatever was drawn before
            peft.inject_adapter_in_model(
                peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names), model, _NAME
            )
        self._scale = config.alpha / config.rank
        # The name of the weight that it adapts -> the module around that weight.
        self._layers: dict[str, Any] = {f"{name}.weight": model.get_submodule(name) for name in names}
        for layer in self._layers.values():
            layer.lora_B[_NAME] = _AddedTo(layer.lora_B[_NAME], self._scale)
            layer.lora_variant[_NAME] = _AtOnce
        trained = {id(p) for name in self._layers for p in self.of(name)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def of(self, name: str) -> list[nn.Parameter]:
        """A and B of the adapter at a weight of this name, or nothing."""
        layer = self._layers.get(name)
        return [] if layer is None else [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight with its adapter added in float32; the weight itself where it has none."""
        if name not in self._layers:
            return weight
        a, b = (p.float() for p in self.of(name))
        return (weight.float() + self._scale * (b @ a)).to(weight.dtype)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model computes as if it had no adapters."""
        for layer in self._layers.values():
            # Not `enable_adapters(False)`, which would freeze them, and the optimizer holds them.
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer._disable_adapters = False


class _AddedTo(nn.Module):
    """B: adds what the adapter says to what the layer says, in one product.

    PEFT multiplies, scales and adds, which makes three tensors of the output's size; two of them only pass.

    Args:
        b: PEFT's own, whose weight is taken over.
        scale: alpha / rank.
    """

    def __init__(self, b: nn.Linear, scale: float) -> None:
        super().__init__()
        self.weight, self._scale = b.weight, scale

    def forward(self, low: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """[..., rank] and [..., outputs] -> [..., outputs]."""
        said = result.to(self.weight.dtype)  # adapters are float32 beside bfloat16 weights
        flat = torch.addmm(said.flatten(0, -2), low.flatten(0, -2), self.weight.T, alpha=self._scale)
        return flat.view_as(result)


class _AtOnce:
    """How PEFT is told of another way to compute an adapter (`peft.tuners.lora.layer.LoraVariant`)."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        added: torch.Tensor = module.lora_B[active_adapter](module.lora_A[active_adapter](x), result)
        return added


def _targets(model: Any, wanted: tuple[str, ...]) -> list[str]:
    """Full names of the linear modules that get an adapter."""
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    for target in wanted:
        if not any(_meant(name, target) for name in linear):
            raise ConfigError(
                "learner.lora.targets names no linear module of this model's layers",
                given=target,
                mend=f"its modules are called {nearest(target, [n.rpartition('.')[2] for n in linear])}",
            )
    return [name for name in linear if not wanted or any(_meant(name, target) for target in wanted)]


def _meant(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
