"""Trajectories -> samples: what the learner needs of a conversation, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from stateset_ray.types import Sample, Trajectory, Turn

__all__ = ["laid_out", "samples", "shared_prefix"]


def samples(trajectory: Trajectory) -> list[Sample]:
    """One sample per run of turns whose prompts continue each other.

    A conversation is one sample unless its chat template rewrote history: each forked turn begins a new
    one, whose context (the rewritten history included) has mask 0, so that every sampled token is
    trained exactly once. All samples of a trajectory share its one advantage; they ship unit credit,
    to be `credited` when the whole group is known.

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
    whole, [lengths] = laid_out([trajectory])
    return list(whole.parts(lengths))


def laid_out(trajectories: Sequence[Trajectory]) -> tuple[Sample, list[list[int]]]:
    """The samples of many trajectories end to end in one, and their lengths, by trajectory.

    Arrays are made once for all of them; `Sample.parts` gives the samples.
    """
    runs = [
        [(first, run) for first, run in _runs(t.turns) if any(turn.token_ids for turn in run)]
        for t in trajectories
    ]
    lengths = [
        [sum([len(turn.context_ids) + len(turn.token_ids) for turn in run]) for _, run in of_one]
        for of_one in runs
    ]
    return _sample([run for of_one in runs for run in of_one]), lengths


def shared_prefix(rows: Sequence[Sample]) -> int:
    """How many tokens all rows begin with alike, none of them sampled: what a group computes only once.

    Example:
        >>> from stateset_ray.types import StopReason, Task
        >>> def row(*sampled):
        ...     turn = Turn((1, 2), sampled, (-0.5,) * len(sampled), policy_version=4)
        ...     return samples(Trajectory("a", Task("t", 0), 0, (), (turn,), StopReason.COMPLETED))[0]
        >>> shared_prefix([row(3, 4), row(3, 5, 6)])
        2
    """
    if not rows:
        return 0
    length = min(int(row.loss_mask.argmax()) if row.loss_mask.any() else len(row) for row in rows)
    first = rows[0].token_ids
    for row in rows[1:]:
        differs = np.flatnonzero(first[:length] != row.token_ids[:length])
        length = int(differs[0]) if len(differs) else length
    return length


def _runs(turns: Sequence[Turn]) -> Iterator[tuple[int, list[Turn]]]:
    """Runs of turns that continue each other, each with the index of its first turn."""
    first, run = 0, list[Turn]()
    for index, turn in enumerate(turns):
        if turn.forked and run:
            yield first, run
            first, run = index, []
        run.append(turn)
    if run:
        yield first, run


def _sample(runs: Sequence[tuple[int, Sequence[Turn]]]) -> Sample:
    turns = [turn for _, run in runs for turn in run]
    ids = [(*turn.context_ids, *turn.token_ids) for turn in turns]
    # Segments alternate: context, sampled, context, sampled, ...
    sizes = np.array([len(s) for turn in turns for s in (turn.context_ids, turn.token_ids)], np.int64)
    versions = [version for turn in turns for version in (-1, turn.policy_version)]
    indices = [i for first, run in runs for k in range(len(run)) for i in (-1, first + k)]
    mask = np.repeat(np.tile([False, True], len(turns)), sizes)
    logprobs = np.zeros(len(mask), dtype=np.float32)
    logprobs[mask] = np.fromiter(chain.from_iterable([turn.logprobs for turn in turns]), dtype=np.float32)
    return Sample(
        token_ids=np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=len(mask)),
        loss_mask=mask,
        logprobs=logprobs,
        advantages=mask.astype(np.float32),
        versions=np.repeat(np.array(versions, np.int32), sizes),
        turns=np.repeat(np.array(indices, np.int32), sizes),
    )
