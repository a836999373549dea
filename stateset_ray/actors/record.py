"""What `metrics.jsonl` says of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from stateset_ray.actors.credit import Batch
from stateset_ray.actors.flight import Collected
from stateset_ray.metrics import spread

__all__ = ["step_record"]

_HEADLINES = ("loss", "grad_norm", "learning_rate", "entropy", "kl_mismatch")


def step_record(
    step: int,
    version: int,
    learned_with: int,
    collected: Collected,
    batch: Batch,
    update: Mapping[str, float],
    seconds: Mapping[str, float],
    *,
    playing: float,
) -> dict[str, Any]:
    """One step as plain JSON types.

    Args:
        step: counted from 0.
        version: of the policy, after the step.
        learned_with: version that the step's first optimizer step began with.
        collected: what was played, the groups included that were replaced.
        batch: what was learned from.
        update: what the learner said; {} if there was nothing to learn.
        seconds: by phase.
        playing: seconds in which the step's worth of conversations was played.
    """
    reports = [handle.report for handle in collected.groups]
    rewards = spread([r for report in reports for r in report.rewards if r is not None])
    sampled = [n for report in reports for n in report.sampled]
    turns = [n for report in reports for n in report.turns]
    stale = [float(learned_with - v) for report in reports for v in report.oldest if v is not None]
    return {
        "step": step,
        "policy_version": version,
        "reward_mean": rewards["mean"],
        "reward_std": rewards["std"],
        **{name: update.get(name) for name in _HEADLINES},
        "update": dict(update),
        **batch.facts,
        "tokens_per_trajectory": spread([float(n) for n in sampled]),
        "turns_per_trajectory": spread([float(n) for n in turns]),
        "stop_reasons": dict(Counter(s for report in reports for s in report.stop_reasons)),
        "errors": [e for report in reports for e in report.errors][:5],
        "trajectories": batch.counts.as_dict(),
        "staleness": {**spread(stale), "max": max(stale, default=None)},
        "worker_restarts": collected.restarts,
        "rollout_tokens_per_second": sum(sampled) / max(playing, 1e-9),
        # Of the trajectories, whatever was computed only once for several of them.
        "learner_tokens_per_second": update.get("tokens_unshared", 0.0) / max(seconds["learner"], 1e-9),
        "seconds": dict(seconds),
    }
