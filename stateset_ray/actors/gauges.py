"""What Ray exports of a run: one table of metrics, fed from the events that the controller tells.

Ray puts `ray_` before each name and exports them on the controller's node, beside its own. They cost some
microseconds a step; with `cluster.metrics = false` there are none, and nothing of this runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray.util import metrics as ray_metrics

from stateset_ray.config import Config
from stateset_ray.metrics import Metric

__all__ = ["METRICS", "Gauges", "exported"]

_OnEvent = Callable[[Mapping[str, Any]], None]

METRICS: Mapping[str, Metric] = {
    "steps": Metric("stateset_train_steps_total", "counter", "Steps taken, those taken again included."),
    "step": Metric("stateset_train_step", "gauge", "Steps done, of those that are left in the end."),
    "planned": Metric("stateset_train_steps_planned", "gauge", "Steps that the run is to take."),
    "version": Metric("stateset_train_policy_version", "gauge", "Version of the policy after the last step."),
    "reward": Metric("stateset_train_reward_mean", "gauge", "Mean reward of the last step's trajectories."),
    "reward_spread": Metric("stateset_train_reward_std", "gauge", "Their standard deviation."),
    "heldout": Metric("stateset_train_heldout_reward", "gauge", "Mean reward of the last evaluation."),
    "loss": Metric("stateset_train_loss", "gauge", "Loss of the last step."),
    "grad_norm": Metric("stateset_train_grad_norm", "gauge", "Norm of its gradient before clipping."),
    "entropy": Metric("stateset_train_entropy", "gauge", "Entropy of the policy, nats per token."),
    "kl_mismatch": Metric(
        "stateset_train_kl_mismatch", "gauge", "KL between sampler and trainer, nats per token."
    ),
    "phase_seconds": Metric("stateset_train_phase_seconds", "gauge", "Seconds of the last step.", ("phase",)),
    "learner_speed": Metric(
        "stateset_train_tokens_per_second", "gauge", "Tokens that the learner ranks learned from, together."
    ),
    "warnings": Metric("stateset_train_warnings_total", "counter", "Warnings by name.", ("name",)),
    "rebuilds": Metric(
        "stateset_train_learner_rebuilds_total", "counter", "How often the learner ranks were built anew."
    ),
    "rollout_speed": Metric(
        "stateset_rollout_tokens_per_second", "gauge", "Tokens that all workers sampled, together."
    ),
    "staleness": Metric(
        "stateset_rollout_staleness_mean", "gauge", "Versions between playing and learning, on average."
    ),
    "stalest": Metric("stateset_rollout_staleness_max", "gauge", "The same, at most."),
    "dispatched": Metric(
        "stateset_rollout_dispatched_total", "counter", "Trajectories sent to a worker, each attempt counted."
    ),
    "ended": Metric(
        "stateset_rollout_trajectories_total",
        "counter",
        "Dispatched trajectories by how they ended, and why; all together they are as many.",
        ("end", "reason"),
    ),
    "worker_deaths": Metric(
        "stateset_rollout_worker_deaths_total", "counter", "Rollout workers that died, or were restarted."
    ),
    "checkpoint_step": Metric("stateset_checkpoint_step", "gauge", "Step of the last whole checkpoint."),
    "checkpoint_seconds": Metric("stateset_checkpoint_seconds", "gauge", "Seconds that it took to write."),
}
"""Key in the code -> metric; each has the label `run` besides."""


class Gauges:
    """Sets what the table names from the events of one run.

    Args:
        run: its name, which is a label.
        make: called once per metric; what it returns has `set` or `inc`, with `tags`.
    """

    def __init__(self, run: str, make: Callable[[Metric], Any] | None = None) -> None:
        self._run = {"run": run}
        self._made = {key: (make or _of_ray)(metric) for key, metric in METRICS.items()}
        self._step = 0

    def take(self, event: Mapping[str, Any]) -> None:
        """Note one event; kinds that nothing is exported of are passed over."""
        match event["event"]:
            case "step":
                self._take_step(event)
            case "resumed":
                self._step = int(event["step"])
                self._set("step", self._step)
            case "evaluation":
                self._set("heldout", event.get("reward"))
            case "checkpoint":
                self._set("checkpoint_step", self._step)
                self._set("checkpoint_seconds", event["seconds"])
            case "warning":
                self._add("warnings", 1, name=str(event["name"]))
            case "learner_rebuilt":
                self._add("rebuilds", 1)

    def _take_step(self, step: Mapping[str, Any]) -> None:
        self._step = int(step["step"]) + 1
        self._add("steps", 1)
        for key, value in {
            "step": self._step, "planned": step["steps"], "version": step["policy_version"],
            "reward": step["reward_mean"], "reward_spread": step["reward_std"],
            "rollout_speed": step["rollout_tokens_per_second"],
            "learner_speed": step["learner_tokens_per_second"],
            "staleness": step["staleness"]["mean"], "stalest": step["staleness"]["max"],
            **{name: step[name] for name in ("loss", "grad_norm", "entropy", "kl_mismatch")},
        }.items():  # fmt: skip
            self._set(key, value)
        for phase, seconds in step["seconds"].items():
            self._set("phase_seconds", seconds, phase=phase)
        counts = step["trajectories"]
        self._add("dispatched", counts["dispatched"])
        for end, reason, count in _ends(counts):
            self._add("ended", count, end=end, reason=reason)
        self._add("worker_deaths", step["worker_restarts"])

    def _set(self, key: str, value: float | None, **labels: str) -> None:
        if value is not None:  # nobody was scored, nothing was learned: what was last so stays
            self._made[key].set(value, tags=self._run | labels)

    def _add(self, key: str, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray does not accept 0
            self._made[key].inc(amount, tags=self._run | labels)


def _ends(counts: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(end, reason, how many) of every account in a step's books."""
    for end in ("trained", "filtered"):
        yield end, "none", counts[end]
    for end in ("dropped", "aborted"):
        for reason, count in counts[end].items():
            yield end, reason, count


def _of_ray(metric: Metric) -> Any:
    kinds = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge}
    return kinds[metric.kind](metric.name, description=metric.help, tag_keys=("run", *metric.labels))


def exported(config: Config, on_event: _OnEvent) -> _OnEvent:
    """`on_event`, and besides it the metrics of this run, unless `cluster.metrics` is off."""
    if not config.cluster.metrics:
        return on_event
    gauges = Gauges(config.run.name)

    def both(event: Mapping[str, Any]) -> None:
        gauges.take(event)
        on_event(event)

    return both
