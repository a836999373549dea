"""Credit per turn: direct formulas, named rewards, shuffling, and what is unbiased.

The environment of the unbiasedness tests can be enumerated: one decision, which may end the conversation,
and perhaps a second one; both pay. Every group of n conversations is played, weighted by its probability.
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.grpo.advantages import Rewards, discounted, shuffled, step_advantages
from stateset_ray.objective import ObjectiveConfig

Turns = Sequence[float]


def credit(groups: Sequence[Sequence[Turns | None]], **parts: Any) -> list[list[tuple[float, ...] | None]]:
    rewards = [[None if turns is None else {"": list(turns)} for turns in group] for group in groups]
    return step_advantages(rewards, ObjectiveConfig(**parts))


_TURNS = st.lists(st.floats(-10, 10, allow_subnormal=False), max_size=5)
_GROUP = st.lists(st.none() | _TURNS, min_size=2, max_size=5)


def test_the_outcome_is_the_same_for_all_turns() -> None:
    assert credit([[[1.0, 2.0], [0.0], None, []]]) == [[(5 / 3 + 1 / 3, 2.0), (-1.0,), None, (-1.0,)]]


def test_return_to_go_by_hand() -> None:
    # Returns of conversations 4 and 2: baseline 3, for every turn of both.
    ours = credit([[[1.0, 0.0, 3.0], [2.0]]], credit="return_to_go")
    assert ours == [[(1.0, 0.0, 0.0), (-1.0,)]]


def test_return_to_go_with_a_discount_by_hand() -> None:
    # G = 1 + 0.5 (0 + 0.5 * 3) = 1.75, then 1.5, then 3; the other 2; baseline 1.875.
    ours = credit([[[1.0, 0.0, 3.0], [2.0]]], credit="return_to_go", gamma=0.5)
    assert ours == [[(-0.125, -0.375, 1.125), (0.125,)]]


def test_turn_plus_outcome_by_hand() -> None:
    # Turns 1, 0, 3, 2 have mean 1.5; outcomes 4 and 2 have mean 3.
    ours = credit([[[1.0, 0.0, 3.0], [2.0]]], credit="turn_plus_outcome", outcome_weight=0.5)
    assert ours == [[(-0.5 + 0.5, -1.5 + 0.5, 1.5 + 0.5), (0.5 - 0.5,)]]
    alone = credit([[[1.0, 0.0, 3.0], [2.0]]], credit="turn_plus_outcome", outcome_weight=0.0)
    assert alone == [[(-0.5, -1.5, 1.5), (0.5,)]]


def test_turn_plus_outcome_leaves_a_conversations_own_turns_out_with_rloo() -> None:
    ours = credit(
        [[[1.0, 0.0], [2.0], [4.0]]], credit="turn_plus_outcome", advantage="rloo", outcome_weight=0
    )
    assert ours == [[(-2.0, -3.0), (2 - 5 / 3,), (3.0,)]]


@settings(deadline=None)
@given(_TURNS, st.floats(0.1, 1.0))
def test_discounted_is_the_sum_of_what_follows(rewards: list[float], gamma: float) -> None:
    direct = [sum(gamma ** (j - i) * rewards[j] for j in range(i, len(rewards))) for i in range(len(rewards))]
    assert discounted(rewards, gamma) == pytest.approx(direct or [0.0], rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(
    st.lists(_GROUP, min_size=1, max_size=3),
    st.sampled_from(["mean", "mean_std", "rloo", "batch_std", "reinforce_pp"]),
    st.floats(0.1, 1.0),
)
def test_return_to_go_equals_direct_formulas(
    groups: list[list[list[float] | None]], kind: str, gamma: float
) -> None:
    ours = credit(groups, credit="return_to_go", advantage=kind, gamma=gamma)

    def total(turns: list[float], start: int = 0) -> float:
        return sum(gamma ** (j - start) * turns[j] for j in range(start, len(turns)))

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) + 1e-4

    alive = [[turns for turns in group if turns is not None] for group in groups]
    whole = [[total(turns) for turns in group] if len(group) > 1 else [] for group in alive]
    batch = [value for group in whole for value in group]
    for group, mine, returns in zip(groups, ours, whole, strict=True):
        position = 0
        for turns, given_credit in zip(group, mine, strict=True):
            if turns is None or not returns:
                assert given_credit is None
                continue
            others = returns[:position] + returns[position + 1 :]
            position += 1
            base = {
                "rloo": sum(others) / len(others),
                "reinforce_pp": sum(batch) / len(batch),
            }.get(kind, sum(returns) / len(returns))
            scale = {
                "mean_std": deviation(returns),
                "batch_std": deviation(batch),
                "reinforce_pp": deviation(batch),
            }.get(kind, 1.0)
            expected = [(total(turns, k) - base) / scale for k in range(len(turns))] or [-base / scale]
            # Spreads of nearly equal returns magnify roundings.
            assert given_credit == pytest.approx(expected, rel=1e-6, abs=1e-7)


@settings(deadline=None)
@given(_GROUP)
def test_the_first_turn_of_return_to_go_answers_for_the_whole(group: list[list[float] | None]) -> None:
    [ours], [outcome] = credit([group], credit="return_to_go"), credit([group], credit="outcome")
    assert [a and a[0] for a in ours] == [a and a[0] for a in outcome]


@settings(deadline=None)
@given(_GROUP, st.sampled_from(["outcome", "return_to_go", "turn_plus_outcome"]))
def test_each_turn_gets_one_advantage(group: list[list[float] | None], kind: str) -> None:
    [ours] = credit([group], credit=kind)
    if sum(turns is not None for turns in group) > 1:
        lengths = [None if turns is None else max(1, len(turns)) for turns in group]
        assert [None if a is None else len(a) for a in ours] == lengths


def test_long_conversations_count_once_in_the_baseline() -> None:
    ours = credit([[[0.0] * 9 + [1.0], [0.0]]])
    assert ours == [[(0.5,) * 10, (-0.5,)]]


# Several named rewards.


def test_named_rewards_are_compared_apart_and_then_summed() -> None:
    group: list[Rewards | None] = [
        {"": [9.0], "solved": [1.0], "polite": [0.0]},
        {"": [9.0], "solved": [0.0], "polite": [100.0]},
        None,
    ]
    objective = ObjectiveConfig(advantage="mean_std", reward_weights={"solved": 1.0, "polite": 0.5})
    [[first, second, failed]] = step_advantages([group], objective)
    solved = 0.5 / (math.sqrt(0.5) + 1e-4)
    polite = 50 / (math.sqrt(5000) + 1e-4)
    # Normalized apart, a reward in hundreds does not drown the other one.
    assert first == pytest.approx([solved - 0.5 * polite])
    assert second == pytest.approx([-solved + 0.5 * polite])
    assert failed is None


def test_named_rewards_have_credit_per_turn() -> None:
    group = [{"a": [1.0, 0.0], "b": [0.0, 2.0]}, {"a": [0.0], "b": [0.0]}]
    objective = ObjectiveConfig(credit="return_to_go", reward_weights={"a": 1.0, "b": -1.0})
    # a: returns 1, 0 and baseline 0.5; b: returns 2, 0 and baseline 1.
    assert step_advantages([group], objective) == [[(0.5 - 1.0, -0.5 - 1.0), (-0.5 + 1.0,)]]


@pytest.mark.parametrize("kind", ["mean", "rloo"])
def test_rewards_named_apart_are_their_sum_where_nothing_is_divided(kind: Any) -> None:
    rng = random.Random(3)
    group = [{"a": [rng.random()], "b": [rng.random()]} for _ in range(5)]
    apart = step_advantages([group], ObjectiveConfig(advantage=kind, reward_weights={"a": 2.0, "b": 1.0}))
    summed = credit([[[2 * r["a"][0] + r["b"][0]] for r in group]], advantage=kind)
    for mine, theirs in zip(apart[0], summed[0], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-12)


def test_a_name_that_a_conversation_never_heard_earned_nothing_in_it() -> None:
    # An environment may name a reward only as it ends; a limit may end a conversation before.
    group: list[Rewards] = [{"": [0.0], "solved": [1.0]}, {"": [0.0, 0.0]}, {"": []}]
    objective = ObjectiveConfig(reward_weights={"solved": 3.0})
    assert step_advantages([group], objective) == [[(2.0,), (-1.0, -1.0), (-1.0,)]]


def test_a_name_that_nobody_heard_earned_nothing() -> None:
    group = [{"": [1.0], "solved": [1.0]}, {"": [0.0], "solved": [0.0]}]
    both = ObjectiveConfig(reward_weights={"solved": 1.0, "polite": 3.0})
    assert step_advantages([group], both) == [[(0.5,), (-0.5,)]]
    assert step_advantages([group], ObjectiveConfig(reward_weights={"polite": 1.0})) == [[(0.0,), (0.0,)]]


# Shuffling.

_REWARDS = st.none() | st.lists(st.floats(-10, 10), max_size=4).map(lambda turns: {"": turns})


@settings(deadline=None)
@given(st.lists(_REWARDS, max_size=8), st.integers(0, 2**63))
def test_shuffling_moves_returns_only(rewards: list[Rewards | None], seed: int) -> None:
    out = shuffled(rewards, seed)
    assert out == shuffled(rewards, seed)
    assert [r and len(r[""]) for r in out] == [r and len(r[""]) for r in rewards]

    def returns(group: list[Rewards | None]) -> list[float]:
        return sorted(math.fsum(r[""]) for r in group if r is not None)

    assert returns(out) == returns(rewards)


def test_shuffling_does_shuffle() -> None:
    rewards: list[Rewards | None] = [{"": [float(i)]} for i in range(8)]
    assert len({str(shuffled(rewards, seed)) for seed in range(20)}) > 10


def test_shuffling_moves_named_rewards_together() -> None:
    rewards: list[Rewards | None] = [{"": [float(i)], "half": [i / 2]} for i in range(6)]
    for seed in range(5):
        out = shuffled(rewards, seed)
        assert all(r is not None and r["half"] == [r[""][0] / 2] for r in out)


def test_shuffling_loses_no_name() -> None:
    rewards: list[Rewards | None] = [{"": [1.0], "solved": [5.0]}, {"": [0.0, 0.0]}, {"": []}]
    for seed in range(5):
        out = shuffled(rewards, seed)
        assert sum(math.fsum(r.get("solved", ())) for r in out if r is not None) == 5.0


# Unbiasedness, by enumeration.


class Played(NamedTuple):
    """One conversation that can happen: its decisions as (state, action), and what each turn paid."""

    decisions: tuple[tuple[int, int], ...]
    rewards: tuple[float, ...]


# State 0: stop for 1.0, or go on for 0.3 (to state 1) or for 0.2 (to state 2). States 1 and 2: one more turn.
# To stop is the worst choice.
EVERY = [
    Played(((0, 0),), (1.0,)),
    *(Played(((0, 1), (1, a)), (0.3, r)) for a, r in enumerate((0.5, 2.5))),
    *(Played(((0, 2), (2, a)), (0.2, r)) for a, r in enumerate((1.4, 0.7))),
]
STATES = ((0.2, -0.4, 0.5), (0.3, -0.1), (-0.6, 0.4))


def _log_policy(parameters: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """For each conversation, the log-probability of each of its decisions."""
    states = [torch.log_softmax(logits, -1) for logits in parameters]
    return [[states[s][a] for s, a in played.decisions] for played in EVERY]


def _parameters() -> list[torch.Tensor]:
    return [torch.tensor(logits, dtype=torch.float64, requires_grad=True) for logits in STATES]


def _true_gradient() -> torch.Tensor:
    parameters = _parameters()
    logps = _log_policy(parameters)
    value = torch.stack(
        [torch.stack(path).sum().exp() * sum(p.rewards) for path, p in zip(logps, EVERY, strict=True)]
    ).sum()
    return torch.cat(torch.autograd.grad(value, parameters))


def _expected_gradient(n: int, advantages_of: Callable[[list[Turns]], list[Turns]]) -> torch.Tensor:
    """The expectation over all groups of n of the mean over its members of sum A grad log pi."""
    parameters = _parameters()
    logps = _log_policy(parameters)
    chances = [math.exp(sum(float(x.detach()) for x in path)) for path in logps]
    terms = []
    for group in product(range(len(EVERY)), repeat=n):
        chance = math.prod(chances[i] for i in group)
        credits = advantages_of([EVERY[i].rewards for i in group])
        for i, turns in zip(group, credits, strict=True):
            terms += [chance / n * a * x for a, x in zip(turns, logps[i], strict=True)]
    return torch.cat(torch.autograd.grad(torch.stack(terms).sum(), parameters))


def _ours(**parts: Any) -> Callable[[list[Turns]], list[Turns]]:
    return lambda group: [turns or () for turns in credit([group], **parts)[0]]


def _by_turn_index(group: list[Turns]) -> list[Turns]:
    """What verl#7244 warns of: each turn's reward compared with all k-th turns, then summed from k on.

    How many means are subtracted depends on when the policy stopped.
    """
    longest = max(map(len, group))
    means = []
    for k in range(longest):
        at_k = [turns[k] for turns in group if len(turns) > k]
        means.append(sum(at_k) / len(at_k))
    return [discounted([r - means[k] for k, r in enumerate(turns)], 1.0) for turns in group]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", ["outcome", "return_to_go"])
def test_the_expected_gradient_is_that_of_the_expected_reward(kind: str, n: int) -> None:
    exact = _true_gradient()
    ours = _expected_gradient(n, _ours(credit=kind, advantage="rloo"))
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)
    # The plain mean counts the member itself, and is shorter by (n - 1) / n in every direction alike.
    ours = _expected_gradient(n, _ours(credit=kind, advantage="mean"))
    torch.testing.assert_close(ours, exact * (n - 1) / n, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_baseline_per_turn_index_is_biased(n: int) -> None:
    exact, theirs = _true_gradient(), _expected_gradient(n, _by_turn_index)
    cosine = float(exact @ theirs / exact.norm() / theirs.norm())
    assert cosine < 0.4
    # It even prefers to stop, which is the worst choice.
    assert exact[0] < -0.05
    assert theirs[0] > 0.08


def test_its_bias_is_the_mean_of_the_rewards_on_the_way() -> None:
    # In a large group the means are constants b_k. What is subtracted too much from the decision to go on is
    # b_2, whatever the second turn then brings.
    parameters = _parameters()
    logps = _log_policy(parameters)
    chances = [math.exp(sum(float(x.detach()) for x in path)) for path in logps]
    b = []
    for k in (0, 1):
        having = [i for i, played in enumerate(EVERY) if len(played.rewards) > k]
        b.append(sum(chances[i] * EVERY[i].rewards[k] for i in having) / sum(chances[i] for i in having))
    terms, hidden = [], []
    for chance, path, played in zip(chances, logps, EVERY, strict=True):
        credits = discounted([r - b[k] for k, r in enumerate(played.rewards)], 1.0)
        terms += [chance * a * x for a, x in zip(credits, path, strict=True)]
        if len(path) > 1:
            hidden.append(-chance * b[1] * path[0])
    theirs = torch.cat(torch.autograd.grad(torch.stack(terms).sum(), parameters, retain_graph=True))
    bias = torch.cat(
        torch.autograd.grad(torch.stack(hidden).sum(), parameters, allow_unused=True, materialize_grads=True)
    )
    torch.testing.assert_close(theirs - _true_gradient(), bias, rtol=1e-12, atol=1e-14)
    assert float(bias.norm()) > 0.2


def test_a_discounted_return_to_go_is_the_gradient_of_discounted_rewards_at_each_turn() -> None:
    # G_k discounts from its own turn on: the gradient of sum_k grad log pi_k E[G_k], not of E[G_0].
    gamma = 0.6
    parameters = _parameters()
    logps = _log_policy(parameters)
    terms = []
    for path, played in zip(logps, EVERY, strict=True):
        chance = math.exp(sum(float(x.detach()) for x in path))
        for k, x in enumerate(path):
            later = sum(gamma ** (j - k) * r for j, r in enumerate(played.rewards) if j >= k)
            terms.append(chance * later * x)
    exact = torch.cat(torch.autograd.grad(torch.stack(terms).sum(), parameters))
    ours = _expected_gradient(3, _ours(credit="return_to_go", advantage="rloo", gamma=gamma))
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


def test_turn_plus_outcome_is_the_outcome_and_a_gradient_of_its_own_turns_reward() -> None:
    both = _expected_gradient(2, _ours(credit="turn_plus_outcome", advantage="rloo", outcome_weight=1.0))
    local = _expected_gradient(2, _ours(credit="turn_plus_outcome", advantage="rloo", outcome_weight=0.0))
    torch.testing.assert_close(both - local, _true_gradient(), rtol=1e-12, atol=1e-14)
    parameters = _parameters()
    terms = [
        math.exp(sum(float(x.detach()) for x in path)) * r * x
        for path, played in zip(_log_policy(parameters), EVERY, strict=True)
        for r, x in zip(played.rewards, path, strict=True)
    ]
    myopic = torch.cat(torch.autograd.grad(torch.stack(terms).sum(), parameters))
    torch.testing.assert_close(local, myopic, rtol=1e-12, atol=1e-14)
