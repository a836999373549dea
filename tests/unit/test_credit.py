"""From reports to credit, weights and denominators: what the controller decides without seeing a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.actors.credit import (
    Batch,
    informative,
    longest_conversation,
    policy_batch,
    supervised_batch,
)
from stateset_ray.actors.flight import Collected, GroupHandle
from stateset_ray.actors.jobs import Counts, GroupJob, GroupReport, SampleSize, report_on
from stateset_ray.actors.learner_rank import UpdateBatch
from stateset_ray.config import Config, load_config
from stateset_ray.errors import RunError
from stateset_ray.objective import CreditKind
from stateset_ray.types import Message, StopReason, Task, Trajectory, TrajectoryGroup, Turn


def played(
    rewards: Sequence[float | list[float] | None],
    *,
    name: str = "t",
    tokens: int = 2,
    stops: Sequence[StopReason] | None = None,
    forks: int = 0,
) -> GroupReport:
    """The report of a group: of each trajectory, the reward of its one turn, or those of its turns.

    The first `forks` trajectories become a sample for every turn, as under a template that rewrites history.
    """
    task = Task(name, 0)
    trajectories = []
    for i, reward in enumerate(rewards):
        turns = [
            Turn((1, 2, 3), tuple(range(4, 4 + tokens)), (-0.5,) * tokens, 0, r, forked=k > 0 and i < forks)
            for k, r in enumerate(reward if isinstance(reward, list) else [reward or 0.0])
        ]
        stop = StopReason.ENVIRONMENT_ERROR if reward is None else StopReason.COMPLETED
        said = (Message("user", "Go."),)
        reason = stops[i] if stops else stop
        trajectories.append(Trajectory(f"r/0/{name}/{i}/0", task, i, said, tuple(turns), reason))
    job = GroupJob(f"r/0/{name}", task, 7, len(rewards), 1.0)
    report, _ = report_on(job, TrajectoryGroup(task, tuple(trajectories)))
    return report


def collected(*reports: GroupReport) -> Collected:
    counts = Counts(dispatched=sum(len(report.rewards) for report in reports))
    return Collected([GroupHandle(report, f"payload {i}") for i, report in enumerate(reports)], counts, 0)


def config(*overrides: str) -> Config:
    return load_config(None, ["grpo.group_size=2", *overrides])


def only(batch_updates: list[UpdateBatch]) -> UpdateBatch:
    [update] = batch_updates
    return update


def credits(update: UpdateBatch) -> list[tuple[float, ...]]:
    return [sample.advantages for sample in update.samples]


def test_the_report_carries_turn_rewards_names_and_the_common_prefix() -> None:
    turn = Turn((1, 2), (3, 4), (-0.1, -0.2), 0, 1.0, rewards={"polite": 0.25})
    bare = Turn((5,), (6,), (-0.3,), 0, 2.0)
    trajectory = Trajectory("a", Task("t", 0), 0, (), (turn, bare), StopReason.COMPLETED)
    failed = Trajectory("b", Task("t", 0), 1, (), (turn,), StopReason.TIMEOUT)
    job = GroupJob("r/0/t", Task("t", 0), 0, 2, 1.0)
    report, _ = report_on(job, TrajectoryGroup(Task("t", 0), (trajectory, failed)))
    assert report.turn_rewards == ({"": (1.0, 2.0), "polite": (0.25, 0.0)}, None)
    assert report.prefix == 2


@pytest.mark.parametrize(
    ("aggregation", "weights", "denominator"),
    [
        ("token_mean", [1.0, 1.0, 1.0, 1.0], 2 + 4 + 2 + 2),
        ("sequence_mean", [0.5, 0.25, 0.5, 0.5], 4),
        ("constant", [1.0, 1.0, 1.0, 1.0], 4 * 192),
    ],
)
def test_aggregation_is_a_weight_and_one_denominator(
    aggregation: str, weights: list[float], denominator: float
) -> None:
    settings = config(f"grpo.aggregation={aggregation}")
    assert longest_conversation(settings) == 4 * 48
    reports = played([1.0, [0.0, 0.0]], name="a"), played([3.0, 4.0], name="b")
    update = only(policy_batch(collected(*reports), settings).updates)
    assert [sample.weight for sample in update.samples] == weights
    assert update.denominator == denominator


def test_trajectories_without_gradient_stay_in_the_denominator_but_cost_nothing() -> None:
    batch = policy_batch(collected(played([1.0, 0.0], name="a"), played([2.0, 2.0], name="b")), config())
    update = only(batch.updates)
    assert [sample.group for sample in update.samples] == [0, 0]
    assert update.denominator == 8
    assert (batch.counts.trained, batch.counts.filtered) == (2, 2)
    assert batch.facts["equal_reward_share"] == 0.5


@pytest.mark.parametrize("setting", ["grpo.kl_coef=0.1", "grpo.entropy_coef=0.1", "grpo.preset=dppo"])
def test_with_a_kl_or_an_entropy_bonus_every_trajectory_has_a_gradient(setting: str) -> None:
    batch = policy_batch(collected(played([2.0, 2.0])), config(setting))
    assert len(only(batch.updates).samples) == 2
    assert (batch.counts.trained, batch.counts.filtered) == (2, 0)


def test_a_rollout_that_fans_out_counts_once_in_baseline_and_denominator() -> None:
    """Three samples of one rollout share its advantage, which is compared with the other rollout's."""
    report = played([[0.0, 0.0, 3.0], [1.0, 0.0, 0.0]], forks=1)
    assert [size.trajectory for size in report.sizes] == [0, 0, 0, 1]
    for aggregation, weights, denominator in (
        ("token_mean", [1.0] * 4, 12),
        ("sequence_mean", [1 / 6] * 4, 2),
    ):
        batch = policy_batch(collected(report), config(f"grpo.aggregation={aggregation}"))
        update = only(batch.updates)
        assert {a for sample in update.samples[:3] for a in sample.advantages} == {1.0}
        assert {a for sample in update.samples[3:] for a in sample.advantages} == {-1.0}
        assert [sample.weight for sample in update.samples] == weights
        assert update.denominator == denominator
        assert batch.counts.trained == 2


def test_the_filter_sees_whole_rollouts_when_they_fan_out() -> None:
    batch = policy_batch(collected(played([[1.0, 1.0], [2.0, 0.0]], forks=2)), config())
    assert batch.updates == []
    assert batch.counts.filtered == 2


def test_a_group_with_one_survivor_is_dropped_and_no_sample_is_of_a_group_of_one() -> None:
    batch = policy_batch(collected(played([1.0, None], name="a"), played([1.0, 0.0], name="b")), config())
    assert {sample.group for sample in only(batch.updates).samples} == {1}
    assert batch.counts.dropped == {"environment_error": 1, "group_too_small": 1}


def test_what_was_replaced_or_dropped_leaks_into_no_baseline() -> None:
    """Batch statistics are of the groups of the step, not of those that were played in vain."""
    settings = config("grpo.advantage=batch_std", "grpo.refills=1", "train.tasks_per_step=2")
    dull, lost = played([100.0, 100.0], name="dull"), played([-50.0, None], name="lost")
    a, b = played([0.0, 1.0], name="a"), played([0.0, 1.0], name="b")
    with_them = policy_batch(collected(dull, lost, a, b), settings)
    without = policy_batch(collected(a, b), settings)
    assert credits(only(with_them.updates)) == credits(only(without.updates))
    assert only(with_them.updates).denominator == only(without.updates).denominator
    assert with_them.counts.balanced
    assert with_them.counts.filtered == 2
    assert with_them.counts.dropped.total() == 2


def test_informative_groups_come_first_and_the_order_stays() -> None:
    settings = config("train.tasks_per_step=2", "grpo.refills=1")
    groups = [played([1.0, 1.0], name="dull"), *(played([0.0, float(i)], name=f"g{i}") for i in (1, 2))]
    assert [informative(group, settings) for group in groups] == [False, True, True]
    update = only(policy_batch(collected(*groups), settings).updates)
    assert [s.payload for s in update.samples] == ["payload 1"] * 2 + ["payload 2"] * 2


def test_groups_are_dealt_to_the_optimizer_steps_of_a_step() -> None:
    settings = config("train.updates_per_step=2", "train.tasks_per_step=3")
    reports = [played([0.0, 1.0], name=f"g{i}") for i in range(3)]
    first, second = policy_batch(collected(*reports), settings).updates
    assert [s.payload for s in first.samples] == ["payload 0"] * 2 + ["payload 2"] * 2
    assert [s.payload for s in second.samples] == ["payload 1"] * 2
    assert (first.denominator, second.denominator) == (8, 4)


def test_an_optimizer_step_without_gradient_is_left_out() -> None:
    settings = config("train.updates_per_step=2")
    batch = policy_batch(collected(played([1.0, 1.0], name="a"), played([0.0, 1.0], name="b")), settings)
    assert [s.payload for s in only(batch.updates).samples] == ["payload 1"] * 2


def test_a_truncated_conversation_is_graded_clamped_or_masked() -> None:
    stops = (StopReason.MAX_TURNS, StopReason.COMPLETED)
    report = played([2.0, -1.0], stops=stops)
    graded = policy_batch(collected(report), config())
    assert credits(only(graded.updates)) == [(1.5,), (-1.5,)]
    clamped = policy_batch(collected(report), config("grpo.truncated=clamp"))
    assert credits(only(clamped.updates)) == [(0.5,), (-0.5,)]
    masked = policy_batch(collected(report), config("grpo.truncated=mask"))
    assert credits(only(masked.updates)) == [(-1.5,)]  # it stays in the baseline and in the denominator
    assert only(masked.updates).denominator == 4
    assert (masked.counts.trained, masked.counts.filtered) == (1, 1)
    # Nor does a KL or an entropy bonus train it.
    bonus = policy_batch(collected(report), config("grpo.truncated=mask", "grpo.entropy_coef=0.1"))
    assert credits(only(bonus.updates)) == [(-1.5,)]


def test_equal_returns_teach_nothing_unless_turns_answer_for_themselves() -> None:
    report = played([[1.0, 0.0], [0.0, 1.0]])
    assert not informative(report, config())
    assert informative(report, config("grpo.credit=return_to_go"))
    # Each turn is compared with what whole conversations earned, not with its like in the others.
    assert informative(played([[1.0, 0.0], [1.0, 0.0]]), config("grpo.credit=return_to_go"))
    assert not informative(played([[0.0, 0.0], [0.0]]), config("grpo.credit=return_to_go"))


def test_overlong_conversations_are_charged_before_they_are_compared() -> None:
    settings = config("grpo.overlong_share=0.5", "rollout.max_turns=1", "rollout.max_turn_tokens=8")
    report = played([[1.0], [1.0]], tokens=8)
    assert not informative(report, settings)
    short, long = played([1.0], tokens=2), played([1.0], tokens=8)
    both = GroupReport(
        short.job, short.rewards + long.rewards, short.stop_reasons + long.stop_reasons, (),
        (*short.sizes, SampleSize(1, 0, 11, 8)), (1, 1), short.sampled + long.sampled, ({}, {}),
        short.turn_rewards + long.turn_rewards, 3,
    )  # fmt: skip
    assert credits(only(policy_batch(collected(both), settings).updates)) == [(0.5,), (-0.5,)]


def test_named_rewards_are_charged_and_clamped_too() -> None:
    """Unscaled, their weighted sum loses the whole penalty, as the one reward would."""

    def talk(i: int, tokens: int, stop: StopReason) -> Trajectory:
        turn = Turn((1,), (2,) * tokens, (-0.5,) * tokens, 0, 3.0, rewards={"a": 1.0, "b": 2.0})
        return Trajectory(str(i), Task("t", 0), i, (), (turn,), stop)

    job = GroupJob("r/0/t", Task("t", 0), 0, 2, 1.0)
    talks = (talk(0, 2, StopReason.COMPLETED), talk(1, 8, StopReason.MAX_TURNS))
    report, _ = report_on(job, TrajectoryGroup(Task("t", 0), talks))
    limits = ("rollout.max_turns=1", "rollout.max_turn_tokens=8", "grpo.reward_weights={a=0.5, b=1.5}")
    charged = policy_batch(collected(report), config("grpo.overlong_share=0.5", *limits))
    assert [a for [a] in credits(only(charged.updates))] == pytest.approx([0.5, -0.5])
    clamped = policy_batch(collected(report), config("grpo.truncated=clamp", *limits))
    assert credits(only(clamped.updates)) == [(1.75,), (-1.75,)]  # 0.5 * 1 + 1.5 * 2, against 0


def test_a_conversation_that_ends_before_a_reward_is_named_is_charged_in_full() -> None:
    """It earned 0 under the name, and bears that name's share of the penalty all the same."""
    turns = [Turn((1,), (2,) * n, (-0.5,) * n, 0, rewards=named) for n, named in ((2, {"a": 0.0}), (8, {}))]
    stops = (StopReason.COMPLETED, StopReason.MAX_TURNS)
    talks = [Trajectory(str(i), Task("t", 0), i, (), (turns[i],), stops[i]) for i in range(2)]
    report, _ = report_on(
        GroupJob("r/0/t", Task("t", 0), 0, 2, 1.0), TrajectoryGroup(Task("t", 0), tuple(talks))
    )
    limits = ("rollout.max_turns=1", "rollout.max_turn_tokens=8", "grpo.reward_weights={a=1.0, b=1.0}")
    batch = policy_batch(collected(report), config("grpo.overlong_share=0.5", *limits))
    assert [a for [a] in credits(only(batch.updates))] == pytest.approx([0.5, -0.5])
    assert batch.facts["rewards_named"] == ["a"]


_GROUP_KINDS = ("mean", "mean_std", "rloo", "max_rl")
_EARNED = st.lists(
    st.none() | st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=3),
    min_size=2,
    max_size=4,
)


@given(_EARNED, st.sampled_from(_GROUP_KINDS), st.sampled_from(get_args(CreditKind)), st.booleans())
def test_what_is_informative_is_what_has_an_advantage(
    earned: list[list[float] | None], kind: str, credit: str, cut: bool
) -> None:
    ends = [StopReason.ENVIRONMENT_ERROR, StopReason.COMPLETED, StopReason.MAX_TURNS]
    stops = [ends[reward is not None and 1 + cut] for reward in earned]
    report = played(earned, stops=stops)
    settings = config(f"grpo.advantage={kind}", f"grpo.credit={credit}", "grpo.truncated=mask")
    assert informative(report, settings) == bool(policy_batch(collected(report), settings).updates)


def test_every_turn_has_its_own_credit_where_that_is_asked_for() -> None:
    settings = config("grpo.credit=return_to_go")
    update = only(policy_batch(collected(played([[2.0, 0.0], [0.0, 1.0]])), settings).updates)
    assert credits(update) == [(0.5, -1.5), (-0.5, -0.5)]


def test_shuffled_rewards_are_those_of_the_group_and_the_books_balance() -> None:
    report = played([0.0, 1.0, 5.0, None])
    batch = policy_batch(collected(report), config("grpo.shuffle_rewards=true", "grpo.group_size=4"))
    plain = policy_batch(collected(report), config("grpo.group_size=4"))
    assert sorted(credits(only(batch.updates))) == sorted(credits(only(plain.updates)))
    assert batch.counts.dropped == {"environment_error": 1}


def test_the_warm_start_weighs_every_dialogue_token_alike() -> None:
    batch = supervised_batch(collected(played([1.0, None]), played([[0.0, 1.0], 0.5], name="b")))
    update = only(batch.updates)
    assert credits(update) == [(1.0,), (1.0, 1.0), (1.0,)]
    assert update.denominator == 8
    assert batch.counts.dropped == {"environment_error": 1}
    assert math.isclose(sum(sample.weight for sample in update.samples), 3)


@pytest.mark.parametrize(
    "batch", [lambda c: policy_batch(c, config()), supervised_batch], ids=["policy", "warm"]
)
@pytest.mark.parametrize(("masked", "says"), [(0, "holds 0"), (1, "holds 1"), (3, "holds 3")])
def test_bug_30_a_mask_that_is_not_what_was_sampled_stops_the_run(
    batch: Callable[[Collected], Batch], masked: int, says: str
) -> None:
    report = played([1.0, 0.0])
    assert [size.masked for size in report.sizes] == [2, 2]
    first, second = report.sizes
    wrong = replace(report, sizes=(first, replace(second, masked=masked)))
    with pytest.raises(RunError, match=f"sampled 2 tokens in a conversation, its loss mask {says}"):
        batch(collected(wrong))
    assert batch(collected(report)).updates
