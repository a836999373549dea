"""From what was collected to what is learned: advantages, weights, and the account of trajectories.

Only metadata is touched here; the samples stay where they are.

How tokens are weighed against each other (`grpo.aggregation`) is a weight per sample and one denominator per
optimizer step, both known from lengths:

    token_mean      weight 1                                denominator: sampled tokens of all trajectories
    sequence_mean   1 / sampled tokens of its trajectory    trajectories
    constant        weight 1                                trajectories * the longest a conversation may be

All scorable trajectories of the step are in the denominator, those without gradient included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from stateset_ray.actors.flight import Collected, GroupHandle
from stateset_ray.actors.jobs import Counts, GroupReport
from stateset_ray.actors.learner_rank import SampleRef, UpdateBatch
from stateset_ray.config import Config
from stateset_ray.errors import RunError
from stateset_ray.grpo.advantages import Rewards, shuffled, step_advantages
from stateset_ray.grpo.shaping import overlong_penalty, shaped
from stateset_ray.metrics import spread
from stateset_ray.types import derive_seed

__all__ = ["Batch", "informative", "longest_conversation", "policy_batch", "supervised_batch"]

_Credit = Sequence[tuple[float, ...] | None]


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        updates: one for each optimizer step; empty where nothing has a gradient.
        counts: every trajectory that was dispatched, accounted for.
        facts: for the metrics: advantages, groups of equal rewards.
    """

    updates: list[UpdateBatch]
    counts: Counts
    facts: dict[str, Any]


def longest_conversation(config: Config) -> int:
    """The most tokens that the policy can sample in one conversation."""
    limits = config.rollout
    return min(limits.max_turns * limits.max_turn_tokens, limits.max_sampled_tokens, limits.max_context - 1)


def informative(report: GroupReport, config: Config) -> bool:
    """Whether a group has something to teach: at least two that can be compared, and that differ.

    Where the baseline is the batch's (`reinforce_pp`), a group of equal rewards teaches as well.
    """
    if sum(reward is not None for reward in report.rewards) < 2:
        return False
    if config.grpo.advantage == "reinforce_pp":
        return True
    return _any(_without_truncated(report, _compared(report, config), config))


def _compared(report: GroupReport, config: Config) -> _Credit:
    """The advantages of a group by itself, up to their scale."""
    objective = config.grpo
    if objective.advantage != "max_rl":  # of the others the group's mean decides; the batch only scales
        objective = objective.model_copy(update={"advantage": "mean"})
    [credit] = step_advantages([_shaped(report, config)], objective)
    return credit


def _any(credit: _Credit) -> bool:
    return any(any(advantages) for advantages in credit if advantages)


def policy_batch(collected: Collected, config: Config) -> Batch:
    """GRPO: each turn's credit is its advantage, compared within the group or the step.

    With a KL to the reference, an entropy bonus or DPPO's penalty every scorable trajectory has a gradient;
    without, those of advantage 0 are filtered. Where groups were replaced (`grpo.refills`), the step keeps
    `train.tasks_per_step` of them, those that teach something first.

    Raises:
        RunError: a conversation's loss mask is not what was sampled in it, or the account does not balance.
    """
    _check_masks(collected.groups)
    objective = config.grpo
    chosen, left = _chosen(collected.groups, config)
    rewards = [_shaped(handle.report, config) for handle in chosen]
    if objective.shuffle_rewards:
        rewards = [
            shuffled(group, derive_seed(handle.report.job.seed, "shuffle"))
            for group, handle in zip(rewards, chosen, strict=True)
        ]
    credits = [
        _without_truncated(handle.report, credit, config)
        for handle, credit in zip(chosen, step_advantages(rewards, objective), strict=True)
    ]
    penalized = objective.loss == "dppo" and objective.log_ratio_penalty > 0
    keep_all = objective.kl_coef > 0 or objective.entropy_coef > 0 or penalized
    counts = collected.counts
    for handle, credit in zip(chosen, credits, strict=True):
        _account(counts, handle.report, credit, keep_all=keep_all)
    for handle in left:
        scored = [reward is not None for reward in handle.report.rewards]
        _account(counts, handle.report, [(0.0,) if s and sum(scored) > 1 else None for s in scored])
    parts = min(config.train.updates_per_step, max(1, len(chosen)))
    updates = [
        _update(chosen[part::parts], credits[part::parts], config, keep_all=keep_all) for part in range(parts)
    ]
    _check(counts)
    facts = _facts(collected, [a for credit in credits for a in credit if a is not None], config)
    return Batch([update for update in updates if update.samples], counts, facts)


def supervised_batch(collected: Collected) -> Batch:
    """Warm start: every dialogue that the expert finished counts alike.

    Raises:
        RunError: see `policy_batch`.
    """
    _check_masks(collected.groups)
    samples, masked = [], 0
    for index, handle in enumerate(collected.groups):
        report = handle.report
        credit = [
            None if reward is None else (1.0,) * turns
            for reward, turns in zip(report.rewards, report.turns, strict=True)
        ]
        _account(collected.counts, report, credit)
        for size in report.sizes:
            value = credit[size.trajectory]
            if value is not None and size.masked:
                masked += size.masked
                samples.append(SampleRef(handle.payload, size, value, 1.0, index))
    _check(collected.counts)
    return Batch([UpdateBatch(samples, float(masked))] if samples else [], collected.counts, {})


def _chosen(groups: Sequence[GroupHandle], config: Config) -> tuple[list[GroupHandle], list[GroupHandle]]:
    """The groups of the step, and those that were replaced, both in the order they were asked for."""
    # With over-sampling a group of the step before may have come on top: nothing that ended is left out.
    wanted = config.train.tasks_per_step + config.train.oversample
    if len(groups) <= wanted:
        return list(groups), []
    ranked = sorted(range(len(groups)), key=lambda i: (not informative(groups[i].report, config), i))
    kept = set(ranked[:wanted])
    return (
        [group for i, group in enumerate(groups) if i in kept],
        [group for i, group in enumerate(groups) if i not in kept],
    )


def _shaped(report: GroupReport, config: Config) -> list[Rewards | None]:
    """What each trajectory is trained on: its turn rewards, with limits and overlong replies charged."""
    objective, limit = config.grpo, longest_conversation(config)
    weights = objective.reward_weights
    # Named rewards bear the penalty together: unscaled, their weighted sum loses exactly the penalty.
    share = 1 / sum(weights.values()) if weights and objective.overlong_share else 1.0
    rewards: list[Rewards | None] = []
    for earned, truncated, sampled in zip(report.turn_rewards, report.truncated, report.sampled, strict=True):
        if earned is None:
            rewards.append(None)
            continue
        penalty = overlong_penalty(sampled, limit, objective)
        unheard = (0.0,) * len(earned[""])
        rewards.append({
            name: shaped(
                turns, truncated=truncated, penalty=penalty * (share if name else 1.0), objective=objective
            )
            for name, turns in {**dict.fromkeys(weights, unheard), **earned}.items()
        })  # fmt: skip
    return rewards


def _without_truncated(report: GroupReport, credit: _Credit, config: Config) -> _Credit:
    """With `truncated = "mask"`, conversations that a limit ended stay in the baseline but teach nothing.

    Their credit is empty: neither an advantage nor a KL, a bonus or a penalty has a gradient there.
    """
    if config.grpo.truncated != "mask":
        return credit
    return [() if a is not None and cut else a for a, cut in zip(credit, report.truncated, strict=True)]


def _account(counts: Counts, report: GroupReport, credit: _Credit, *, keep_all: bool = False) -> None:
    """Book the end of every trajectory of a group."""
    for reason, reward, sampled, value in zip(
        report.stop_reasons, report.rewards, report.sampled, credit, strict=True
    ):
        if value is None:
            # A scorable trajectory without an advantage had no one left to be compared with.
            counts.dropped[reason if reward is None else "group_too_small"] += 1
        elif sampled and value and (any(value) or keep_all):
            counts.trained += 1
        else:
            counts.filtered += 1


def _update(
    handles: Sequence[GroupHandle], credits: Sequence[_Credit], config: Config, *, keep_all: bool
) -> UpdateBatch:
    """One optimizer step's samples with their credit and weights, and its denominator."""
    how = config.grpo.aggregation
    samples: list[SampleRef] = []
    tokens = trajectories = 0
    for index, (handle, credit) in enumerate(zip(handles, credits, strict=True)):
        report = handle.report
        masked = _masked(report)
        scored = [i for i, value in enumerate(credit) if value is not None and masked[i]]
        tokens += sum(masked[i] for i in scored)
        trajectories += len(scored)
        for size in report.sizes:
            value = credit[size.trajectory]
            if not value or not size.masked or not (any(value) or keep_all):
                continue
            weight = 1 / masked[size.trajectory] if how == "sequence_mean" else 1.0
            samples.append(SampleRef(handle.payload, size, value, weight, index, report.prefix))
    longest = longest_conversation(config)
    denominators = {
        "token_mean": tokens, "sequence_mean": trajectories, "constant": trajectories * longest,
    }  # fmt: skip
    return UpdateBatch(samples, float(denominators[how]))


def _facts(collected: Collected, advantages: Sequence[tuple[float, ...]], config: Config) -> dict[str, Any]:
    reports = [handle.report for handle in collected.groups]
    scored = [r for r in reports if sum(reward is not None for reward in r.rewards) > 1]
    named = {name for report in reports for earned in report.turn_rewards for name in earned or ()}
    equal = sum(not _any(_compared(report, config)) for report in scored)
    values = list(chain.from_iterable(advantages))
    return {
        "groups": len(reports),
        "equal_reward_groups": equal,
        "equal_reward_share": equal / len(scored) if scored else None,
        "rewards_named": sorted(named - {""}),
        "advantages": {
            **spread(values), "min": min(values, default=None), "max": max(values, default=None),
        },
        "samples_per_trajectory": spread(list(chain.from_iterable(map(_rows, reports))))["mean"],
        "truncated_share": spread([float(t) for r in reports for t in r.truncated])["mean"],
    }  # fmt: skip


def _rows(report: GroupReport) -> Iterator[float]:
    for index in range(len(report.rewards)):
        yield float(sum(size.trajectory == index for size in report.sizes))


def _masked(report: GroupReport) -> list[int]:
    """Tokens that are learned from, per trajectory, in all of its samples together."""
    masked = [0] * len(report.sampled)
    for size in report.sizes:
        masked[size.trajectory] += size.masked
    return masked


def _check_masks(groups: Sequence[GroupHandle]) -> None:
    """Every sampled token is learned from once; a mask that is all zero would only seem to teach.

    Raises:
        RunError: the masks of a conversation hold more or fewer tokens than the policy sampled in it.
    """
    for report in (handle.report for handle in groups):
        for index, (masked, sampled) in enumerate(zip(_masked(report), report.sampled, strict=True)):
            if masked != sampled:
                raise RunError(
                    f"the policy sampled {sampled} tokens in a conversation, its loss mask holds {masked}",
                    given=f"{report.job.id}, conversation {index}, {report.stop_reasons[index]}",
                    mend="this is a bug of stateset_ray: please report it with the run folder",
                )


def _check(counts: Counts) -> None:
    if not counts.balanced:
        raise RunError(
            "the account of trajectories does not balance: some were lost or counted twice",
            given=counts.as_dict(),
            mend="this is a bug of stateset_ray: please report it with the run folder",
        )
