"""The baseline of the training benchmark: what one writes with plain transformers and PyTorch.

Rollout: a static batch, padded on the left, `generate` with its cache inside a turn; between turns the
history is prefilled again. It captures no log-probabilities, which a trainer would need in addition.

Learner: rows padded on the right, `ROWS` to a micro-batch, logits of every position, AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.conversations import Rendered
from stateset_ray.config import Config
from stateset_ray.models import Hardware, local_folder
from stateset_ray.types import Sample

__all__ = ["ROWS", "PlainLearner", "load_plain", "play_plain"]

ROWS = 8


def load_plain(name: str, hardware: Hardware) -> Any:
    """The model as transformers loads it, with its own scaled-dot-product attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        local_folder(name), dtype=hardware.dtype, attn_implementation="sdpa"
    )
    return model.to(hardware.device).eval()


def play_plain(model: Any, rendered: Sequence[Rendered], tokens: int, seed: int) -> dict[str, int]:
    """Play all conversations turn by turn; returns how many tokens were sampled and prefilled.

    Args:
        model: from `load_plain`.
        rendered: what is given of each conversation; all have the same number of turns.
        tokens: of every reply.
        seed: of the sampling.
    """
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    pad = 0  # any id: it is masked
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, use_cache=True,
        eos_token_id=None, pad_token_id=pad,
    )  # fmt: skip
    # The model's own generation config would add an end token.
    model.generation_config.eos_token_id = None
    rows = [list(opening) for opening, _ in rendered]
    counts = {"sampled_tokens": 0, "prefill_tokens": 0}
    for turn in range(1 + len(rendered[0][1])):
        if turn:
            rows = [row + list(suffixes[turn - 1]) for row, (_, suffixes) in zip(rows, rendered, strict=True)]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        new = out[:, width:].tolist()
        rows = [row + reply for row, reply in zip(rows, new, strict=True)]
        counts["sampled_tokens"] += sum(map(len, new))
        counts["prefill_tokens"] += int(mask.sum())
    return counts


class PlainLearner:
    """A training loop without any library but PyTorch; the same loss, clipping and optimizer settings."""

    def __init__(self, config: Config, hardware: Hardware) -> None:
        self._config = config
        self._device = hardware.device
        self._model = load_plain(config.model.name, hardware).train()
        learner = config.learner
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=learner.learning_rate, betas=learner.betas,
            weight_decay=learner.weight_decay,
        )  # fmt: skip

    def update(self, samples: Sequence[Sample], denominator: int, rows: int = ROWS) -> float:
        """One optimizer step over all samples, `rows` of them at a time; returns the loss."""
        total = 0.0
        for start in range(0, len(samples), rows):
            loss = self._loss(samples[start : start + rows], denominator)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.learner.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def _loss(self, samples: Sequence[Sample], denominator: int) -> torch.Tensor:
        ids, real, mask, sampler, advantages = (
            self._padded([np.asarray(row) for row in rows])
            for rows in (
                [s.token_ids for s in samples],
                [np.ones(len(s), np.int64) for s in samples],
                [s.loss_mask for s in samples],
                [s.logprobs for s in samples],
                [s.advantages for s in samples],
            )
        )
        ids = ids.long()
        logits = self._model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        ratio = (logprobs - sampler[:, 1:]).exp()
        grpo = self._config.grpo
        clipped = ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high)
        terms = torch.minimum(ratio * advantages[:, 1:], clipped * advantages[:, 1:])
        return -(terms * mask[:, 1:]).sum() / denominator

    def _padded(self, rows: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
        width = max(map(len, rows))
        table = np.zeros((len(rows), width), rows[0].dtype)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        return torch.from_numpy(table).to(self._device)
