"""Models: the one place that finds them, loads them and decides how they attend.

Every model is driven *ragged*: the tokens of many conversations lie end to end in one row of shape
[1, N], so that linear layers never see padding, and a `Rows` object tells the attention which tokens
belong together. The inference engine (with KV cache) and the learner (without) each bring their own
`Rows`; the model code is Hugging Face's, unchanged (an engine on a CPU puts faster layers into it,
`policies.fused_layer`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from stateset_ray.config import Config
from stateset_ray.errors import ConfigError, ModelError
from stateset_ray.hardware import Hardware, choose_hardware
from stateset_ray.offline_models import built

__all__ = [
    "ATTENTION",
    "Hardware",
    "Rows",
    "TreeRows",
    "check_fits",
    "check_reference",
    "check_targets",
    "choose_hardware",
    "config_only",
    "count_parameters",
    "generation_stop_ids",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "parameter_shapes",
    "state_tensors",
]

ATTENTION = "stateset_ragged"


class Rows(Protocol):
    """Which tokens of a ragged batch belong together."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of one layer over N ragged tokens.

        Args:
            layer: index of the layer.
            query: [1, heads, N, d].
            key: [1, kv_heads, N, d]; `value` alike.
            scale: factor on the logits.

        Returns:
            [1, N, heads, d]
        """
        ...


class TreeRows:
    """Rows without a cache: stretches of tokens end to end, each attending causally to itself and to all
    of its parent.

    Children of one parent share its keys and values, so that what several conversations begin with is
    computed once, forward and backward. The result is that of separate rows.

    Args:
        segments: (length, parent) of each stretch; the parent is the index of an earlier stretch without a
            parent of its own, or -1.
        device: where the model computes.

    Example:
        >>> q = torch.randn(1, 4, 5, 8); kv = torch.randn(1, 2, 5, 8)
        >>> TreeRows(((2, -1), (1, 0), (2, 0))).attend(0, q, kv, kv, 1.0).shape
        torch.Size([1, 5, 4, 8])
    """

    def __init__(self, segments: Sequence[tuple[int, int]], device: str = "cpu") -> None:
        self._lengths = [length for length, _ in segments]
        self._parents = [parent for _, parent in segments]
        shapes = {(length, self._lengths[parent]) for length, parent in segments if parent >= 0 and length}
        # Aligned to the lower right: the last query sees every key. One mask per shape, for all layers.
        self._masks = {
            (own, above): torch.ones(own, above + own, dtype=torch.bool, device=device).tril_(above)
            for own, above in shapes
        }

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Rows.attend`."""
        queries, keys, values = (t.split(self._lengths, dim=2) for t in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        rows = []
        for q, k, v, parent in zip(queries, keys, values, self._parents, strict=True):
            mask = None
            if parent >= 0:
                mask = self._masks[q.shape[2], self._lengths[parent]]
                k, v = torch.cat((keys[parent], k), dim=2), torch.cat((values[parent], v), dim=2)
            rows.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
                )
            )
        return torch.cat(rows, dim=2).transpose(1, 2)


def _ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    rows: Rows,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if softcap is not None or s_aux is not None:
        raise ModelError(
            "this model's attention caps its logits or has sinks, which is not driven here",
            given=type(module).__name__,
            mend="choose a Llama, Qwen, Mistral or SmolLM style model",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    return rows.attend(layer, query, key, value, scale), None


def local_folder(name: str) -> str:
    """The folder (or Hugging Face id) that transformers can load for a configured model name.

    `smollm2` and `tiny` are built once into the cache; two processes may ask at the same time.

    Raises:
        ModelError: the model is not there; the message says how to get it.
    """
    if name == "tiny":
        return str(built("tiny"))
    if name == "smollm2":
        return str(built("smollm2"))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(
                "this folder holds no model in the Hugging Face layout",
                given=name,
                mend="it needs config.json, *.safetensors and the tokenizer's files",
            )
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError("there is no such model folder", given=name, mend="check model.name")
    return name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model; raises ModelError if it cannot be had."""
    from transformers import AutoTokenizer

    folder = local_folder(name)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer cannot be loaded: {_first_line(error)}",
            given=name,
            mend="check model.name: a Hugging Face id, a local folder, 'smollm2' or 'tiny'",
        ) from error


def config_only(name: str) -> Any:
    """The Hugging Face configuration of a model, without its weights; raises ModelError."""
    from transformers import AutoConfig

    folder = local_folder(name)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model cannot be found: {_first_line(error)}",
            given=name,
            mend="check model.name: a Hugging Face id, a local folder, 'smollm2' or 'tiny'",
        ) from error


def check_fits(config: Config) -> None:
    """Check before anything heavy loads that the configured lengths fit the model.

    Raises:
        ModelError: the model is missing or of a kind that cannot be driven.
        ConfigError: `rollout.max_context` exceeds the model's positions.
    """
    model = config_only(config.model.name)
    positions = getattr(model, "max_position_embeddings", None)
    if positions is not None and config.rollout.max_context > positions:
        raise ConfigError(
            f"rollout.max_context = {config.rollout.max_context} exceeds the model's {positions} positions",
            given=config.model.name,
            mend=f"set rollout.max_context to at most {positions}",
        )
    kinds = set(getattr(model, "layer_types", None) or ())
    if getattr(model, "is_encoder_decoder", False) or kinds - {"full_attention"}:
        raise ModelError(
            f"only decoders with full attention can be driven; this one has {sorted(kinds) or 'an encoder'}",
            given=config.model.name,
            mend="choose a Llama, Qwen, Mistral or SmolLM style model",
        )


def check_reference(config: Config) -> None:
    """Check that the reference of the KL reads the same tokens as the policy; loads no weights.

    Raises:
        ModelError: it is missing, or has another vocabulary.
    """
    name = config.grpo.reference
    if not name:
        return
    ours, theirs = load_tokenizer(config.model.name).get_vocab(), load_tokenizer(name).get_vocab()
    sizes = config_only(config.model.name).vocab_size, config_only(name).vocab_size
    if ours != theirs or sizes[0] != sizes[1]:
        differ = len(ours.items() ^ theirs.items())
        raise ModelError(
            f"the reference model has another vocabulary than the policy: {differ} entries differ, "
            f"{sizes[1]} logits against {sizes[0]}",
            given=name,
            mend="choose a grpo.reference of the same family as model.name, or leave it empty",
        )


def check_targets(config: Config) -> None:
    """Check that the model has the modules that `learner.lora.targets` names; builds no weights.

    Raises:
        ConfigError: it lacks some.
    """
    lora = config.learner.lora
    if not (lora.rank and lora.targets):
        return
    model: Any = _weightless(config.model.name)
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    lacking = [t for t in lora.targets if not any(n == t or n.endswith(f".{t}") for n in linear)]
    if lacking:
        raise ConfigError(
            "learner.lora.targets names no linear module of this model's layers", given=lacking,
            mend=f"its modules are called {', '.join(sorted({n.rpartition('.')[2] for n in linear}))}",
        )  # fmt: skip


def count_parameters(name: str) -> int:
    """How many parameters the model has, tied ones once; builds no weights."""
    return sum(p.numel() for p in _weightless(name).parameters())


def parameter_shapes(name: str) -> dict[str, torch.Size]:
    """Name -> shape of what `state_tensors` gives for the model; builds no weights."""
    model = _weightless(name)
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]  # tied ones once
    return {name: tensor.shape for name, tensor in named if name in saved}


def _weightless(name: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config_only(name))
    return model


def load_model(name: str, hardware: Hardware) -> Any:
    """A causal language model, ready for ragged batches (see the module's docstring).

    Call it as `model(input_ids=[1, N], position_ids=[1, N], rows=rows, use_cache=False,
    logits_to_keep=indices)`.

    Raises:
        ModelError: it cannot be loaded, or its code does not pass attention through the interface.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _ragged_attention)
    folder = local_folder(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=hardware.dtype, attn_implementation=ATTENTION
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model cannot be loaded: {_first_line(error)}",
            given=name,
            mend="check model.name, and that its code supports transformers' attention interface",
        ) from error
    return model.to(hardware.device).eval()


def state_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of every parameter and buffer that is saved, tied ones once."""
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if id_ := tensor.data_ptr():
            if id_ in seen:
                continue
            seen.add(id_)
        tensors[name] = tensor
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def generation_stop_ids(name: str) -> set[int]:
    """End tokens that the model's generation_config.json names (an empty set where there is none)."""
    path = Path(local_folder(name)) / "generation_config.json"
    if not path.is_file():
        return set()
    eos = json.loads(path.read_text()).get("eos_token_id")
    return set(eos if isinstance(eos, list) else [eos]) - {None}
