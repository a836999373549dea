"""Who computes what: samples -> ranks -> micro-batches, and samples -> one ragged row.

The controller plans from lengths alone and never touches a token; each rank packs its own samples.

Letters: N tokens of a micro-batch, end to end; M masked (sampled) tokens among them; S samples.

The samples of a group begin with the same prompt. Packed together they lie as a tree: the common prefix
once, then what is each one's own, which attends to the prefix and to itself. The numbers are those of
separate rows; the prefix is computed once instead of S times, forward and backward.

The denominator of a step counts ALL its trajectories, also those that are left out of the plan because
their advantage is 0: leaving them out saves their forward pass and changes no gradient. (With a KL to a
reference or an entropy bonus, a row of advantage 0 still has a gradient and must stay.)
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stateset_ray.errors import LearnerError
from stateset_ray.grpo.samples import shared_prefix
from stateset_ray.types import Sample

__all__ = ["Item", "MiniBatch", "PackedBatch", "pack", "plan"]


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """One rank's part of one optimizer step.

    Attributes:
        micro_batches: samples by forward pass; as many on every rank, empty ones included.
        groups: for each sample, what it shares its prefix with; shaped as `micro_batches`.
        denominator: what the step's weighted sum over tokens is divided by; the same on every rank.
    """

    micro_batches: Sequence[Sequence[Sample]]
    groups: Sequence[Sequence[Hashable]]
    denominator: float


@dataclass(frozen=True, slots=True)
class Item:
    """What the planner knows of a sample.

    Attributes:
        tokens: its length.
        group: samples of one group share their first `prefix` tokens.
        prefix: 0 where nothing is shared.
    """

    tokens: int
    group: int = -1
    prefix: int = 0


def plan(items: Sequence[Item], ranks: int, budget: int) -> list[list[list[int]]]:
    """Divide samples among ranks and micro-batches, the same way every time.

    The samples of a group stay together, as far as the budget and the balance between ranks allow,
    because together they cost their prefix once. Such pieces go to ranks by cost (the dearest first, to
    the rank with the least); on a rank, a micro-batch takes pieces while they fit in the budget (first
    fit, dearest first). Every rank gets the same number of micro-batches, because ZeRO's forward and
    backward are collective: where a rank has fewer, its list ends in empty ones, for which it runs a
    padding pass of weight 0.

    Args:
        items: the samples.
        ranks: how many ranks there are.
        budget: tokens that one micro-batch may hold.

    Returns:
        `[rank][micro_batch]` -> indices of samples, ascending. No micro-batches at all without samples.

    Raises:
        LearnerError: a sample alone exceeds the budget.

    Example:
        >>> plan([Item(5), Item(3), Item(4), Item(2)], ranks=2, budget=6)
        [[[0], [3]], [[2], [1]]]
        >>> plan([Item(5, 0, 4), Item(5, 0, 4), Item(6, 0, 4)], ranks=1, budget=8)
        [[[0, 1, 2]]]
    """
    longest = max((item.tokens for item in items), default=0)
    if longest > budget:
        raise LearnerError(
            f"a sample of {longest} tokens does not fit into a micro-batch of {budget}",
            given=longest,
            mend="raise learner.micro_batch_tokens, or lower rollout.max_context",
        )
    pieces = _pieces(items, ranks, budget)
    loads = [(0, rank) for rank in range(ranks)]
    of_rank: list[list[tuple[int, list[int]]]] = [[] for _ in range(ranks)]
    for cost, indices in pieces:
        tokens, rank = heapq.heappop(loads)
        of_rank[rank].append((cost, indices))
        heapq.heappush(loads, (tokens + cost, rank))
    filled = [_first_fit(mine, budget) for mine in of_rank]
    passes = max(len(micro_batches) for micro_batches in filled)
    return [micro_batches + [[] for _ in range(passes - len(micro_batches))] for micro_batches in filled]


def _pieces(items: Sequence[Item], ranks: int, budget: int) -> list[tuple[int, list[int]]]:
    """(cost, samples) of what is computed together, dearest first."""
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.group if item.prefix else ("alone", index), []).append(index)
    # A group larger than a rank's fair share would keep the other ranks waiting: it is cut.
    whole = sum(_cost(items, members) for members in groups.values())
    limit = min(budget, max(-(-whole // ranks), max((item.tokens for item in items), default=0)))
    pieces: list[tuple[int, list[int]]] = []
    for members in groups.values():
        piece: list[int] = []
        for index in sorted(members, key=lambda i: (-items[i].tokens, i)):
            if piece and _cost(items, [*piece, index]) > limit:
                pieces.append((_cost(items, piece), piece))
                piece = []
            piece.append(index)
        pieces.append((_cost(items, piece), piece))
    return sorted(pieces, key=lambda piece: (-piece[0], min(piece[1])))


def _cost(items: Sequence[Item], members: Sequence[int]) -> int:
    """Tokens of samples of one group, their prefix counted once."""
    return items[members[0]].prefix + sum(items[i].tokens - items[i].prefix for i in members)


def _first_fit(pieces: Sequence[tuple[int, list[int]]], budget: int) -> list[list[int]]:
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for cost, indices in pieces:
        place = next((p for p, free in enumerate(room) if cost <= free), len(room))
        if place == len(room):
            micro_batches.append([])
            room.append(budget)
        micro_batches[place] += indices
        room[place] -= cost
    return [sorted(micro_batch) for micro_batch in micro_batches]


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """The samples of one micro-batch, end to end, without a padding token.

    Attributes:
        input_ids: int64 [1, N]
        position_ids: int64 [1, N] counted from 0 in every sample.
        segments: (length, parent) of each stretch of tokens, in order; they sum to N. A stretch attends
            to itself, causally, and to all of its parent, the index of an earlier stretch or -1.
        logit_indices: int64 [M] where logits are needed: the token before each masked one.
        target_ids: int64 [M] the masked tokens.
        sampler_logprobs: float32 [M]
        advantages: float32 [M]
        weights: float32 [M] of each token in the loss.
        rows: int64 [M] the index in [0, S) of each masked token's sample.
        samples: S.
        unshared: tokens of the samples, each counted whole; N less what sharing saved.
        padding: True if nothing is to be learned here: the batch holds one logit of weight 0, only so
            that this rank takes part in the collectives of the others. Its tokens count nowhere.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    segments: tuple[tuple[int, int], ...]
    logit_indices: npt.NDArray[np.int64]
    target_ids: npt.NDArray[np.int64]
    sampler_logprobs: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    samples: int
    unshared: int
    padding: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are computed; 0 for padding."""
        return 0 if self.padding else int(self.input_ids.size)


def pack(samples: Sequence[Sample], groups: Sequence[Hashable] | None = None) -> PackedBatch:
    """Lay samples end to end; without a masked token, a padding batch.

    Args:
        samples: of one micro-batch.
        groups: for each sample, what it may share its first tokens with; None: nothing is shared.

    Raises:
        LearnerError: a sample's first token is masked (nothing predicts it), or what was captured at
            sampling time is not finite.

    Example:
        >>> s = Sample(np.array([5, 6, 7]), np.array([False, True, True]), np.array([0, -0.1, -0.2]),
        ...            np.array([0.0, 1.0, 1.0]), np.array([-1, 3, 3]), np.array([-1, 0, 0]))
        >>> b = pack([s, s])
        >>> b.position_ids.tolist(), b.logit_indices.tolist(), b.target_ids.tolist()
        ([[0, 1, 2, 0, 1, 2]], [0, 1, 3, 4], [6, 7, 6, 7])
        >>> b = pack([s, s], groups=[0, 0])
        >>> b.input_ids.tolist(), b.segments, b.logit_indices.tolist()
        ([[5, 6, 7, 6, 7]], ((1, -1), (2, 0), (2, 0)), [0, 1, 0, 3])
    """
    if not any(sample.loss_mask.any() for sample in samples):
        return _PADDING
    if any(len(sample) and sample.loss_mask[0] for sample in samples):
        raise LearnerError(
            "the first token of a sample is masked, but no logits predict it",
            mend="a prompt needs at least one token before the first sampled one",
        )
    keys = range(len(samples)) if groups is None else groups
    together: dict[Hashable, list[Sample]] = {}
    for key, sample in zip(keys, samples, strict=True):
        together.setdefault(key, []).append(sample)
    tree = _Tree()
    for members in together.values():
        tree.add(members)
    packed = tree.packed()
    for name in ("sampler_logprobs", "advantages"):
        if not np.isfinite(getattr(packed, name)).all():
            raise LearnerError(
                f"the {name.replace('_', ' ')} of these samples are not all finite",
                mend="find the rollout that made them: they are captured there, not computed here",
            )
    return packed


class _Tree:
    """The stretches of a packed batch while it grows."""

    def __init__(self) -> None:
        self._ids: list[npt.NDArray[np.int32]] = []
        self._positions: list[npt.NDArray[np.int64]] = []
        self._segments: list[tuple[int, int]] = []
        self._chosen: list[tuple[Sample, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        self._size = 0

    def add(self, members: Sequence[Sample]) -> None:
        """Append samples that begin alike: their prefix once, then the rest of each."""
        prefix = shared_prefix(members) if len(members) > 1 else 0
        start, parent = self._size, -1
        if prefix:
            parent = len(self._segments)
            self._append(members[0].token_ids[:prefix], 0, -1)
        for sample in members:
            own = self._size
            self._append(sample.token_ids[prefix:], prefix, parent)
            targets = np.flatnonzero(sample.loss_mask)
            before = targets - 1  # the token that predicts it; it may lie in the prefix
            where = np.where(before < prefix, start + before, own + before - prefix)
            self._chosen.append((sample, targets, where))

    def _append(self, ids: npt.NDArray[np.int32], position: int, parent: int) -> None:
        self._ids.append(ids)
        self._positions.append(np.arange(position, position + len(ids)))
        self._segments.append((len(ids), parent))
        self._size += len(ids)

    def packed(self) -> PackedBatch:
        """The batch."""
        counts = [len(targets) for _, targets, _ in self._chosen]

        def chosen(name: str) -> npt.NDArray[np.float32]:
            return np.concatenate([getattr(s, name)[t] for s, t, _ in self._chosen]).astype(np.float32)

        return PackedBatch(
            input_ids=np.concatenate(self._ids).astype(np.int64)[None],
            position_ids=np.concatenate(self._positions)[None],
            segments=tuple(self._segments),
            logit_indices=np.concatenate([where for *_, where in self._chosen]),
            target_ids=np.concatenate([s.token_ids[t] for s, t, _ in self._chosen]).astype(np.int64),
            sampler_logprobs=chosen("logprobs"),
            advantages=chosen("advantages"),
            weights=np.repeat(np.array([s.weight for s, *_ in self._chosen], np.float32), counts),
            rows=np.repeat(np.arange(len(counts)), counts),
            samples=len(counts),
            unshared=sum(len(s) for s, *_ in self._chosen),
        )


_PADDING = PackedBatch(
    input_ids=np.zeros((1, 1), dtype=np.int64),
    position_ids=np.zeros((1, 1), dtype=np.int64),
    segments=((1, -1),),
    logit_indices=np.zeros(1, dtype=np.int64),
    target_ids=np.zeros(1, dtype=np.int64),
    sampler_logprobs=np.zeros(1, dtype=np.float32),
    advantages=np.zeros(1, dtype=np.float32),
    weights=np.zeros(1, dtype=np.float32),
    rows=np.zeros(1, dtype=np.int64),
    samples=1,
    unshared=0,
    padding=True,
)
