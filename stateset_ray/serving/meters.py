"""What the endpoint counts: one table of metrics, and two places to count them in.

Labels are small, closed sets: never a key, a conversation, a request or a user. Ray puts `ray_` before each
name and exports them on every node (`--metrics-export-port`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stateset_ray.metrics import Metric

__all__ = ["METRICS", "Meters", "Metric"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


METRICS: Mapping[str, Metric] = {
    "requests": Metric("stateset_http_requests_total", "counter", "Requests answered.", ("path", "status")),
    "request_seconds": Metric(
        "stateset_http_request_duration_seconds",
        "histogram",
        "From a request's head to its last byte.",
        ("path",),
    ),
    "in_progress": Metric("stateset_http_requests_in_progress", "gauge", "Requests under way."),
    "first_token_seconds": Metric(
        "stateset_inference_ttft_seconds", "histogram", "From a request to its first token."
    ),
    "prompt_tokens": Metric(
        "stateset_inference_prompt_tokens_total", "counter", "Tokens of prompts answered."
    ),
    "read_tokens": Metric(
        "stateset_inference_prefill_tokens_total",
        "counter",
        "Tokens of prompts computed; the others were cached.",
    ),
    "sampled_tokens": Metric("stateset_inference_tokens_total", "counter", "Tokens sampled."),
    "generations": Metric("stateset_inference_inflight", "gauge", "Answers under way in a policy replica."),
    "tokens_before": Metric(
        "stateset_inference_tokens_before", "gauge", "Tokens that a policy replica has before it."
    ),
    "retries": Metric(
        "stateset_inference_retries_total", "counter", "Requests sent again after their replica died."
    ),
    "shed": Metric(
        "stateset_inference_shed_total", "counter", "Requests refused for want of room.", ("reason",)
    ),
    "cancelled": Metric("stateset_inference_cancelled_total", "counter", "Answers whose client left."),
    "tool_calls": Metric(
        "stateset_agent_tool_calls_total", "counter", "Calls of tools by the policy.", ("tool", "outcome")
    ),
    "tool_seconds": Metric(
        "stateset_agent_tool_seconds", "histogram", "What one call of a tool took.", ("tool",)
    ),
    "policy_step": Metric(
        "stateset_policy_step", "gauge", "Step of the checkpoint that answers; -1: of no run."
    ),
    "swaps": Metric(
        "stateset_policy_swaps_total", "counter", "Checkpoints taken over or refused.", ("outcome",)
    ),
    "version_requests": Metric(
        "stateset_policy_requests_total",
        "counter",
        "Answers by the version's role and how they ended.",
        ("role", "outcome"),
    ),
    "version_ttft": Metric(
        "stateset_policy_ttft_seconds",
        "histogram",
        "From asked to the first token, in the replica.",
        ("role",),
    ),
    "version_seconds": Metric(
        "stateset_policy_answer_seconds", "histogram", "From asked to ended, in the replica.", ("role",)
    ),
    "version_tokens": Metric("stateset_policy_tokens_total", "counter", "Tokens sampled.", ("role",)),
    "canary_step": Metric("stateset_policy_canary_step", "gauge", "Step of the canary; -1: there is none."),
    "canary_share": Metric(
        "stateset_policy_canary_share", "gauge", "Share of the conversations that fall to the canary."
    ),
    "transcripts": Metric(
        "stateset_log_transcripts_total",
        "counter",
        "Sampled conversations, written or dropped.",
        ("outcome",),
    ),
    "swap_seconds": Metric(
        "stateset_policy_swap_seconds", "histogram", "From a checkpoint found to answering."
    ),
}
"""Key in the code -> metric."""


class Meters:
    """Counts what the table names.

    Args:
        make: called once per metric; what it returns has `inc`, `set` or `observe`, with `tags`.
    """

    def __init__(self, make: Callable[[Metric], Any]) -> None:
        self._made = {key: make(metric) for key, metric in METRICS.items()}

    @classmethod
    def of_ray(cls) -> Meters:
        """Counted by Ray, with the application, deployment and replica as further labels."""
        from ray.serve import metrics

        def make(metric: Metric) -> Any:
            kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge}
            if metric.kind == "histogram":
                return metrics.Histogram(
                    metric.name, description=metric.help, boundaries=list(_SECONDS), tag_keys=metric.labels
                )
            return kinds[metric.kind](metric.name, description=metric.help, tag_keys=metric.labels)

        return cls(make)

    def add(self, key: str, amount: float = 1, **labels: str) -> None:
        """Count up; nothing happens for 0, which Ray does not accept."""
        if amount > 0:
            self._made[key].inc(amount, tags=labels)

    def set(self, key: str, value: float) -> None:
        """Set a gauge."""
        self._made[key].set(value)

    def observe(self, key: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._made[key].observe(value, tags=labels)
