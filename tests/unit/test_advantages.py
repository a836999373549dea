"""Advantages: hand values, and what must hold for any group."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.grpo.advantages import group_advantages, shuffled

_REWARDS = st.lists(st.none() | st.floats(-1e6, 1e6), max_size=12)


def test_mean_by_hand() -> None:
    assert group_advantages([3.0, 1.0, 2.0], "mean") == [1.0, -1.0, 0.0]


def test_std_divides_by_n_minus_one_and_adds_epsilon() -> None:
    # n = 2, rewards 0 and 1: the n - 1 form is 0.7071, the n form 0.5.
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert group_advantages([0.0, 1.0], "mean_std") == pytest.approx([-expected, expected], rel=1e-12)


def test_failed_members_stay_none_and_out_of_the_baseline() -> None:
    assert group_advantages([None, 4.0, None, 2.0], "mean") == [None, 1.0, None, -1.0]


@pytest.mark.parametrize("rewards", [[], [None, None], [1.0], [None, 7.0, None]])
def test_fewer_than_two_survivors_drop_the_group(rewards: list[float | None]) -> None:
    assert group_advantages(rewards, "mean_std") == [None] * len(rewards)


@pytest.mark.parametrize("kind", ["mean", "mean_std"])
def test_equal_rewards_give_exactly_zero(kind: str) -> None:
    # The mean of ten times 0.1 is not 0.1 in binary: a computed difference would not be 0.
    assert group_advantages([0.1] * 10 + [None], kind) == [0.0] * 10 + [None]  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages([1.0, bad], "mean")


@given(_REWARDS)
def test_advantages_of_survivors_sum_to_zero_and_keep_the_order(rewards: list[float | None]) -> None:
    advantages = group_advantages(rewards, "mean")
    pairs = [(r, a) for r, a in zip(rewards, advantages, strict=True) if r is not None and a is not None]
    if pairs:
        assert len(pairs) == sum(reward is not None for reward in rewards)
        assert abs(sum(a for _, a in pairs)) <= 1e-6 * max(1.0, max(abs(r) for r, _ in pairs))
        assert sorted(pairs) == sorted(pairs, key=lambda pair: (pair[1], pair[0]))


@given(_REWARDS, st.integers(0, 2**63))
def test_shuffling_moves_rewards_only(rewards: list[float | None], seed: int) -> None:
    out = shuffled(rewards, seed)
    assert [r is None for r in out] == [r is None for r in rewards]
    assert sorted(r for r in out if r is not None) == sorted(r for r in rewards if r is not None)
    assert out == shuffled(rewards, seed)


def test_shuffling_does_shuffle() -> None:
    rewards: list[float | None] = [float(i) for i in range(8)]
    assert len({tuple(shuffled(rewards, seed)) for seed in range(20)}) > 10
