"""Chat templates as model families use them, each with a small tokenizer of the family's kind.

Loaded with `runpy`. The templates in `templates/` behave as the real ones do; the tokenizers split text with
the families' own patterns, have merges (so that ids can be non-canonical) and the control tokens, some of
which are not called special, as in the real ones.
"""

import asyncio
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stateset_ray.config import RolloutConfig
from stateset_ray.environments.base import Environment
from stateset_ray.policies.base import Reply
from stateset_ray.policies.renderer import Renderer
from stateset_ray.rollout import rollout
from stateset_ray.types import Message, Step, Task

TEMPLATES = Path(__file__).with_name("templates")

_CORPUS = [
    "Where is my order? It has shipped and arrives on Sunday. The order number, please.",
    "system user assistant tool model ipython First reply. Second one. You are helpful.",
    "Let me see.\n\nThe answer is 42.\n  Thank you, the lamp is here; and the café? Übung, naïve, 你好。",
] * 3
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Family(NamedTuple):
    """One template: its renderer, and what may be said to it.

    Attributes:
        system, tool: whether these roles exist.
        adjacent: whether the user may say two things in a row.
        rewrites: whether the template edits earlier turns.
        control: ids that only the template and the policy may write.
        lossy: characters that its tokenizer cannot tell from others.
    """

    name: str
    renderer: Renderer
    system: bool
    tool: bool
    adjacent: bool
    rewrites: bool
    control: frozenset[int]
    lossy: str

    @property
    def tokenizer(self) -> Any:
        return self.renderer._tokenizer

    def whole(self, messages: Any, *, prompt: bool = True) -> tuple[int, ...]:
        """One full render by the tokenizer alone: the oracle."""
        plain = [{"role": m.role, "content": m.content} for m in messages]
        text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def _byte_level(split: Any, normalizer: Any = None) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = split, decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    return raw


def _sentencepiece(*, metaspace: bool) -> Tokenizer:
    """As converted from SentencePiece: spaces are letters, unknown characters are bytes."""
    raw = Tokenizer(models.BPE())
    if metaspace:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    else:
        raw.normalizer = normalizers.Replace(" ", "▁")
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
        )
    raw.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    raw.model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[tuple(m) for m in model["merges"]],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if metaspace else steps)
    return raw


_GPT2 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
)
_QWEN = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
_THINK = ("<think>", "</think>")


def _wide(*names: str) -> tuple[str, ...]:
    """Control tokens as DeepSeek writes them, between full-width bars."""
    return tuple(f"<\uff5c{name}\uff5c>" for name in names)


_RECIPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "raw": lambda: _byte_level(_GPT2),
        "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "tokens": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        "pad_is_eos": True,
    },
    "llama3": {
        "raw": lambda: _byte_level(_QWEN),
        "special": (
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>", "<|eom_id|>",
        ),
        "tokens": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "stop": ("<|end_of_text|>", "<|eom_id|>"),
    },
    "qwen3": {
        "raw": lambda: _byte_level(_QWEN, normalizers.NFC()),
        "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "added": (*_THINK, "<tool_response>", "</tool_response>"),
        "tokens": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "stop": ("<|endoftext|>",),
        "rewrites": True,
    },
    "mistral": {
        "raw": lambda: _sentencepiece(metaspace=True),
        "special": ("<s>", "</s>", "[INST]", "[/INST]"),
        "tokens": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "alternates": True, "lossy": "▁",
    },
    "gemma": {
        "raw": lambda: _sentencepiece(metaspace=False),
        "special": ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "tokens": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "alternates": True, "lossy": "▁", "system": False,
    },
    "deepseek": {
        "raw": lambda: _byte_level(_QWEN),
        "special": _wide("begin▁of▁sentence", "end▁of▁sentence"),
        "added": (*_THINK, *_wide("User", "Assistant", "tool▁output▁begin", "tool▁output▁end")),
        "tokens": dict(
            zip(("bos_token", "eos_token"), _wide("begin▁of▁sentence", "end▁of▁sentence"), strict=True)
        ),
        "pad_is_eos": True, "rewrites": True,
    },
}  # fmt: skip
_RECIPES["mistral_last"] = _RECIPES["mistral"] | {"rewrites": True}
_RECIPES["qwen3_thinking"] = _RECIPES["qwen3"]
NAMES = sorted(_RECIPES)
APPENDING = [name for name in NAMES if not _RECIPES[name].get("rewrites")]
ADJACENT = [name for name in NAMES if not _RECIPES[name].get("alternates")]
assert sorted(path.stem for path in TEMPLATES.glob("*.jinja")) == NAMES


@cache
def family(name: str) -> Family:
    """The family of that name, built once."""
    recipe = _RECIPES[name]
    added = recipe.get("added", ())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=recipe["raw"](), **recipe["tokens"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(recipe["special"])})
    tokenizer.add_tokens(list(added))
    if recipe.get("pad_is_eos"):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    stop = tokenizer.convert_tokens_to_ids(list(recipe.get("stop", ())))
    alternates = recipe.get("alternates", False)
    return Family(
        name, Renderer(tokenizer, stop),
        system=recipe.get("system", True), tool=not alternates, adjacent=not alternates,
        rewrites=recipe.get("rewrites", False),
        control=frozenset(tokenizer.convert_tokens_to_ids([*recipe["special"], *added])),
        lossy=recipe.get("lossy", ""),
    )  # fmt: skip


class Told(Environment):
    """Says what it was told to say, one step after the other."""

    def __init__(self, steps: Any) -> None:
        self.steps = list(steps)

    async def reset(self, task: Task, seed: int) -> Step:
        return Step(tuple(self.steps.pop(0)))

    async def step(self, message: Message) -> Step:
        said = tuple(self.steps.pop(0)) if self.steps else ()
        return Step(said, reward=0.25, terminated=not said)

    async def close(self) -> None:
        pass


class Sampler:
    """A policy that samples the ids it is given, and keeps every request."""

    def __init__(self, replies: Any, stop_ids: Any) -> None:
        self.replies, self.stop_ids = [tuple(ids) for ids in replies], stop_ids
        self.requests: list[Any] = []

    async def reply(self, request: Any) -> Reply:
        self.requests.append(request)
        turn = len(self.requests) - 1
        ids = self.replies[turn][: request.max_tokens]
        logprobs = tuple(-(turn + 1) - i / 64 for i in range(len(ids)))
        return Reply(ids, logprobs, 10 + turn, "stop" if ids[-1] in self.stop_ids else "length")

    def release(self, conversation: str) -> None:
        pass


def play(
    renderer: Renderer, steps: Any, replies: Any, *, seed: int = 3, sample: int = 0, **limits: Any
) -> tuple[Any, Sampler]:
    """One conversation through the real rollout: its trajectory, and the policy that was asked."""
    policy = Sampler(replies, renderer.stop_ids)
    room = {"max_context": 100_000, "max_turn_tokens": 500, "max_sampled_tokens": 50_000, "max_turns": 50}
    settings = RolloutConfig(**{**room, "on_cut_reply": "close", **limits})
    talk = rollout(
        Told(steps), Task("t", 0), policy, renderer, settings,
        id=f"r/0/t/{sample}/0", seed=seed, sample=sample,
    )  # fmt: skip
    return asyncio.run(talk), policy
