"""Rewards -> advantages: how much better each turn did than what it is compared with. Plain Python.

A conversation's *return* is the sum of its turn rewards. A comparison is a baseline `b` and a scale `c` per
trajectory, and an advantage is `(value - b) / c`:

    kind                    baseline b                          scale c
    mean                    mean of the group                   1            Dr. GRPO, arXiv:2503.20783
    mean_std                mean of the group                   std of the group + 1e-4     GRPO, 2402.03300
    rloo                    mean of the others of the group     1            RLOO, arXiv:2402.14740
    batch_std               mean of the group                   std of the batch + 1e-4     TRL's "batch"
    reinforce_pp            mean of the batch                   std of the batch + 1e-4     arXiv:2501.03262
    reinforce_pp_baseline   mean of the group, then the batch's std of what is left + 1e-4  the same
    max_rl                  mean of the group                   mean of the group; 0 if that is not above 0

Every standard deviation divides by n - 1, as TRL's does (numpy's would by n). Each rollout counts once,
however many samples it became. Equal values have an advantage of exactly 0, decided by comparing them,
since a mean may round.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from stateset_ray.objective import AdvantageKind, ObjectiveConfig

__all__ = ["STD_EPSILON", "Rewards", "discounted", "shuffled", "step_advantages"]

STD_EPSILON = 1e-4
"""Added to a standard deviation, as in TRL."""

Rewards = Mapping[str, Sequence[float]]
"""What one conversation earned, turn by turn, under each named reward; "" is the one reward of all."""

_Values = list[list[list[float]]]
"""Numbers per group, per trajectory."""


class _Comparison(NamedTuple):
    baseline: float
    scale: float  # infinite: nothing is learned

    def of(self, value: float) -> float:
        return (value - self.baseline) / self.scale


def step_advantages(
    groups: Sequence[Sequence[Rewards | None]], objective: ObjectiveConfig
) -> list[list[tuple[float, ...] | None]]:
    """The advantage of every turn of one step's trajectories.

    What a turn answers for is `objective.credit`:

    `outcome`: the return of the whole conversation, the same for all turns.
    `return_to_go`: the rewards from the turn on, discounted by `gamma` per turn, compared with the
    *conversation's* returns. Comparing with the mean of all k-th turns would be biased, because the policy
    decides which conversations have a k-th turn.
    `turn_plus_outcome`: the turn's own reward, compared with all turns of the group, plus `outcome_weight`
    times the outcome's advantage (MT-GRPO, Zeng et al. 2025, arXiv:2505.11821, without its baseline per turn
    index, for the same reason).

    With `reward_weights`, each named reward is compared apart, and the advantages are summed with the
    weights (GDPO, Liu et al. 2026, arXiv:2601.05242, without its last division by the batch's spread).

    Args:
        groups: for each group, for each trajectory, its rewards; None where it failed. A name that a
            trajectory does not have, such as one that is given at the end, earned 0 in it.
        objective: advantage, credit, gamma, outcome_weight, reward_weights.

    Returns:
        In the same order, one advantage per turn; a trajectory without turns has one, of its outcome. None
        where a trajectory failed, and for all of a group in which fewer than two can be compared.

    Raises:
        ValueError: a reward is not a finite number.

    Example:
        >>> step_advantages([[{"": [0.5, 0.5]}, {"": [0.0]}, None]], ObjectiveConfig())
        [[(0.5, 0.5), (-0.5,), None]]
    """
    alive = [[r for r in group if r is not None] for group in groups]
    alive = [group if len(group) > 1 else [] for group in alive]
    weights = objective.reward_weights or {"": 1.0}
    parts = []
    for name, weight in weights.items():
        rewards = [[_named(trajectory, name) for trajectory in group] for group in alive]
        parts.append((weight, _credited(rewards, objective)))
    summed = [
        [
            tuple(
                sum(weight * part[g][t][k] for weight, part in parts) for k in range(len(parts[0][1][g][t]))
            )
            for t in range(len(group))
        ]
        for g, group in enumerate(alive)
    ]
    result: list[list[tuple[float, ...] | None]] = []
    for group, advantages in zip(groups, summed, strict=True):
        left = iter(advantages)
        result.append([None if r is None or not advantages else next(left) for r in group])
    return result


def _named(rewards: Rewards, name: str) -> list[float]:
    values = [float(value) for value in rewards.get(name, [0.0] * _turns(rewards))]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"every reward must be a finite number, not {values}")
    return values


def _turns(rewards: Rewards) -> int:
    return max(map(len, rewards.values()), default=0)


def _credited(rewards: _Values, objective: ObjectiveConfig) -> _Values:
    """The advantage of each turn under one reward; of the outcome where there is no turn."""
    gamma = objective.gamma
    returns = [[[discounted(turns, gamma)[0]] for turns in group] for group in rewards]
    whole = _compare(returns, objective.advantage)
    if objective.credit == "return_to_go":
        values = [[discounted(turns, gamma) for turns in group] for group in rewards]
        return _apply(whole, values)
    repeated = [
        [value * max(1, len(turns)) for value, turns in zip(*group, strict=True)]
        for group in zip(returns, rewards, strict=True)
    ]
    outcome = _apply(whole, repeated)
    if objective.credit == "outcome":
        return outcome
    own = [[turns or [0.0] for turns in group] for group in rewards]
    local = _apply(_compare(own, objective.advantage), own)
    return [
        [
            [a + objective.outcome_weight * b for a, b in zip(*pair, strict=True)]
            for pair in zip(*group, strict=True)
        ]
        for group in zip(local, outcome, strict=True)
    ]


def discounted(rewards: Sequence[float], gamma: float) -> list[float]:
    """The return from each turn on, `G_k = r_k + gamma G_{k+1}`; [0.0] without turns.

    Example:
        >>> discounted([1.0, 0.0, 4.0], 0.5)
        [2.0, 2.0, 4.0]
    """
    returns: list[float] = []
    for reward in reversed(rewards):
        returns.append(reward + gamma * (returns[-1] if returns else 0.0))
    return returns[::-1] or [0.0]


def _apply(comparisons: list[list[_Comparison]], values: _Values) -> _Values:
    return [
        [[c.of(value) for value in mine] for c, mine in zip(*group, strict=True)]
        for group in zip(comparisons, values, strict=True)
    ]


def _compare(stats: _Values, kind: AdvantageKind) -> list[list[_Comparison]]:
    """What each trajectory is compared with, from the values of its group or of the batch."""
    groups = [list(chain.from_iterable(group)) for group in stats]
    batch = list(chain.from_iterable(groups))
    if kind == "reinforce_pp":
        same = _Comparison(_mean(batch), _scale(batch))
        return [[same] * len(group) for group in stats]
    means = [_mean(group) for group in groups]
    if kind == "rloo":
        return [
            [
                _Comparison(_mean([v for j, other in enumerate(group) if j != i for v in other]), 1.0)
                for i in range(len(group))
            ]
            for group in stats
        ]
    if kind == "reinforce_pp_baseline":
        # What is left has mean 0. As computed it does not quite, which would give equal values an advantage.
        spread = _scale([v - mean for group, mean in zip(groups, means, strict=True) for v in group])
        return [[_Comparison(mean, spread)] * len(group) for group, mean in zip(stats, means, strict=True)]
    scale: Callable[[list[float], float], float] = {
        "mean": lambda group, mean: 1.0,
        "mean_std": lambda group, mean: _scale(group),
        "batch_std": lambda group, mean: _scale(batch),
        "max_rl": lambda group, mean: mean if mean > 0 else math.inf,
    }[kind]
    return [
        [_Comparison(mean, scale(group, mean))] * len(members)
        for members, group, mean in zip(stats, groups, means, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    """The mean; of equal values exactly that value."""
    if not values or max(values) == min(values):
        return values[0] if values else 0.0
    return math.fsum(values) / len(values)


def _scale(values: Sequence[float]) -> float:
    """The standard deviation with n - 1, and the epsilon."""
    if len(values) < 2:
        return STD_EPSILON
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) + STD_EPSILON


def shuffled(rewards: Sequence[Rewards | None], seed: int) -> list[Rewards | None]:
    """The control experiment: the rewards of one group, handed out at random inside the group.

    The mean, the spread and the failed members (None) stay where they are, so that everything but the
    link between a conversation and its reward is unchanged; a policy must not improve on this. Since
    conversations differ in their turns, each gets another's whole return at its own last turn; one without
    turns keeps what it has, nothing.

    Example:
        >>> shuffled([{"": [1.0, 1.0]}, None, {"": [2.0]}], seed=0)
        [{'': [0.0, 2.0]}, None, {'': [2.0]}]
    """
    pool = [reward for reward in rewards if reward is not None and _turns(reward)]
    random.Random(seed).shuffle(pool)
    handed_out = iter(pool)
    return [
        _instead(reward, next(handed_out)) if reward is not None and _turns(reward) else reward
        for reward in rewards
    ]


def _instead(mine: Rewards, other: Rewards) -> Rewards:
    before = [0.0] * (_turns(mine) - 1)
    return {name: [*before, math.fsum(other.get(name, ()))] for name in {**mine, **other}}
