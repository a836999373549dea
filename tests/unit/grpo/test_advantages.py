"""Advantages: hand values, others' formulas, and what must hold for any step."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.grpo.advantages import STD_EPSILON, step_advantages
from stateset_ray.objective import AdvantageKind, ObjectiveConfig

KINDS = get_args(AdvantageKind)
PER_GROUP = [kind for kind in KINDS if kind in ("mean", "mean_std", "rloo", "max_rl")]
"""Kinds in which a group knows nothing of the others."""

Groups = Sequence[Sequence[float | None]]


def advantages(groups: Groups, kind: str, **parts: Any) -> list[list[float | None]]:
    """One number per trajectory, for rewards of one turn each."""
    objective = ObjectiveConfig(advantage=kind, **parts)  # type: ignore[arg-type]
    result = step_advantages(
        [[None if r is None else {"": [r]} for r in group] for group in groups], objective
    )
    return [[None if a is None else a[0] for a in group] for group in result]


_STD_01 = 0.5 / (math.sqrt(0.5) + 1e-4)
_STD_BATCH = math.sqrt((2 * 0.75**2 + 2 * 0.25**2) / 3)  # of what two groups below leave: -.75 .75 -.25 .25


@pytest.mark.parametrize(
    ("kind", "groups", "expected"),
    [
        ("mean", [[3.0, 1.0, 2.0]], [[1.0, -1.0, 0.0]]),
        # n = 2, rewards 0 and 1: the n - 1 form of the deviation is 0.7071, the n form would be 0.5.
        ("mean_std", [[0.0, 1.0]], [[-_STD_01, _STD_01]]),
        ("mean_std", [[0.0, 1.0], [5.0, 5.0]], [[-_STD_01, _STD_01], [0.0, 0.0]]),
        ("rloo", [[3.0, 1.0, 2.0]], [[1.5, -1.5, 0.0]]),
        ("rloo", [[0.0, 1.0]], [[-1.0, 1.0]]),
        # Rewards 0, 2 and 1, 1: the batch has mean 1 and the sum of squares 2 over 3.
        (
            "batch_std",
            [[0.0, 2.0], [1.0, 1.0]],
            [[-1 / (math.sqrt(2 / 3) + 1e-4), 1 / (math.sqrt(2 / 3) + 1e-4)], [0.0, 0.0]],
        ),
        # The group's own mean plays no part: (0 - 1.5) and so on, by the batch's deviation sqrt(5 / 3).
        (
            "reinforce_pp",
            [[0.0, 1.0], [2.0, 3.0]],
            [
                [-1.5 / (math.sqrt(5 / 3) + 1e-4), -0.5 / (math.sqrt(5 / 3) + 1e-4)],
                [0.5 / (math.sqrt(5 / 3) + 1e-4), 1.5 / (math.sqrt(5 / 3) + 1e-4)],
            ],
        ),
        # The groups' means go first; then the deviation of what they leave.
        (
            "reinforce_pp_baseline",
            [[0.0, 1.5], [4.0, 4.5]],
            [
                [-0.75 / (_STD_BATCH + 1e-4), 0.75 / (_STD_BATCH + 1e-4)],
                [-0.25 / (_STD_BATCH + 1e-4), 0.25 / (_STD_BATCH + 1e-4)],
            ],
        ),
        ("max_rl", [[1.0, 0.0, 0.0, 0.0]], [[3.0, -1.0, -1.0, -1.0]]),
        ("max_rl", [[0.0, 0.0], [-1.0, 0.5], [-1.0, 1.0]], [[0.0, 0.0]] * 3),  # means of 0 or below
    ],
)
def test_by_hand(kind: str, groups: Groups, expected: Groups) -> None:
    ours = advantages(groups, kind)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


def _trl(rewards: np.ndarray, kind: str) -> np.ndarray:
    """As TRL computes it with `scale_rewards` "none", "group" and "batch": deviations with n - 1."""
    centred = rewards - rewards.mean(1, keepdims=True)
    return {
        "mean": centred,
        "mean_std": centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4),
        "batch_std": centred / (rewards.std(ddof=1) + 1e-4),
    }[kind]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["mean", "mean_std", "batch_std"])
def test_random_steps_equal_trls_formulas(kind: str, seed: int) -> None:
    rewards = np.random.default_rng(seed).normal(2, 3, size=(6, 8))
    np.testing.assert_allclose(advantages(rewards.tolist(), kind), _trl(rewards, kind), rtol=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_random_steps_equal_the_other_formulas(seed: int) -> None:
    rewards = np.random.default_rng(seed).normal(2, 3, size=(6, 8))
    centred = rewards - rewards.mean(1, keepdims=True)
    n = rewards.shape[1]
    for kind, expected in {
        "rloo": centred * n / (n - 1),
        # OpenRLHF's two whitenings of a batch: of rewards, or of what the groups' means leave.
        "reinforce_pp": (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4),
        "reinforce_pp_baseline": centred / (centred.std(ddof=1) + 1e-4),
        "max_rl": np.where(rewards.mean(1, keepdims=True) > 0, centred / rewards.mean(1, keepdims=True), 0),
    }.items():
        np.testing.assert_allclose(advantages(rewards.tolist(), kind), expected, rtol=1e-10, atol=1e-13)


def test_each_kind_was_compared() -> None:
    assert set(KINDS) == {
        "mean", "mean_std", "batch_std", "rloo", "reinforce_pp", "reinforce_pp_baseline", "max_rl"
    }  # fmt: skip
    assert STD_EPSILON == 1e-4


# What must hold for any step.

_REWARDS = st.floats(-100, 100, allow_subnormal=False)
_GROUP = st.lists(st.none() | _REWARDS, max_size=7)
_STEP = st.lists(_GROUP, max_size=4)
_KIND = st.sampled_from(KINDS)


def _alive(group: Sequence[float | None]) -> list[float]:
    return [r for r in group if r is not None]


@settings(deadline=None)
@given(_STEP, _KIND)
def test_there_is_one_advantage_for_each_that_can_be_compared(groups: Groups, kind: str) -> None:
    ours = advantages(groups, kind)
    for rewards, mine in zip(groups, ours, strict=True):
        few = len(_alive(rewards)) < 2
        assert [a is None for a in mine] == [few or r is None for r in rewards]
        assert all(math.isfinite(a) for a in mine if a is not None)


@settings(deadline=None)
@given(_STEP, st.sampled_from(["mean", "rloo", "mean_std", "batch_std", "reinforce_pp_baseline"]))
def test_a_group_sums_to_zero(groups: Groups, kind: str) -> None:
    for mine in advantages(groups, kind):
        alive = _alive(mine)
        assert abs(math.fsum(alive)) <= 1e-9 * max([1.0, *map(abs, alive)])


@settings(deadline=None)
@given(_STEP)
def test_a_whole_batch_sums_to_zero_where_it_is_the_baseline(groups: Groups) -> None:
    alive = [a for group in advantages(groups, "reinforce_pp") for a in _alive(group)]
    assert abs(math.fsum(alive)) <= 1e-9 * max([1.0, *map(abs, alive)])


@settings(deadline=None)
@given(_STEP, _KIND, st.randoms(use_true_random=False))
def test_order_within_groups_and_of_groups_does_not_matter(
    groups: Groups, kind: str, rng: random.Random
) -> None:
    orders = [rng.sample(range(len(group)), len(group)) for group in groups]
    of_groups = rng.sample(range(len(groups)), len(groups))
    moved = advantages([[groups[g][i] for i in orders[g]] for g in of_groups], kind)
    straight = advantages(groups, kind)
    expected = [[straight[g][i] for i in orders[g]] for g in of_groups]
    for mine, theirs in zip(moved, expected, strict=True):
        assert [a is None for a in mine] == [a is None for a in theirs]
        assert _alive(mine) == pytest.approx(_alive(theirs), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(_STEP, st.sampled_from([kind for kind in KINDS if kind != "max_rl"]), st.floats(-100, 100))
def test_a_reward_for_nothing_changes_nothing(groups: Groups, kind: str, shift: float) -> None:
    moved = advantages([[None if r is None else r + shift for r in group] for group in groups], kind)
    for mine, theirs in zip(moved, advantages(groups, kind), strict=True):
        # Divisions by a tiny spread magnify what the addition rounds.
        assert _alive(mine) == pytest.approx(_alive(theirs), rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(-50, 50), max_size=7))
def test_max_rl_is_free_of_the_units_of_reward(group: list[int | None]) -> None:
    [mine], [theirs] = (
        advantages([[None if r is None else scale * r for r in group]], "max_rl") for scale in (1.0, 4.0)
    )
    assert mine == theirs  # a power of two rounds nothing


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.1 * 3, 0.1 + 0.7, 1 / 3, 0.0, -0.1, 1e-300]), st.integers(2, 12)),
             min_size=1, max_size=4),
    st.sampled_from([kind for kind in KINDS if kind != "reinforce_pp"]),
    _GROUP,
)  # fmt: skip
def test_equal_rewards_give_exactly_zero(equal: list[tuple[float, int]], kind: str, other: Any) -> None:
    # The mean of ten times 0.1 is not 0.1 in binary. Another group of the step must not matter either.
    groups = [[value] * n for value, n in equal]
    for mine in advantages([*groups, other], kind)[:-1]:
        assert mine == [0.0] * len(mine)


@given(st.sampled_from([0.1 * 3, 1 / 3, 0.7]), st.lists(st.integers(2, 6), min_size=1, max_size=4))
def test_a_batch_of_equal_rewards_gives_exactly_zero(value: float, sizes: list[int]) -> None:
    for mine in advantages([[value] * n for n in sizes], "reinforce_pp"):
        assert mine == [0.0] * len(mine)


@settings(deadline=None)
@given(_STEP, _KIND, st.randoms(use_true_random=False))
def test_failed_members_never_influence_the_others(groups: Groups, kind: str, rng: random.Random) -> None:
    with_failures = [[*group] for group in groups]
    for group in with_failures:
        for _ in range(rng.randrange(4)):
            group.insert(rng.randint(0, len(group)), None)
    ours = [_alive(group) for group in advantages(with_failures, kind)]
    assert ours == [_alive(group) for group in advantages([_alive(group) for group in groups], kind)]


@settings(deadline=None)
@given(_STEP, st.sampled_from(PER_GROUP))
def test_groups_are_strangers(groups: Groups, kind: str) -> None:
    assert advantages(groups, kind) == [advantages([group], kind)[0] for group in groups]


@settings(deadline=None)
@given(_STEP, _KIND)
def test_a_group_that_was_dropped_is_not_in_the_batch(groups: Groups, kind: str) -> None:
    lonely: Groups = [[99.0], [None, -77.0], [], [None]]
    assert advantages([*groups, *lonely], kind) == [
        *advantages(groups, kind),
        [None],
        [None, None],
        [],
        [None],
    ]


@settings(deadline=None)
@given(_GROUP)
def test_leaving_oneself_out_is_the_mean_form_times_n_by_n_minus_1(group: list[float | None]) -> None:
    [loo], [mean] = advantages([group], "rloo"), advantages([group], "mean")
    n = len(_alive(group))
    assert _alive(loo) == pytest.approx([n / (n - 1) * a for a in _alive(mean)], rel=1e-9, abs=1e-9)


@given(_GROUP)
def test_max_rl_is_silent_unless_the_mean_is_above_zero(group: list[float | None]) -> None:
    alive = _alive(group)
    if len(alive) > 1 and math.fsum(alive) / len(alive) <= 0:
        assert not any(_alive(advantages([group], "max_rl")[0]))


@settings(deadline=None)
@given(_STEP, _KIND)
def test_more_reward_is_never_less_advantage(groups: Groups, kind: str) -> None:
    for rewards, mine in zip(groups, advantages(groups, kind), strict=True):
        pairs = sorted((r, a) for r, a in zip(rewards, mine, strict=True) if r is not None and a is not None)
        assert all(a <= b + 1e-12 for (_, a), (_, b) in pairwise(pairs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(kind: str, bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        advantages([[1.0, bad]], kind)


def test_of_nothing_there_is_nothing() -> None:
    for kind in KINDS:
        assert advantages([], kind) == []
        assert advantages([[], [None]], kind) == [[], [None]]
