"""Who computes what: samples -> ranks -> micro-batches, and samples -> one ragged row.

The controller plans from lengths alone and never touches a token; each rank packs its own samples.

Letters: N tokens of a micro-batch, end to end; M masked (sampled) tokens among them.

The denominator of a step is the number of masked tokens of ALL its trajectories, also of those that are
left out of the plan because their advantage is 0: leaving them out saves their forward pass and changes
no gradient. (With a KL to a reference, a row of advantage 0 still has a gradient and must stay.)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stateset_ray.errors import LearnerError
from stateset_ray.types import Sample

__all__ = ["PackedBatch", "pack", "plan"]


def plan(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Divide samples among ranks and micro-batches, the same way every time.

    Ranks are balanced by tokens (longest sample first, to the rank with the fewest tokens); on a rank,
    a micro-batch takes samples while they fit in the budget (first fit, longest first). Every rank gets
    the same number of micro-batches, because ZeRO's forward and backward are collective: where a rank has
    fewer, its list ends in empty ones, for which it runs a padding pass of weight 0.

    Args:
        lengths: tokens of each sample.
        ranks: how many ranks there are.
        budget: tokens that one micro-batch may hold.

    Returns:
        `[rank][micro_batch]` -> indices of samples, ascending. No micro-batches at all without samples.

    Raises:
        LearnerError: a sample alone exceeds the budget.

    Example:
        >>> plan([5, 3, 4, 2], ranks=2, budget=6)
        [[[0], [3]], [[2], [1]]]
    """
    if lengths and max(lengths) > budget:
        raise LearnerError(
            f"a sample of {max(lengths)} tokens does not fit into a micro-batch of {budget}",
            given=max(lengths),
            mend="raise learner.micro_batch_tokens, or lower rollout.max_context",
        )
    loads = [(0, rank) for rank in range(ranks)]
    of_rank: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, rank = heapq.heappop(loads)
        of_rank[rank].append(index)
        heapq.heappush(loads, (tokens + lengths[index], rank))
    filled = [_first_fit(indices, lengths, budget) for indices in of_rank]
    passes = max(len(micro_batches) for micro_batches in filled)
    return [micro_batches + [[] for _ in range(passes - len(micro_batches))] for micro_batches in filled]


def _first_fit(indices: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for index in indices:
        place = next((p for p, free in enumerate(room) if lengths[index] <= free), len(room))
        if place == len(room):
            micro_batches.append([])
            room.append(budget)
        micro_batches[place].append(index)
        room[place] -= lengths[index]
    return [sorted(micro_batch) for micro_batch in micro_batches]


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """The samples of one micro-batch, end to end, without a padding token.

    Attributes:
        input_ids: int64 [1, N]
        position_ids: int64 [1, N] counted from 0 in every sample.
        lengths: tokens per sample; they sum to N.
        logit_indices: int64 [M] where logits are needed: t - 1 for every masked token t.
        target_ids: int64 [M] the masked tokens.
        sampler_logprobs: float32 [M]
        advantages: float32 [M]
        padding: True if nothing is to be learned here: the batch holds one logit of weight 0, only so
            that this rank takes part in the collectives of the others. Its tokens count nowhere.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    lengths: tuple[int, ...]
    logit_indices: npt.NDArray[np.int64]
    target_ids: npt.NDArray[np.int64]
    sampler_logprobs: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float32]
    padding: bool

    @property
    def tokens(self) -> int:
        """Tokens of the samples; 0 for padding."""
        return 0 if self.padding else int(self.input_ids.size)


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Lay samples end to end; without a masked token, a padding batch.

    Raises:
        LearnerError: a sample's first token is masked (nothing predicts it), or what was captured at
            sampling time is not finite.

    Example:
        >>> s = Sample(np.array([5, 6, 7]), np.array([False, True, True]), np.array([0, -0.1, -0.2]),
        ...            np.array([0.0, 1.0, 1.0]), np.array([-1, 3, 3]))
        >>> b = pack([s, s])
        >>> b.position_ids.tolist(), b.logit_indices.tolist(), b.target_ids.tolist()
        ([[0, 1, 2, 0, 1, 2]], [0, 1, 3, 4], [6, 7, 6, 7])
    """
    if not any(sample.loss_mask.any() for sample in samples):
        return _PADDING
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    ids_N = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    targets_M = np.flatnonzero(np.concatenate([sample.loss_mask for sample in samples]))
    if np.isin(starts, targets_M).any():
        raise LearnerError(
            "the first token of a sample is masked, but no logits predict it",
            mend="a prompt needs at least one token before the first sampled one",
        )
    packed = PackedBatch(
        input_ids=ids_N[None],
        position_ids=(np.arange(len(ids_N)) - np.repeat(starts, lengths))[None],
        lengths=tuple(int(length) for length in lengths),
        logit_indices=targets_M - 1,
        target_ids=ids_N[targets_M],
        sampler_logprobs=_chosen([sample.logprobs for sample in samples], targets_M),
        advantages=_chosen([sample.advantages for sample in samples], targets_M),
        padding=False,
    )
    for name in ("sampler_logprobs", "advantages"):
        if not np.isfinite(getattr(packed, name)).all():
            raise LearnerError(
                f"the {name.replace('_', ' ')} of these samples are not all finite",
                mend="find the rollout that made them: they are captured there, not computed here",
            )
    return packed


def _chosen(
    arrays: Sequence[npt.NDArray[np.float32]], targets_M: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    return np.concatenate(arrays)[targets_M].astype(np.float32)


_PADDING = PackedBatch(
    input_ids=np.zeros((1, 1), dtype=np.int64),
    position_ids=np.zeros((1, 1), dtype=np.int64),
    lengths=(1,),
    logit_indices=np.zeros(1, dtype=np.int64),
    target_ids=np.zeros(1, dtype=np.int64),
    sampler_logprobs=np.zeros(1, dtype=np.float32),
    advantages=np.zeros(1, dtype=np.float32),
    padding=True,
)
