"""Limits and overlong replies: what is taken from a conversation's reward, and where it is booked."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.grpo.shaping import overlong_penalty, shaped
from stateset_ray.objective import ObjectiveConfig


@pytest.mark.parametrize(
    ("sampled", "penalty"),
    # DAPO's equation 13 with a limit of 100 and a cache of 20: nothing up to 80, 1 at 100, a line between.
    [(0, 0.0), (79, 0.0), (80, 0.0), (85, 0.25), (90, 0.5), (99, 0.95), (100, 1.0), (120, 1.0)],
)
def test_overlong_penalty_by_hand(sampled: int, penalty: float) -> None:
    ours = overlong_penalty(sampled, 100, ObjectiveConfig(overlong_share=0.2))
    assert ours == pytest.approx(penalty, abs=1e-12)
    assert overlong_penalty(
        sampled, 100, ObjectiveConfig(overlong_share=0.2, overlong_penalty=3.0)
    ) == pytest.approx(3 * penalty, abs=1e-12)


def test_without_a_share_there_is_no_penalty() -> None:
    assert overlong_penalty(100, 100, ObjectiveConfig()) == 0.0


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 900), st.floats(0.01, 0.99))
def test_more_tokens_are_never_cheaper(a: int, b: int, limit: int, share: float) -> None:
    objective = ObjectiveConfig(overlong_share=share)
    low, high = (overlong_penalty(sampled, limit, objective) for sampled in sorted((a, b)))
    assert 0 <= low <= high <= 1


def _shaped(rewards: list[float], cut: bool, sampled: int = 10, **parts: object) -> list[float]:
    objective = ObjectiveConfig(**parts)  # type: ignore[arg-type]
    penalty = overlong_penalty(sampled, 100, objective)
    return shaped(rewards, truncated=cut, penalty=penalty, objective=objective)


def test_a_truncated_conversation_keeps_its_reward_by_default() -> None:
    assert _shaped([1.0, 0.5], cut=True) == [1.0, 0.5]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("rewards", [[2.0, -0.5], [-1.0, 0.25], [0.0], [], [0.1, 0.2, 0.3]])
def test_clamp_takes_what_is_above_zero_from_a_truncated_one(rewards: list[float], cut: bool) -> None:
    ours = _shaped(rewards, cut, truncated="clamp")
    total = math.fsum(rewards)
    assert math.fsum(ours) == pytest.approx(min(total, 0.0) if cut else total, abs=1e-12)
    # On the last turn: what earlier turns earned they keep.
    assert ours[:-1] == rewards[:-1]


def test_the_penalty_is_booked_on_the_last_turn_after_the_clamp() -> None:
    parts = {"truncated": "clamp", "overlong_share": 0.2, "overlong_penalty": 0.4}
    ours = _shaped([1.0, 1.0], cut=True, sampled=100, **parts)
    assert ours == pytest.approx([1.0, -1.4])


def test_nothing_changes_where_nothing_is_charged() -> None:
    rewards = [0.1, 0.2, 0.30000000000000004]
    assert _shaped(rewards, cut=False) == rewards
    assert _shaped([], cut=True, overlong_share=0.5) == []
