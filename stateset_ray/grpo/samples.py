"""Trajectories -> samples: what the learner needs of a conversation, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from stateset_ray.types import Sample, Trajectory, Turn

__all__ = ["samples"]


def samples(trajectory: Trajectory) -> list[Sample]:
    """One sample per run of turns whose prompts continue each other.

    A conversation is one sample unless its chat template rewrote history: each forked turn begins a new
    one, whose context (the rewritten history included) has mask 0, so that every sampled token is
    trained exactly once. All samples of a trajectory share its one advantage; they ship unit credit,
    to be `scaled` when the whole group is known.

    Returns:
        Samples in the order of the turns, without those in which nothing was sampled; [] for a
        trajectory without turns.

    Example:
        >>> from stateset_ray.types import StopReason, Task
        >>> turn = Turn((1, 2), (3,), (-0.5,), policy_version=4)
        >>> [s] = samples(Trajectory("a", Task("t", 0), 0, (), (turn,), StopReason.COMPLETED))
        >>> s.token_ids.tolist(), s.loss_mask.tolist(), s.versions.tolist()
        ([1, 2, 3], [False, False, True], [-1, -1, 4])
    """
    return [_sample(run) for run in _runs(trajectory.turns) if any(turn.token_ids for turn in run)]


def _runs(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    run: list[Turn] = []
    for turn in turns:
        if turn.forked and run:
            yield run
            run = []
        run.append(turn)
    if run:
        yield run


def _sample(run: Sequence[Turn]) -> Sample:
    ids = [(*turn.context_ids, *turn.token_ids) for turn in run]
    # Segments alternate: context, sampled, context, sampled, ...
    sizes = np.fromiter(
        chain.from_iterable((len(turn.context_ids), len(turn.token_ids)) for turn in run), dtype=np.int64
    )
    mask = np.repeat(np.tile([False, True], len(run)), sizes)
    versions = np.repeat(
        np.fromiter(chain.from_iterable((-1, turn.policy_version) for turn in run), dtype=np.int32), sizes
    )
    logprobs = np.zeros(len(mask), dtype=np.float32)
    logprobs[mask] = np.fromiter(chain.from_iterable(turn.logprobs for turn in run), dtype=np.float32)
    return Sample(
        token_ids=np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=len(mask)),
        loss_mask=mask,
        logprobs=logprobs,
        advantages=mask.astype(np.float32),
        versions=versions,
    )
