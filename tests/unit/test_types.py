"""The nouns: lossless JSON, derived seeds, what a trajectory says of itself."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.errors import ConfigError, StatesetError
from stateset_ray.types import (
    Message,
    Sample,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    Turn,
    derive_seed,
)  # fmt: skip

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def turns(draw):
    ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=6))
    logprobs = draw(st.lists(float32, min_size=len(ids), max_size=len(ids)))
    context = draw(st.lists(st.integers(0, 200_000), max_size=6))
    return Turn(
        tuple(context),
        tuple(ids),
        tuple(logprobs),
        draw(st.integers(0, 9)),
        draw(float32),
        draw(st.booleans()),
    )


messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.text(),
    st.lists(
        st.builds(ToolCall, st.text(), st.dictionaries(st.text(), st.text(), max_size=2)), max_size=2
    ).map(tuple),
)
trajectories = st.builds(
    Trajectory,
    st.text(),
    st.builds(Task, st.text(), st.integers(0, 2**63), st.sampled_from(["train", "heldout"]),
              st.dictionaries(st.text(), json_values, max_size=3)),
    st.integers(0, 63),
    st.lists(messages, max_size=4).map(tuple),
    st.lists(turns(), max_size=3).map(tuple),
    st.sampled_from(StopReason),
    st.dictionaries(st.text(), json_values, max_size=3),
    st.none() | st.text(),
    st.floats(0, 1e6),
)  # fmt: skip


@given(trajectories)
def test_a_trajectory_survives_json_without_loss(trajectory):
    again = Trajectory.from_json(trajectory.to_json())
    assert again == trajectory
    assert all(
        np.array_equal(np.float32(a.logprobs), np.float32(b.logprobs))
        for a, b in zip(again.turns, trajectory.turns, strict=True)
    )


def test_what_json_cannot_hold_is_written_all_the_same():
    data = {"at": {1, 2}, "raw": b"\xff", "text": "\ud83d", "odd": object, 3: None}
    info = {"score": np.float32(0.5), "seen": np.arange(2), "worst": [float("nan")]}
    odd = Trajectory("r", Task("t", 0, data=data), 0, (Message("user", "é"),), (), StopReason.COMPLETED, info)
    again = Trajectory.from_json(odd.to_json())
    assert again.info == {"score": 0.5, "seen": [0, 1], "worst": [None]}
    assert again.task.data == {
        "at": [1, 2], "raw": "b'\\xff'", "text": "?", "odd": "<class 'object'>", "3": None
    }  # fmt: skip
    assert dataclasses.replace(again, info=info, task=odd.task) == odd


@given(trajectories)
def test_turn_rewards_sum_to_the_reward_and_failures_have_none(trajectory):
    if trajectory.stop_reason.failed:
        assert trajectory.reward is None
        assert not trajectory.stop_reason.truncated
    else:
        assert trajectory.reward == sum(turn.reward for turn in trajectory.turns)


def test_prompts_continue_unless_the_turn_forks():
    plain = Turn((1, 2), (3,), (0.0,), 0)
    after = Turn((4,), (5, 6), (0.0, 0.0), 0)
    fork = Turn((9, 9, 9), (7,), (0.0,), 0, forked=True)
    trajectory = Trajectory("x", Task("t", 0), 0, (), (plain, after, fork), StopReason.COMPLETED)
    assert list(trajectory.prompts()) == [(1, 2), (1, 2, 3, 4), (9, 9, 9)]
    assert trajectory.sampled_tokens == 4


def test_a_group_reports_one_reward_per_trajectory():
    def one(reason):
        return Trajectory("x", Task("t", 0), 0, (), (Turn((1,), (2,), (0.0,), 0, 0.25),), reason)

    group = TrajectoryGroup(Task("t", 0), (one(StopReason.COMPLETED), one(StopReason.TIMEOUT)))
    assert group.rewards == (0.25, None)


def test_lengths_that_disagree_are_refused():
    with pytest.raises(ValueError, match="one log-probability per sampled token"):
        Turn((1,), (2, 3), (0.0,), 0)
    with pytest.raises(ValueError, match="one length"):
        Sample(np.zeros(2), np.zeros(2, bool), np.zeros(1), np.zeros(2), np.zeros(2), np.zeros(2))


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Task("t", 0).seed = 1


def test_derived_seeds_depend_on_every_part_and_its_type():
    seeds = {derive_seed(*parts) for parts in [(1, 2), (12,), ("1", 2), (2, 1), (1, 2, 0), ("1\x1f2",)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_errors_survive_pickling_and_say_what_to_do():
    error = pickle.loads(pickle.dumps(ConfigError("wrong", given=3, mend="write 4")))
    assert isinstance(error, StatesetError)
    assert str(error) == "wrong\n  given: 3\n  to mend: write 4"
