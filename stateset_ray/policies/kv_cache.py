"""The KV cache of one engine: a slot per conversation, kept across its turns and shared by prefix.

Keys and values of all layers lie in one tensor [layers, 2, slots, kv_heads, context, d], allocated once.
A slot remembers which token ids its entries were computed from. Nothing is looked up by name or by hash:
an entry is reused only where the ids agree, from the first on, and where the weights are the same
(`clear` is called whenever they change).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

__all__ = ["CachedRows", "Ids", "KVCache", "Slot", "common_prefix"]

Ids = npt.NDArray[np.int32]


def common_prefix(a: Ids, b: Ids) -> int:
    """Length of the common prefix of two id arrays."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


@dataclass(slots=True, eq=False)
class Slot:
    """One row of the cache.

    Attributes:
        row: its index.
        ids: the token ids whose entries it holds; `ids[:length]` is valid.
        owner: the conversation that holds it, or None. Entries of a free slot stay usable as a prefix.
        busy: True while a turn is being generated on it.
        used: when it was last used, in turns of the engine.
    """

    row: int
    ids: Ids
    length: int = 0
    owner: str | None = None
    busy: bool = False
    used: int = 0

    @property
    def known(self) -> Ids:
        """The ids whose entries are valid."""
        return self.ids[: self.length]


class KVCache:
    """Slots over one preallocated tensor.

    Args:
        layers, kv_heads, head_dim: of the model.
        slots: conversations held at once.
        context: tokens per conversation.
    """

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, slots: int, context: int,
        device: str, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._shape = (layers, 2, slots, kv_heads, context, head_dim)
        self.entries = torch.empty(0, device=device, dtype=dtype)
        self.restore()
        self.slots = [Slot(row, np.zeros(context, np.int32)) for row in range(slots)]
        self._clock = 0

    def drop(self) -> None:
        """Forget everything and give the memory back, until `restore`."""
        self.clear()
        self.entries = self.entries.new_empty(0)

    def restore(self) -> None:
        """Have memory for all slots, if it was given back."""
        if not self.entries.numel():
            # Zeros: masked entries are multiplied by 0, which must not meet a NaN. Untouched pages of a CPU
            # tensor cost no memory until a conversation reaches them.
            self.entries = self.entries.new_zeros(self._shape)

    def clear(self) -> None:
        """Forget every entry and owner: the weights changed, or the state is in doubt."""
        for slot in self.slots:
            slot.length, slot.owner, slot.busy, slot.used = 0, None, False, 0
        self._clock = 0

    def owned(self, conversation: str) -> Slot | None:
        """The slot that a conversation holds."""
        return next((slot for slot in self.slots if slot.owner == conversation), None)

    def known(self, conversation: str, prompt: Ids) -> int:
        """How many tokens of a prompt need not be computed."""
        slot = self.owned(conversation)
        return common_prefix(slot.known, prompt) if slot else self.best_prefix(prompt)[1]

    def best_prefix(self, prompt: Ids) -> tuple[Slot | None, int]:
        """The slot that shares the longest prefix with a prompt, and how long that is."""
        best, length = None, 0
        for slot in self.slots:
            shared = common_prefix(slot.known, prompt)
            if shared > length:
                best, length = slot, shared
        return best, length

    @property
    def full(self) -> bool:
        """Whether every slot is at work, so that no turn can get one."""
        return all(slot.busy for slot in self.slots)

    def acquire(self, conversation: str, prompt: Ids) -> Slot | None:
        """A slot for a turn, holding as much of the prompt as any slot knows; None if it has to wait.

        At least the last token of the prompt is left to compute, since its logits are needed.
        """
        slot = self.owned(conversation)
        if slot is not None and slot.busy:
            return None  # an earlier turn that nobody waits for any more still writes there
        source, shared = (slot, slot.length) if slot else self.best_prefix(prompt[:-1])
        if slot is None:
            free = [s for s in self.slots if not s.busy and s.owner is None and s is not source]
            if not free and source and source.owner is None and not source.busy:
                free = [source]
            # With no free slot, the conversation that has waited longest for its user loses its cache.
            free = free or [s for s in self.slots if not s.busy]
            if not free:
                return None
            slot = min(free, key=lambda s: (s.owner is not None, s.used, s.row))
        own = common_prefix(slot.known, prompt[:-1])
        if source is not None and source is not slot and shared > own:
            with torch.inference_mode():
                self.entries[:, :, slot.row, :, own:shared] = self.entries[:, :, source.row, :, own:shared]
            slot.ids[own:shared] = source.ids[own:shared]
            own = shared
        self._clock += 1
        slot.length, slot.owner, slot.busy, slot.used = own, conversation, True, self._clock
        return slot

    def extend(self, slot: Slot, ids: Sequence[int] | Ids) -> None:
        """Record that entries for these ids now follow the known ones."""
        slot.ids[slot.length : slot.length + len(ids)] = ids
        slot.length += len(ids)

    def release(self, conversation: str) -> None:
        """Free a conversation's slot; its entries stay usable as a prefix until it is taken."""
        slot = self.owned(conversation)
        if slot is not None:
            slot.owner = None  # a turn that is still being generated keeps it busy


@dataclass
class CachedRows:
    """One forward pass over the cache: decoding slots (one token each) first, then prefilled ones.

    Args:
        cache: where keys and values are read and written.
        decoding: slots that get one token each.
        prefilling: (slot, number of new tokens) pairs.
    """

    cache: KVCache
    decoding: Sequence[Slot]
    prefilling: Sequence[tuple[Slot, int]]
    _masks: list[torch.Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        device = self.cache.entries.device
        lengths = [slot.length for slot in self.decoding]
        self._positions = torch.tensor(lengths, device=device)
        self._rows = torch.tensor([slot.row for slot in self.decoding], device=device)
        self._longest = max(lengths, default=0) + 1
        self._span = max((slot.row for slot in self.decoding), default=-1) + 1
        # Attending over a contiguous span of rows avoids copying the cache; rows that are not decoding
        # are computed in vain, so with few decoding rows each is attended alone.
        self._dense = len(self.decoding) * 2 >= self._span
        if self._dense and self.decoding:
            last = torch.zeros(self._span, dtype=torch.long, device=device)
            last[self._rows] = self._positions
            steps = torch.arange(self._longest, device=device)
            self._mask = (steps <= last[:, None])[:, None, None, :]
        self._masks = [self._causal(slot.length, new, device) for slot, new in self.prefilling]

    @staticmethod
    def _causal(past: int, new: int, device: torch.device) -> torch.Tensor | None:
        if past == 0:
            return None
        columns = torch.arange(past + new, device=device)
        return columns <= torch.arange(past, past + new, device=device)[:, None]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `stateset_ray.models.Rows.attend`."""
        keys, values = self.cache.entries[layer, 0], self.cache.entries[layer, 1]
        count, group = len(self.decoding), query.shape[1] // key.shape[1]
        parts = []
        if count:
            keys[self._rows, :, self._positions] = key[0, :, :count].transpose(0, 1)
            values[self._rows, :, self._positions] = value[0, :, :count].transpose(0, 1)
            # Query heads that share a key head are treated as that many queries of one head.
            q = query[0, :, :count].transpose(0, 1).unflatten(1, (-1, group))
            parts.append(self._decode(q, keys, values, scale).flatten(1, 2))
        start = count
        for (slot, new), mask in zip(self.prefilling, self._masks, strict=True):
            stop, end = start + new, slot.length + new
            keys[slot.row, :, slot.length : end] = key[0, :, start:stop]
            values[slot.row, :, slot.length : end] = value[0, :, start:stop]
            out = F.scaled_dot_product_attention(
                query[:, :, start:stop], keys[None, slot.row, :, :end], values[None, slot.row, :, :end],
                attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=group > 1,
            )  # fmt: skip
            parts.append(out[0].transpose(0, 1))
            start = stop
        return torch.cat(parts)[None]

    def _decode(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[n, kv_heads, group, d] queries of the decoding rows -> attention of the same shape."""
        if not self._dense:
            rows = [
                F.scaled_dot_product_attention(
                    q[i : i + 1], keys[None, s.row, :, :n], values[None, s.row, :, :n], scale=scale
                )
                for i, (s, n) in enumerate((s, s.length + 1) for s in self.decoding)
            ]
            return torch.cat(rows)
        whole = q.new_zeros((self._span, *q.shape[1:]))
        whole[self._rows] = q
        out = F.scaled_dot_product_attention(
            whole, keys[: self._span, :, : self._longest], values[: self._span, :, : self._longest],
            attn_mask=self._mask, scale=scale,
        )  # fmt: skip
        return out[self._rows]
