"""Where learning cannot work: named problems of a step, each with its mend. Pure functions of its record.

The thresholds are of the field's experience (see each problem); they warn, and stop the run only where what
is computed cannot be what was meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stateset_ray.config import Config

__all__ = ["Problem", "diagnose"]

_MISMATCH_WARNS = 0.05
"""Nats per token. Dense models are at 2e-4, mixtures at 2e-3; a tokenization bug was seen at 0.09."""
_MISMATCH_STOPS = 1.0
"""Nats per token: the learner scores something else than was sampled."""
_CLIPPED = 0.5
"""Share of the tokens whose gradient the clip removed."""
_FEW_SAMPLES = 0.1
"""Effective share of the samples under the off-policy weights."""
_LOW_ENTROPY = 1e-3
"""Nats per token: the policy says the same whatever it is asked."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that keeps a run from learning.

    Attributes:
        name: stable, for programs.
        text: what was seen.
        mend: what to do.
        fatal: the run must stop: what it computes cannot be what was meant.
    """

    name: str
    text: str
    mend: str
    fatal: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def diagnose(record: Mapping[str, Any], config: Config) -> list[Problem]:
    """The problems that the record of one step shows.

    Args:
        record: a line of `metrics.jsonl` (`actors.record.step_record`).
    """
    return [*_of_rewards(record, config), *_of_rollouts(record, config), *_of_update(record, config)]


def _of_rewards(record: Mapping[str, Any], config: Config) -> Iterator[Problem]:
    # A baseline over the batch still compares groups whose members are alike.
    teaches = config.grpo.advantage == "reinforce_pp" and record["reward_std"] > 0
    if record.get("equal_reward_share") == 1.0 and not teaches:
        mean = record["reward_mean"]
        size = config.grpo.group_size
        yield Problem(
            "equal_rewards",
            f"all groups have equal rewards, because every conversation of a group earned the same (mean "
            f"{mean:.3g}, spread over all {record['reward_std']:.3g}): this step teaches nothing",
            "a task that always or never succeeds teaches nothing: make it harder or easier, give partial "
            f"credit, warm-start, raise grpo.group_size (it is {size}) or set grpo.refills",
        )

    named = record.get("rewards_named", ())
    if unheard := [name for name in config.grpo.reward_weights if name not in named]:
        yield Problem(
            "reward_not_named",
            f"grpo.reward_weights has {unheard}, which counts as 0: no conversation of this step named it "
            f"(Step.rewards); they named {list(named) or 'nothing'}",
            "mend the name; where it is given only at the end, let conversations end (rollout.max_turns)",
        )


def _of_rollouts(record: Mapping[str, Any], config: Config) -> Iterator[Problem]:
    reasons = record["stop_reasons"]
    total = max(1, sum(reasons.values()))
    failed = sum(n for r, n in reasons.items() if r.endswith("_error") or r == "timeout")
    if record["tokens_per_trajectory"]["mean"] == 0 and failed < sum(reasons.values()):
        yield Problem(
            "nothing_sampled",
            f"the policy sampled not one token in {total} conversations, so that every loss mask is all "
            f"zero; they ended as {', '.join(map(repr, reasons))}",
            "where it is 'context', the opening leaves no room in rollout.max_context; where it is "
            "'sampled_tokens', raise rollout.max_sampled_tokens",
            fatal=record["step"] == 0,  # nothing was ever learned; later it may be these tasks
        )
    if record.get("truncated_share", 0) > 0.9:
        most = max(reasons, key=lambda name: reasons[name])
        yield Problem(
            "all_truncated",
            f"{record['truncated_share']:.0%} of the conversations were cut by a limit, mostly {most!r}: the "
            "policy is graded on what it could not finish",
            "raise that limit of [rollout], or teach the policy to stop (warm start, grpo.overlong_share)",
        )
    if failed / total > 0.5:
        yield Problem(
            "most_failed",
            f"{failed} of {total} conversations failed and count for nothing: {record['errors'][:1]}",
            "mend the environment or its time limits; see `errors` in metrics.jsonl",
        )


def _of_update(record: Mapping[str, Any], config: Config) -> Iterator[Problem]:
    update = record["update"]
    mismatch = update.get("kl_mismatch_k3", 0.0)
    # Old data is far from the policy for a good reason: then the clip and the correction answer for it.
    old = config.train.updates_per_step > 1 or bool(record["staleness"]["max"])
    if mismatch > _MISMATCH_WARNS and not old:
        yield Problem(
            "sampler_disagrees",
            f"sampler and trainer disagree by {mismatch:.3g} nats per token on what was sampled: "
            "tokenization, temperature or weights are not the same on both sides",
            "compare one conversation of trajectories.jsonl with the learner's log-probabilities; check "
            "model.dtype on both sides",
            fatal=mismatch > _MISMATCH_STOPS,
        )
    clipped = update.get("clip_fraction_low", 0.0) + update.get("clip_fraction_high", 0.0)
    if clipped > _CLIPPED:
        yield Problem(
            "mostly_clipped",
            f"the clip removed the gradient of {clipped:.0%} of the tokens",
            "lower learner.learning_rate or train.updates_per_step, or widen grpo.clip_low and clip_high",
        )
    if update.get("effective_sample_share", 1.0) < _FEW_SAMPLES:
        yield Problem(
            "few_effective_samples",
            f"the off-policy weights leave {update['effective_sample_share']:.1%} of the samples effective",
            "let rollouts be less stale, or lower grpo.correction_high",
        )
    entropy = update.get("entropy")
    if entropy is not None and entropy < _LOW_ENTROPY:
        yield Problem(
            "entropy_collapsed",
            f"the policy's entropy is {entropy:.2g} nats per token: it no longer tries anything else",
            "raise rollout.temperature or grpo.entropy_coef, lower learner.learning_rate, or stop here",
        )
    norm = update.get("grad_norm")
    if norm is not None and norm == 0 and not math.isnan(norm):
        yield Problem(
            "no_gradient",
            "the gradient is exactly 0 although there were samples to learn from",
            "look at learner.freeze, at the advantages and at the clip",
        )
