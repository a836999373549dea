"""A small model that vLLM's CPU kernels can serve, and one engine for all tests that do not end it."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: `make vllm` makes an environment for it")

# Set before vLLM is imported: without compiling, a start takes seconds.
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stateset_ray.models import Hardware, load_model, load_tokenizer

STOP = 2
SLOTS, CONTEXT = 4, 192


@pytest.fixture(scope="session")
def hardware() -> Hardware:
    return Hardware("cpu", torch.float32, 1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Like the tiny model, but with heads of 64, which vLLM needs; sharp, so that ties are rare."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer("tiny")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=STOP, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def model(folder: str, hardware: Hardware) -> Any:
    """The same weights in transformers, driven by our attention."""
    return load_model(folder, hardware)


@pytest.fixture(scope="session")
def other(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with other weights of the same shapes."""
    path: Path = tmp_path_factory.mktemp("other")
    changed = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    changed.save_pretrained(path)
    load_tokenizer(folder).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop: an engine belongs to that in which it was made."""
    with asyncio.Runner() as loop:
        yield loop


@pytest.fixture(scope="session")
def engine(folder: str, hardware: Hardware, runner: asyncio.Runner) -> Iterator[Any]:
    from stateset_ray.policies.vllm_engine import VllmEngine

    async def make() -> VllmEngine:
        return VllmEngine(folder, {STOP}, slots=SLOTS, max_context=CONTEXT, hardware=hardware)

    made = runner.run(make())
    yield made
    runner.run(made.close())
