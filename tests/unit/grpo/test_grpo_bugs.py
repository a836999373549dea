"""Known bugs of rewards, credit and objective elsewhere, each by its number in the list of known bugs.

Where a bug lies on the way from conversations to the gradient, the whole way is taken: turns -> samples
and their report -> advantages and weights -> loss.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple, get_args

import pytest
import torch

from stateset_ray.actors.credit import Batch, informative, policy_batch
from stateset_ray.actors.flight import Collected, GroupHandle
from stateset_ray.actors.jobs import Counts, GroupJob, GroupPayload, report_on
from stateset_ray.config import Config, load_config
from stateset_ray.errors import ConfigError
from stateset_ray.grpo.advantages import discounted, step_advantages
from stateset_ray.grpo.loss import Tokens, policy_loss
from stateset_ray.grpo.shaping import shaped
from stateset_ray.objective import AdvantageKind, ObjectiveConfig
from stateset_ray.types import Sample, StopReason, Task, Trajectory, TrajectoryGroup, Turn

KINDS = get_args(AdvantageKind)
PER_GROUP = ("mean", "mean_std", "rloo", "max_rl")
"""Kinds whose groups know nothing of each other."""


class Talk(NamedTuple):
    """A conversation: what its turns earned, how many tokens each has, whether each forks, how it ended."""

    rewards: tuple[float, ...]
    tokens: tuple[int, ...] = ()
    forks: bool = False
    stop: StopReason = StopReason.COMPLETED


def _group(talks: Sequence[Talk], name: str) -> GroupHandle:
    task = Task(name, 0)
    trajectories = []
    for index, talk in enumerate(talks):
        lengths = talk.tokens or (1,) * len(talk.rewards)
        turns = [
            Turn((1, 2), (3,) * length, (-0.5,) * length, 0, reward, forked=talk.forks and k > 0)
            for k, (reward, length) in enumerate(zip(talk.rewards, lengths, strict=True))
        ]
        trajectories.append(Trajectory(f"{name}/{index}", task, index, (), tuple(turns), talk.stop))
    job = GroupJob(f"r/0/{name}", task, 0, len(talks), 1.0)
    return GroupHandle(*report_on(job, TrajectoryGroup(task, tuple(trajectories))))


def _config(**grpo: Any) -> Config:
    return Config(grpo=ObjectiveConfig(**grpo))


def _batch(groups: Sequence[Sequence[Talk]], config: Config | None = None, **grpo: Any) -> Batch:
    handles = [_group(talks, str(index)) for index, talks in enumerate(groups)]
    counts = Counts(dispatched=sum(map(len, groups)))
    return policy_batch(Collected(handles, counts, 0), config or _config(**grpo))


class Gradient(NamedTuple):
    """What the log-probabilities of one sample are told: its trajectory's index, and numbers per token."""

    trajectory: int
    per_token: list[float]


def _gradients(batch: Batch, **grpo: Any) -> list[Gradient]:
    """The gradient of the step with respect to sampled tokens, as sampled by the current policy."""
    [update] = batch.updates
    result = []
    for ref in update.samples:
        assert isinstance(ref.payload, GroupPayload)
        row: Sample = ref.payload.samples[ref.size.trajectory][ref.size.row]
        row = row.credited(ref.advantages, ref.weight)
        mask = torch.from_numpy(row.loss_mask)
        logprobs = torch.from_numpy(row.logprobs)[mask].double().requires_grad_()
        tokens = Tokens(
            logprobs, logprobs.detach(), torch.from_numpy(row.advantages)[mask].double(),
            torch.full_like(logprobs, row.weight), torch.zeros(int(mask.sum()), dtype=torch.long), 1,
        )  # fmt: skip
        loss = policy_loss(tokens, ObjectiveConfig(**grpo), denominator=update.denominator).loss
        [gradient] = torch.autograd.grad(loss, logprobs)
        result.append(Gradient(ref.size.trajectory, (-update.denominator * gradient).tolist()))
    return result


def _advantages(groups: Sequence[Sequence[float | None]], kind: str, **parts: Any) -> list[list[Any]]:
    rewards = [[None if r is None else {"": [r]} for r in group] for group in groups]
    objective = ObjectiveConfig(advantage=kind, **parts)  # type: ignore[arg-type]
    return [[a and a[0] for a in group] for group in step_advantages(rewards, objective)]


@pytest.mark.parametrize(
    ("option", "neutral"),
    [
        ("top_p=0.9", "top_p=1.0"), ("top_k=50", "top_k=0"), ("min_p=0.05", "min_p=0.0"),
        ("repetition_penalty=1.1", "repetition_penalty=1.0"),
        ("presence_penalty=0.5", "presence_penalty=0.0"),
        ("frequency_penalty=-0.5", "frequency_penalty=0.0"),
    ],
)  # fmt: skip
def test_bug_11_sampling_from_a_changed_distribution_is_refused(option: str, neutral: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"rollout\.{name}.*bias every importance ratio"):
        load_config(None, [f"rollout.{option}"])
    assert load_config(None, [f"rollout.{neutral}"]) == Config()


@pytest.mark.parametrize("kind", KINDS)
def test_bug_13_a_failed_conversation_is_in_no_baseline_and_no_gradient(kind: str) -> None:
    groups = [[3.0, None, 1.0, 2.5, None], [0.5, 1.0]]
    ours = _advantages(groups, kind)
    assert [a is None for a in ours[0]] == [False, True, False, False, True]
    alive = [[r for r in group if r is not None] for group in groups]
    assert [[a for a in group if a is not None] for group in ours] == _advantages(alive, kind)
    # Though it earned something before it failed, nothing of it is learned.
    lost = Talk((5.0,), stop=StopReason.TIMEOUT)
    batch = _batch([[Talk((1.0,)), lost, Talk((0.0,))]], advantage=kind)
    assert [g.trajectory for g in _gradients(batch)] == [0, 2]
    assert batch.counts.dropped == {"timeout": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_bug_14_the_baseline_counts_each_rollout_once_when_it_fans_out(kind: str, aggregation: str) -> None:
    # Of three samples and of one, the same conversations: nothing may depend on it.
    def talks(forks: bool) -> list[list[Talk]]:
        first = Talk((0.5, 0.0, 1.0), (2, 1, 3), forks)
        return [[first, Talk((0.25,), (2,)), Talk((0.0,), (1,))], [Talk((1.0,)), Talk((0.0,))]]

    parts = {"advantage": kind, "aggregation": aggregation}
    alone, fanned = (_batch(talks(forks), **parts) for forks in (False, True))
    assert len(alone.updates[0].samples) + 2 == len(fanned.updates[0].samples)
    assert alone.updates[0].denominator == fanned.updates[0].denominator
    assert alone.counts == fanned.counts

    def by_token(batch: Batch) -> list[float]:
        return [x for gradient in _gradients(batch, **parts) for x in gradient.per_token]

    assert by_token(fanned) == pytest.approx(by_token(alone), rel=1e-12)
    if kind == "mean":
        # Returns 1.5, 0.25 and 0: the mean is that of three rollouts, not of five samples.
        assert fanned.updates[0].samples[0].advantages == pytest.approx([1.5 - 1.75 / 3] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_bug_15_a_group_stays_a_group_and_none_has_one_member(kind: str) -> None:
    ours = _advantages([[7.0], [None, 7.0], [1.0, 0.5]], kind)
    assert ours[:2] == [[None], [None, None]]
    assert all(ours[2])
    # Groups of one task, played in one step, are two groups all the same.
    pairs = [[1.0, 0.0], [5.0, 4.0]]
    if kind in PER_GROUP:
        assert _advantages(pairs, kind) == [*_advantages(pairs[:1], kind), *_advantages(pairs[1:], kind)]
    batch = _batch([[Talk((1.0,)), Talk((0.0,))], [Talk((7.0,)), Talk((7.0,), stop=StopReason.TIMEOUT)]])
    assert {ref.group for ref in batch.updates[0].samples} == {0}
    assert batch.counts.dropped == {"group_too_small": 1, "timeout": 1}


def test_bug_16_the_filter_judges_rollouts_and_not_the_samples_they_became() -> None:
    # Two rollouts of equal return, whose samples earned differently: there is nothing to learn.
    equal = [Talk((0.0, 1.0), forks=True), Talk((1.0, 0.0), forks=True)]
    assert not informative(_group(equal, "a").report, _config())
    batch = _batch([equal])
    assert batch.updates == []
    assert batch.counts.filtered == 2
    # The last turn's credit is 0 and the first one's is not: the rollout is kept whole.
    uneven = [Talk((1.0, 0.5), forks=True), Talk((-0.5,))]
    batch = _batch([uneven], credit="return_to_go")
    assert [ref.advantages for ref in batch.updates[0].samples] == [(1.0, 0.0), (1.0, 0.0), (-1.0,)]
    assert batch.counts.trained == 2


@pytest.mark.parametrize("kind", KINDS)
def test_bug_17_what_is_filtered_or_rejected_leaks_into_no_baseline(kind: str) -> None:
    group = [1.0, 0.5, 0.25]
    alone = _advantages([group], kind)[0]
    # Rejected: too few survivors.
    assert _advantages([[9.0], group, [None, -9.0]], kind)[1] == alone
    # Filtered: equal rewards, which have a gradient of 0. (A baseline over the batch has them on purpose.)
    if kind in PER_GROUP:
        assert _advantages([[9.0, 9.0], group, [-3.0] * 4], kind)[1] == alone
    # Replaced, where the step asked for one group and a refill brought another.
    if kind not in PER_GROUP:
        return  # there, equal rewards are compared with other groups' and nothing is replaced for them
    config = load_config(None, ["train.tasks_per_step=1", f"grpo.advantage={kind}", "grpo.refills=1"])
    talks = [Talk((reward,)) for reward in group]
    batch = _batch([[Talk((9.0,)), Talk((9.0,))], talks], config)
    assert [ref.advantages[0] for ref in batch.updates[0].samples] == pytest.approx(alone)
    assert batch.counts.filtered == 2
    # Neither do its tokens count where the loss is divided by them.
    assert batch.updates[0].denominator == _batch([talks], config).updates[0].denominator


@pytest.mark.parametrize("kind", KINDS)
def test_bug_18_rewards_are_normalized_once(kind: str) -> None:
    # From the conversation to the gradient: a token is told the advantage, divided by a spread once at most.
    values = [0.0, 10.0, 20.0, 70.0]
    std = math.sqrt(sum((v - 25) ** 2 for v in values) / 3)
    scale = {"mean": 1.0, "rloo": 0.75, "max_rl": 25.0}.get(kind, std + 1e-4)
    batch = _batch([[Talk((value,), (3,)) for value in values]], advantage=kind)
    for gradient, value in zip(_gradients(batch), values, strict=True):
        assert gradient.per_token == pytest.approx([(value - 25) / scale] * 3, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, 0.1 * 3, 0.7, 1 / 3, 0.0, -0.1])
def test_bug_19_equal_rewards_have_an_advantage_of_exactly_zero(kind: str, value: float) -> None:
    # The mean of three times 0.1 is not 0.1 in binary, and would leave a gradient of rounding errors.
    for n in (2, 3, 7, 10):
        groups = [[value] * n] if kind == "reinforce_pp" else [[value] * n, [0.1, 0.2, 0.7]]
        assert _advantages(groups, kind)[0] == [0.0] * n
    batch = _batch([[Talk((value, value))] * 3], advantage=kind)
    assert batch.updates == []
    assert batch.counts.filtered == 3


@pytest.mark.parametrize("truncated", [False, True])
def test_bug_45_turn_rewards_sum_to_the_rollouts_reward(truncated: bool) -> None:
    rewards = (0.5, -0.25, 2.0)
    stop = StopReason.MAX_TURNS if truncated else StopReason.COMPLETED
    report = _group([Talk(rewards, stop=stop)], "a").report
    [turns] = report.turn_rewards
    assert turns is not None
    assert sum(turns[""]) == report.rewards[0] == discounted(turns[""], 1.0)[0] == 2.25
    clamp = ObjectiveConfig(truncated="clamp")
    trained = shaped(turns[""], truncated=truncated, penalty=0.0, objective=clamp)
    assert sum(trained) == (0.0 if truncated else 2.25)
    # What a turn answers for loses what earlier turns earned, and no more.
    [[mine, _]] = step_advantages([[{"": rewards}, {"": [0.25]}]], ObjectiveConfig(credit="return_to_go"))
    assert mine == (1.0, 0.5, 0.75)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("n", [2, 4])
def test_bug_45_no_bias_by_turn_index(n: int, p: float) -> None:
    # One choice: stop, for 1.0, or go on, for 0.3 and then 2.0. To go on is worth 1.3 more, so that the
    # expected gradient with respect to the logit of going on is p (1 - p) 1.3, over all groups that happen.
    stop, go_on = (1.0,), (0.3, 2.0)
    objective = ObjectiveConfig(credit="return_to_go", advantage="rloo")
    expected = 0.0
    for choices in product((0, 1), repeat=n):
        chance = p ** sum(choices) * (1 - p) ** (n - sum(choices))
        [credits] = step_advantages([[{"": (stop, go_on)[choice]} for choice in choices]], objective)
        for choice, turns in zip(choices, credits, strict=True):
            assert turns is not None
            expected += chance / n * (choice - p) * turns[0]  # only the first turn's choice is free
    assert expected == pytest.approx(p * (1 - p) * 1.3, rel=1e-12)


def test_bug_46_a_tokens_weight_does_not_depend_on_its_own_rollouts_length() -> None:
    # The same reward for long and short, in one turn and in many: every token is told the same.
    better = [Talk((1.0,), (2,)), Talk((1.0,), (12,)), Talk((0.0, 0.0, 1.0), (4, 4, 4))]
    batch = _batch([[*better, Talk((0.0,), (3,))]])
    gradients = _gradients(batch)
    assert [len(gradient.per_token) for gradient in gradients] == [2, 12, 12, 3]
    told = [{round(x, 6) for x in gradient.per_token} for gradient in gradients]
    assert told == [{0.25}, {0.25}, {0.25}, {-0.75}]


def test_bug_50_the_deviation_divides_by_n_minus_one() -> None:
    assert _advantages([[0.0, 1.0]], "mean_std")[0] == pytest.approx(
        [-0.5 / (0.70710678 + 1e-4), 0.5 / (0.70710678 + 1e-4)], rel=1e-7
    )
    # TRL's estimator, and not numpy's, over a batch as well.
    rewards = torch.tensor([[0.0, 1.0, 4.0], [2.0, 2.0, 7.0]], dtype=torch.float64)
    centred = rewards - rewards.mean(1, keepdim=True)
    for kind, std in {"batch_std": rewards.std(), "reinforce_pp_baseline": centred.std()}.items():
        for mine, theirs in zip(_advantages(rewards.tolist(), kind), centred / (std + 1e-4), strict=True):
            assert mine == pytest.approx(theirs.tolist(), rel=1e-12)
