"""What travels between the controller and the rollout workers: jobs out, reports back.

Reports are metadata. The trajectories themselves stay in the object store, and only their references
pass through the controller.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from ray import cloudpickle

from stateset_ray.grpo.advantages import Rewards
from stateset_ray.grpo.samples import laid_out, shared_prefix
from stateset_ray.types import Sample, StopReason, Task, Trajectory, TrajectoryGroup

__all__ = ["Counts", "GroupJob", "GroupPayload", "GroupReport", "SampleSize", "distinct", "report_on"]


@dataclass(frozen=True, slots=True)
class GroupJob:
    """One task to be played `size` times.

    Attributes:
        id: `run/step/task`.
        seed: of the whole group.
        attempt: how often it was dispatched before.
        temperature: of the replies.
        expert: played by the environment's scripted expert instead of the policy.
    """

    id: str
    task: Task
    seed: int
    size: int
    temperature: float
    attempt: int = 0
    expert: bool = False

    def again(self) -> GroupJob:
        """The same job, one attempt later."""
        return replace(self, attempt=self.attempt + 1)


def distinct(prefix: str, task: Task, index: int, taken: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """The name of a task that is none of those taken, and what the seed of its job is derived from.

    An environment with few tasks, or with one, gives the same one again: its index then tells them apart.
    """
    name, parts = f"{prefix}{task.id}", (task.id,)
    if name not in taken:
        return name, parts
    while name in taken:  # more than once where a task is called as another one was numbered
        name += f"#{index}"
    return name, (*parts, str(index))


class GroupPayload:
    """What stays in the object store of a group: its conversations, and the learner's rows of them.

    The rows travel as one sample that is cut where they lie, and the conversations as bytes that are opened
    for who asks for them only, which a learner never does.

    Args:
        group: the conversations, or those pickled.
        whole: all rows end to end.
        lengths: of the rows, by trajectory; see `grpo.samples.laid_out`.

    Attributes:
        samples: `samples[i]` are the rows of `group.trajectories[i]`.
    """

    def __init__(self, group: TrajectoryGroup | bytes, whole: Sample, lengths: list[list[int]]) -> None:
        self._group, self._whole, self._lengths = group, whole, lengths
        parts = whole.parts([length for of_one in lengths for length in of_one])
        self.samples = tuple([tuple(islice(parts, len(of_one))) for of_one in lengths])

    @property
    def group(self) -> TrajectoryGroup:
        """The conversations."""
        if isinstance(self._group, bytes):
            opened: TrajectoryGroup = pickle.loads(self._group)
            self._group = opened
        return self._group

    def __reduce__(self) -> tuple[Any, ...]:
        group = self._group if isinstance(self._group, bytes) else _pickled(self._group)
        return GroupPayload, (group, self._whole, self._lengths)


def _pickled(group: TrajectoryGroup) -> bytes:
    try:
        return pickle.dumps(group, protocol=5)
    except Exception:  # an environment's facts may be of a class that nobody can import
        return cloudpickle.dumps(group, protocol=5)


@dataclass(frozen=True, slots=True)
class SampleSize:
    """Where a sample lies in its payload, and how long it is.

    Attributes:
        trajectory: index of its trajectory in the group.
        row: index among that trajectory's samples.
        tokens: length.
        masked: tokens that the policy sampled.
    """

    trajectory: int
    row: int
    tokens: int
    masked: int


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What the controller learns of a finished group.

    Attributes:
        rewards: per trajectory; None where it failed.
        stop_reasons: per trajectory.
        errors: messages of those that failed.
        sizes: of every sample.
        turns: replies per trajectory.
        sampled: sampled tokens per trajectory.
        infos: the environment's facts per trajectory.
        turn_rewards: per trajectory, what each of its turns earned; None where it failed.
        prefix: tokens that all samples of the group begin with alike, none of them sampled.
        oldest: per trajectory, the oldest version of the policy among its turns; None without a turn.
    """

    job: GroupJob
    rewards: tuple[float | None, ...]
    stop_reasons: tuple[str, ...]
    errors: tuple[str, ...]
    sizes: tuple[SampleSize, ...]
    turns: tuple[int, ...]
    sampled: tuple[int, ...]
    infos: tuple[dict[str, Any], ...]
    turn_rewards: tuple[Rewards | None, ...] = ()
    prefix: int = 0
    oldest: tuple[int | None, ...] = ()

    @property
    def truncated(self) -> tuple[bool, ...]:
        """Per trajectory, whether a limit ended it."""
        return tuple(StopReason(reason).truncated for reason in self.stop_reasons)


def report_on(job: GroupJob, group: TrajectoryGroup) -> tuple[GroupReport, GroupPayload]:
    """The report of a group, and the payload that its sizes point into."""
    played = group.trajectories
    payload = GroupPayload(group, *laid_out(played))
    rows = payload.samples
    sizes = tuple(
        SampleSize(i, k, len(row), int(np.count_nonzero(row.loss_mask)))
        for i, of_one in enumerate(rows)
        for k, row in enumerate(of_one)
    )
    report = GroupReport(
        job, group.rewards, tuple(t.stop_reason.value for t in played),
        tuple(t.error for t in played if t.error), sizes,
        tuple(len(t.turns) for t in played), tuple(t.sampled_tokens for t in played),
        tuple(dict(t.info) for t in played), tuple(_turn_rewards(t) for t in played),
        shared_prefix([row for of_one in rows for row in of_one]),
        tuple(min((turn.policy_version for turn in t.turns), default=None) for t in played),
    )  # fmt: skip
    return report, payload


def _turn_rewards(trajectory: Trajectory) -> Rewards | None:
    """What each turn earned, as a whole and under each name; a name that a turn lacks earned 0 there."""
    if trajectory.stop_reason.failed:
        return None
    names = sorted({name for turn in trajectory.turns for name in turn.rewards})
    whole = {"": tuple(turn.reward for turn in trajectory.turns)}
    return whole | {n: tuple(turn.rewards.get(n, 0.0) for turn in trajectory.turns) for n in names}


@dataclass
class Counts:
    """The account of trajectories: every dispatched one ends exactly once.

    Attributes:
        dispatched: trajectories sent to a worker, each attempt counted.
        trained: those that gave gradient.
        filtered: finished, but without gradient (all rewards of the group equal).
        dropped: reason -> finished badly, excluded from baseline and gradient.
        aborted: reason -> unfinished attempts, dispatched again or given up.
    """

    dispatched: int = 0
    trained: int = 0
    filtered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)

    @property
    def balanced(self) -> bool:
        """Whether every dispatched trajectory is accounted for."""
        ended = self.trained + self.filtered + self.dropped.total() + self.aborted.total()
        return self.dispatched == ended

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, for metrics."""
        return {
            "dispatched": self.dispatched,
            "trained": self.trained,
            "filtered": self.filtered,
            "dropped": dict(self.dropped),
            "aborted": dict(self.aborted),
        }
