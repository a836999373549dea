"""The layers of a Llama-like decoder in fewer, larger steps, for a CPU engine.

A decoding pass has one row a conversation. Hugging Face's code of a layer multiplies three times where once
would do, rotates in ten operators, and adds in operators of their own. This layer computes the same with
packed weights (`packed_linear`): queries, keys and values in one product, both halves of the gated MLP in
another, residuals added by the products themselves, and the rotation of queries and keys in three
operators. Every row has the same bits in every batch.

It stands in the place of a layer of the model, whose own code does all else: embedding, angles, last norm and
output. Models whose layers are not known to compute just this keep their own (`fusible`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from stateset_ray.models import Rows
from stateset_ray.policies.packed_linear import PackedLinear

__all__ = ["FusedLayer", "fusible"]

# Their code is the same up to biases and norms of queries and keys.
_KNOWN = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj")


def fusible(layer: Any) -> bool:
    """Whether a layer computes just what `FusedLayer` does."""
    if type(layer).__name__ not in _KNOWN or not type(layer).__module__.startswith("transformers."):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears: list[Any] = [getattr(attention, n, None) for n in (*_ATTENTION, "o_proj")]
    linears += [getattr(mlp, n, None) for n in (*_GATED, "down_proj")]
    if not all(type(linear) is torch.nn.Linear for linear in linears):
        return False  # an adapter, a quantized layer
    alike = [[linear.bias is None for linear in some] for some in (linears[:3], linears[4:6])]
    gated = isinstance(mlp.act_fn, torch.nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation"
    return gated and all(len(set(one)) == 1 for one in alike)


class FusedLayer(torch.nn.Module):
    """One layer of a decoder, packed.

    Args:
        layer: a `fusible` one of the model; its norms are kept, its linear layers packed.
        names: id of a parameter -> its name in the model's state.
    """

    def __init__(self, layer: Any, names: Mapping[int, str]) -> None:
        super().__init__()

        def packed(parent: torch.nn.Module, *children: str) -> PackedLinear:
            linears = [getattr(parent, child) for child in children]
            found = [(names[id(one.weight)], names.get(id(one.bias), "")) for one in linears]
            return PackedLinear(linears, found)

        attention = layer.self_attn
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        # The same path as in the layer, so that the norms keep their names in the model's state.
        self.self_attn = torch.nn.Module()
        self._normed_keys = hasattr(attention, "q_norm")
        if self._normed_keys:
            self.self_attn.q_norm, self.self_attn.k_norm = attention.q_norm, attention.k_norm
        self._index: int = attention.layer_idx
        self._size: int = attention.head_dim
        self._scale: float = attention.scaling
        self._heads = attention.q_proj.out_features // self._size
        self._keys = attention.k_proj.out_features // self._size
        self._inner: int = layer.mlp.gate_proj.out_features
        self.qkv = packed(attention, *_ATTENTION)
        self.out = packed(attention, "o_proj")
        self.gate_up = packed(layer.mlp, *_GATED)
        self.down = packed(layer.mlp, "down_proj")

    def forward(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor],
        rows: Rows, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """[1, N, hidden] -> the same shape; called by the model as it calls its own layers."""
        hidden = hidden_states[0]
        count, turned = len(hidden), self._heads + self._keys
        mixed = self.qkv(_normed(self.input_layernorm, hidden)).view(count, -1, self._size)
        both = self._rotated(self._normed_heads(mixed[:, :turned]), *position_embeddings)
        attended = rows.attend(
            self._index, both[:, : self._heads].transpose(0, 1)[None],
            both[:, self._heads :].transpose(0, 1)[None], mixed[:, turned:].transpose(0, 1)[None],
            self._scale,
        )  # fmt: skip
        hidden = self.out(attended.reshape(count, -1), hidden)
        wide = self.gate_up(_normed(self.post_attention_layernorm, hidden))
        out: torch.Tensor = self.down(F.silu(wide[:, : self._inner]) * wide[:, self._inner :], hidden)
        return out[None]

    def _normed_heads(self, both: torch.Tensor) -> torch.Tensor:
        """Queries and keys, [N, heads + kv_heads, d], each by its own norm where there is one."""
        if not self._normed_keys:
            return both
        queries, keys = both[:, : self._heads], both[:, self._heads :]
        return torch.cat(
            (_normed(self.self_attn.q_norm, queries), _normed(self.self_attn.k_norm, keys)), dim=1
        )

    @staticmethod
    def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding: x * cos + rotate_half(x) * sin (Su et al., 2021); angles [1, N, d]."""
        half = x.shape[-1] // 2
        cos, sin = cos[0, :, None], sin[0, :, None]
        turned = x * cos
        turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return turned


def _normed(norm: Any, rows: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(rows, rows.shape[-1:], norm.weight, norm.variance_epsilon)
