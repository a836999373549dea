"""What a step came to, in RLlib's names: metrics, and conversations as episodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_LEN_MAX,
    EPISODE_LEN_MEAN,
    EPISODE_LEN_MIN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_TRAINED,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_EPISODES,
    NUM_EPISODES_LIFETIME,
    TIMERS,
    WEIGHTS_SEQ_NO,
)

from stateset_ray.actors.evaluation import Evaluation
from stateset_ray.actors.jobs import GroupReport
from stateset_ray.types import StopReason, Trajectory

__all__ = ["episode_of", "evaluated", "log_played", "log_step"]

_UPDATE = {
    "loss": "total_loss",
    "grad_norm": "gradients_default_optimizer_global_norm",
    "learning_rate": "default_optimizer_learning_rate",
}
"""What the learner says -> how RLlib calls it; the rest keeps its name."""

_SPREAD = {
    "mean": (EPISODE_RETURN_MEAN, EPISODE_LEN_MEAN),
    "min": (EPISODE_RETURN_MIN, EPISODE_LEN_MIN),
    "max": (EPISODE_RETURN_MAX, EPISODE_LEN_MAX),
}


def log_played(metrics: Any, reports: Sequence[GroupReport]) -> None:
    """Count the conversations that could be scored: an episode each, a reply being a step of its environment.

    Means are over the iteration, so that `episode_return_mean` is the `reward_mean` of `metrics.jsonl`.
    """
    played = [
        (reward, turns)
        for report in reports
        for reward, turns in zip(report.rewards, report.turns, strict=True)
        if reward is not None
    ]
    for reward, turns in played:
        for reduce, (returned, length) in _SPREAD.items():
            metrics.log_value((ENV_RUNNER_RESULTS, returned), reward, reduce=reduce)
            metrics.log_value((ENV_RUNNER_RESULTS, length), turns, reduce=reduce)
    steps = sum(turns for _, turns in played)
    for name, lifetime, count in (
        (NUM_ENV_STEPS_SAMPLED, NUM_ENV_STEPS_SAMPLED_LIFETIME, steps),
        (NUM_EPISODES, NUM_EPISODES_LIFETIME, len(played)),
    ):
        metrics.log_value((ENV_RUNNER_RESULTS, name), count, reduce="sum")
        metrics.log_value((ENV_RUNNER_RESULTS, lifetime), count, reduce="lifetime_sum", with_throughput=True)
    tokens = sum(sum(report.sampled) for report in reports)
    metrics.log_value((ENV_RUNNER_RESULTS, "num_tokens_sampled"), tokens, reduce="sum")


def log_step(metrics: Any, record: Mapping[str, Any], turns_trained: int) -> None:
    """What the learner said of a step, and the rest of its record under `grpo`.

    Args:
        record: a line of `metrics.jsonl`.
        turns_trained: replies in the conversations that were learned from.
    """
    module = (LEARNER_RESULTS, DEFAULT_MODULE_ID)
    for name, value in record["update"].items():
        metrics.log_value((*module, _UPDATE.get(name, name)), value, reduce="item")
    metrics.log_value((*module, WEIGHTS_SEQ_NO), record["policy_version"], reduce="item")
    everything = (LEARNER_RESULTS, ALL_MODULES)
    metrics.log_value((*everything, NUM_ENV_STEPS_TRAINED), turns_trained, reduce="sum")
    metrics.log_value((*everything, NUM_ENV_STEPS_TRAINED_LIFETIME), turns_trained, reduce="lifetime_sum")
    for phase, seconds in record["seconds"].items():
        metrics.log_value((TIMERS, phase), seconds, reduce="item")
    rest = {k: v for k, v in record.items() if k not in ("update", "seconds", "event", "seconds_left")}
    for path, value in _numbers(rest):
        metrics.log_value(("grpo", *path), value, reduce="item")


def _numbers(
    values: Mapping[str, Any], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*place, name))
        elif isinstance(value, int | float):
            yield (*place, name), value


def evaluated(result: Evaluation) -> dict[str, Any]:
    """An evaluation, as RLlib reports one."""
    scored = [reward for reward in result.rewards.values() if reward is not None]
    facts = result.as_dict()
    return {
        ENV_RUNNER_RESULTS: {
            EPISODE_RETURN_MEAN: fmean(scored),
            EPISODE_RETURN_MIN: min(scored),
            EPISODE_RETURN_MAX: max(scored),
            NUM_EPISODES: len(scored),
        },
        "num_failed": facts["failed"],
        "stop_reasons": facts["stop_reasons"],
    }


def episode_of(trajectory: Trajectory) -> SingleAgentEpisode:
    """A conversation as RLlib's callbacks know one: observations and actions are text.

    An observation is all that was said since the reply before; the last is empty where nothing was. A reply's
    log-probability is `action_logp` among the extra model outputs.
    """
    turns = trajectory.turns
    opening = sum(m.role == "assistant" for m in trajectory.messages) - len(turns)  # replies set by the task
    said: list[list[str]] = [[]]
    replies: list[str] = []
    for message in trajectory.messages:
        if message.role != "assistant" or opening > 0:
            opening -= message.role == "assistant"
            said[-1].append(message.content)
        else:
            replies.append(message.content)
            said.append([])
    return SingleAgentEpisode(
        trajectory.id,
        observations=["\n".join(texts) for texts in said],
        actions=replies,
        rewards=[turn.reward for turn in turns],
        infos=[*({} for _ in turns), dict(trajectory.info)],
        terminated=trajectory.stop_reason is StopReason.COMPLETED,
        truncated=trajectory.stop_reason.truncated,
        extra_model_outputs={"action_logp": [sum(turn.logprobs) for turn in turns]},
        len_lookback_buffer=0,
    )
