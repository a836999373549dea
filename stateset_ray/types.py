"""The nouns of the system: frozen records that travel between its parts.

Read top to bottom: messages are what people and environments say, turns and trajectories are what the
policy really sampled, samples are what the learner learns from.

Shapes are written with these letters: T tokens of one sample, K sampled tokens of one turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from operator import attrgetter
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from stateset_ray.plain import plain

__all__ = [
    "Message",
    "Role",
    "Sample",
    "Split",
    "Step",
    "StopReason",
    "Task",
    "ToolCall",
    "Trajectory",
    "TrajectoryGroup",
    "Turn",
    "derive_seed",
]

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "heldout"]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, and on nothing else.

    All randomness of a rollout is derived this way from (run seed, step, task, sample, turn), so that
    a conversation does not depend on which worker plays it or what else is played beside it.

    Example:
        >>> derive_seed(0, "train-7", 3) == derive_seed(0, "train-7", 3)
        True
    """
    text = "\x1f".join([f"{type(part).__name__}:{part}" for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class _Record:
    """Pickled as a call with its fields in order, several times as quick as by their names."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), _values(self.__match_args__)(self)


@cache
def _values(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    return attrgetter(*names)


@dataclass(frozen=True, slots=True)
class ToolCall(_Record):
    """One call of a tool, as parsed from a reply: `ToolCall("lookup", {"order": "48213"})`."""

    name: str
    arguments: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message(_Record):
    """One utterance of a conversation: `Message("user", "Where is my parcel?")`."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Task(_Record):
    """What an environment is asked to play; everything random about it follows from `seed`.

    Example:
        >>> Task(id="heldout-3", seed=7, split="heldout", data={"intent": "refund"}).split
        'heldout'
    """

    id: str
    seed: int
    split: Split = "train"
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step(_Record):
    """What an environment answers to `reset` and `step`.

    `terminated` says that the environment finished the conversation, `truncated` that it gave up
    (out of patience, out of time). `reward` is what the last reply earned; `reset` earns nothing.
    `rewards` are named parts of it, for objectives that normalize each apart (`grpo.reward_weights`);
    what is reported and evaluated is `reward`.

    Example:
        >>> Step((Message("user", "Say: cab"),)).reward
        0.0
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)


class StopReason(StrEnum):
    """Why a conversation ended. The first block are ends, the second limits, the third failures."""

    COMPLETED = "completed"
    """The environment terminated it."""

    ENVIRONMENT_LIMIT = "environment_limit"
    """The environment truncated it."""
    MAX_TURNS = "max_turns"
    """`rollout.max_turns` replies were given."""
    TURN_TOKENS = "turn_tokens"
    """A reply was cut at `rollout.max_turn_tokens`."""
    SAMPLED_TOKENS = "sampled_tokens"
    """The conversation used up `rollout.max_sampled_tokens`."""
    CONTEXT = "context"
    """The next prompt would not leave room in `rollout.max_context`."""

    TIMEOUT = "timeout"
    """The conversation or one turn of it passed its wall-clock limit."""
    ENVIRONMENT_ERROR = "environment_error"
    """The environment raised, hung or returned garbage."""
    REWARD_ERROR = "reward_error"
    """A reward was not a finite number."""
    INFRASTRUCTURE_ERROR = "infrastructure_error"
    """The policy or the machine failed; the conversation is retried elsewhere, up to a cap."""

    @property
    def failed(self) -> bool:
        """True if the conversation has no reward: it is excluded from baseline and gradient."""
        return self in _FAILURES

    @property
    def truncated(self) -> bool:
        """True if a limit ended the conversation."""
        return not self.failed and self is not StopReason.COMPLETED


_FAILURES = frozenset(
    {
        StopReason.TIMEOUT,
        StopReason.ENVIRONMENT_ERROR,
        StopReason.REWARD_ERROR,
        StopReason.INFRASTRUCTURE_ERROR,
    }
)


@dataclass(frozen=True, slots=True)
class Turn(_Record):
    """One policy reply, token by token, as it was sampled; nothing here is ever re-tokenized.

    Attributes:
        context_ids: prompt tokens that the previous turn did not hold. For the first turn, and for a
            turn that forks, this is the whole prompt.
        token_ids: [K] the sampled tokens, the stop token included if it was sampled.
        logprobs: [K] natural log-probabilities under the distribution that was sampled from
            (temperature applied).
        policy_version: the version of the weights that sampled all of `token_ids`.
        reward: what the environment gave for this reply.
        rewards: named parts of it, if the environment names any.
        forked: True where the chat template rewrote history, so that the prompt does not continue the
            previous turn.

    Example:
        >>> Turn((1, 2), (3, 4), (-0.5, -0.1), policy_version=0, reward=1.0).token_ids
        (3, 4)
    """

    context_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int
    reward: float = 0.0
    forked: bool = False
    rewards: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"a turn needs one log-probability per sampled token, "
                f"not {len(self.logprobs)} for {len(self.token_ids)}"
            )


@dataclass(frozen=True, slots=True)
class Trajectory(_Record):
    """One conversation: what was said, what was sampled, what it earned, why it ended.

    Attributes:
        id: `run/step/task/sample/attempt`, unique within a run.
        sample: index within its group.
        messages: everything said, in order, the opening included.
        turns: the policy's replies.
        info: facts of the environment's last step, for logs and metrics.
        error: what failed, when `stop_reason.failed`.
        seconds: wall-clock duration.

    Example:
        >>> turn = Turn((1,), (2,), (-0.1,), policy_version=0, reward=0.5)
        >>> t = Trajectory("r/0/train-0/0/0", Task("train-0", 0), 0, (), (turn,), StopReason.COMPLETED)
        >>> t.reward, Trajectory.from_json(t.to_json()) == t
        (0.5, True)
    """

    id: str
    task: Task
    sample: int
    messages: tuple[Message, ...]
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    info: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    @property
    def reward(self) -> float | None:
        """The sum of the turn rewards, or None where the conversation failed and has none."""
        return None if self.stop_reason.failed else sum(turn.reward for turn in self.turns)

    @property
    def sampled_tokens(self) -> int:
        """How many tokens the policy sampled."""
        return sum(len(turn.token_ids) for turn in self.turns)

    def prompts(self) -> Iterator[tuple[int, ...]]:
        """The full prompt of each turn, in order, as the policy saw it."""
        seen: tuple[int, ...] = ()
        for turn in self.turns:
            prompt = turn.context_ids if turn.forked else seen + turn.context_ids
            yield prompt
            seen = prompt + turn.token_ids

    def to_json(self) -> str:
        """This trajectory as one line of JSON, without loss but for what JSON cannot hold (`plain`)."""
        try:
            return _trajectory_adapter().dump_json(self).decode()
        except ValueError:  # in what an environment brought: a task's data, info
            return json.dumps(plain(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Trajectory:
        """The trajectory that `to_json` wrote; raises `pydantic.ValidationError` on anything else."""
        return _trajectory_adapter().validate_json(text)


@cache
def _trajectory_adapter() -> TypeAdapter[Trajectory]:
    return TypeAdapter(Trajectory)


@dataclass(frozen=True, slots=True)
class TrajectoryGroup(_Record):
    """The trajectories of one task: the unit over which the baseline is taken.

    Example:
        >>> TrajectoryGroup(Task("train-0", 0), ()).rewards
        ()
    """

    task: Task
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """One reward per trajectory; None where it failed."""
        return tuple(trajectory.reward for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True, eq=False)
class Sample(_Record):
    """One row for the learner: token ids and what it needs to learn from them, and no conversation.

    Attributes:
        token_ids: int32 [T] prompt and sampled tokens in the order the policy saw them.
        loss_mask: bool [T] True exactly on tokens that this policy sampled in this rollout.
        logprobs: float32 [T] log-probability at sampling time; 0 where the mask is False.
        advantages: float32 [T] credit per token; rollouts ship 1 on the mask, and `credited` puts the
            advantages there when the whole batch is known. 0 where the mask is False.
        versions: int32 [T] policy version per token; -1 where the mask is False.
        turns: int32 [T] index of the token's turn in its trajectory; -1 where the mask is False.
        weight: of each of its tokens in the loss, beside those of the other samples.

    Example:
        >>> s = Sample(np.array([5, 6]), np.array([False, True]), np.array([0.0, -0.1]),
        ...            np.array([0.0, 1.0]), np.array([-1, 3]), np.array([-1, 0]))
        >>> s.credited([2.0]).advantages.tolist()
        [0.0, 2.0]
    """

    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    turns: npt.NDArray[np.int32]
    weight: float = 1.0

    def __post_init__(self) -> None:
        lengths = {
            len(self.token_ids), len(self.loss_mask), len(self.logprobs),
            len(self.advantages), len(self.versions), len(self.turns),
        }  # fmt: skip
        if len(lengths) != 1:
            raise ValueError(f"the arrays of a sample must have one length, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.token_ids)

    def parts(self, lengths: Sequence[int]) -> Iterator[Sample]:
        """The samples of these lengths that lie end to end in this one; their arrays are views."""
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            yield Sample(
                self.token_ids[here], self.loss_mask[here], self.logprobs[here], self.advantages[here],
                self.versions[here], self.turns[here], self.weight,
            )  # fmt: skip
            start += length

    def credited(self, advantages: Sequence[float], weight: float = 1.0) -> Sample:
        """This sample with the advantage of each token's turn, and its weight in the loss.

        Args:
            advantages: one per turn of the trajectory.
        """
        per_turn = np.asarray([*advantages, 0.0], np.float32)  # the last one for turn -1: no turn
        return replace(self, advantages=per_turn[self.turns], weight=weight)
