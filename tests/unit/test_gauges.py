"""What Ray exports of a run: the table, and what the events set of it."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stateset_ray.actors.gauges import METRICS, Gauges, exported
from stateset_ray.actors.inference_engine import InferenceEngine
from stateset_ray.actors.learner_rank import LearnerRank
from stateset_ray.actors.rollout_worker import RolloutWorker
from stateset_ray.config import load_config

ROOT = Path(__file__).parents[2]


class Noted:
    """A metric that remembers, and is as strict as Ray's."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.values: dict[tuple[str, ...], float] = {}

    def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == {"run", *self.metric.labels}
        assert all(isinstance(value, str) for value in tags.values())
        return tuple(tags[label] for label in self.metric.labels)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert self.metric.kind == "gauge"
        self.values[self._key(tags)] = float(value)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self.metric.kind == "counter"
        assert value > 0
        key = self._key(tags)
        self.values[key] = self.values.get(key, 0) + value


def noted() -> tuple[Gauges, dict[str, Noted]]:
    made: dict[str, Noted] = {}
    names = {metric.name: key for key, metric in METRICS.items()}

    def make(metric: Any) -> Noted:
        return made.setdefault(names[metric.name], Noted(metric))

    return Gauges("demo", make), made


def step(number: int, **other: Any) -> dict[str, Any]:
    return {
        "event": "step", "step": number, "steps": 9, "policy_version": number + 1, "reward_mean": 0.5,
        "reward_std": 0.25, "loss": 0.1, "grad_norm": 2.0, "learning_rate": 1e-5, "entropy": 1.5,
        "kl_mismatch": 0.001, "rollout_tokens_per_second": 90.0, "learner_tokens_per_second": 170.0,
        "staleness": {"mean": 0.5, "std": 0.5, "max": 1.0}, "worker_restarts": 1,
        "seconds": {"rollout": 3.0, "learner": 4.0},
        "trajectories": {
            "dispatched": 20, "trained": 8, "filtered": 4, "dropped": {"timeout": 2},
            "aborted": {"worker_died": 4, "infrastructure_error": 2},
        },
    } | other  # fmt: skip


def test_a_step_sets_what_it_came_to() -> None:
    gauges, made = noted()
    gauges.take(step(0))
    gauges.take(step(1, reward_mean=0.75))
    now = {key: one.values.get(()) for key, one in made.items() if not one.metric.labels}
    assert now["steps"] == now["step"] == now["version"] == 2
    assert (now["planned"], now["reward"], now["reward_spread"]) == (9, 0.75, 0.25)
    assert (now["rollout_speed"], now["learner_speed"]) == (90, 170)
    assert (now["staleness"], now["stalest"], now["worker_deaths"]) == (0.5, 1, 2)
    assert made["phase_seconds"].values == {("rollout",): 3, ("learner",): 4}


def test_the_books_balance_in_what_is_exported_too() -> None:
    gauges, made = noted()
    for number in range(3):
        gauges.take(step(number))
    ended = made["ended"].values
    assert sum(ended.values()) == made["dispatched"].values[()] == 60
    by_end: Counter[str] = Counter()
    for (end, _), count in ended.items():
        by_end[end] += int(count)
    assert by_end == {"trained": 24, "filtered": 12, "dropped": 6, "aborted": 18}


def test_what_a_step_did_not_have_leaves_the_last_value() -> None:
    gauges, made = noted()
    gauges.take(step(0))
    empty = {"trained": 0, "filtered": 0, "dropped": {}, "aborted": {}, "dispatched": 0}
    nothing = {"mean": None, "std": None, "max": None}
    gauges.take(
        step(1, reward_mean=None, loss=None, staleness=nothing, trajectories=empty, worker_restarts=0)
    )
    assert (made["reward"].values[()], made["loss"].values[()], made["stalest"].values[()]) == (0.5, 0.1, 1)
    assert made["dispatched"].values[()] == 20


def test_the_other_events() -> None:
    gauges, made = noted()
    for event in (
        {"event": "opened", "folder": "x"},
        {"event": "evaluation", "name": "before", "reward": -0.25},
        step(0),
        {"event": "warning", "name": "equal_rewards", "step": 0},
        {"event": "checkpoint", "path": "x", "seconds": 1.5},
        {"event": "learner_rebuilt", "step": 0, "seconds": 3},
        {"event": "evaluation", "name": "after", "reward": None},
        {"event": "resumed", "step": 7},
    ):
        gauges.take(event)
    assert made["heldout"].values[()] == -0.25
    assert made["warnings"].values == {("equal_rewards",): 1}
    assert (made["checkpoint_step"].values[()], made["checkpoint_seconds"].values[()]) == (1, 1.5)
    assert (made["rebuilds"].values[()], made["step"].values[()]) == (1, 7)


def test_switched_off_there_is_nothing() -> None:
    def watch(_: object) -> None: ...

    assert exported(load_config(None, ["cluster.metrics=false"]), watch) is watch


def test_the_names_follow_the_rules() -> None:
    names = [metric.name for metric in METRICS.values()]
    assert len(names) == len(set(names))
    for metric in METRICS.values():
        assert re.fullmatch(r"stateset_(train|rollout|checkpoint)_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert "run" not in metric.labels


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda config: RolloutWorker(config, 3, 4, ()), "demo-2/rollout-3"),
        (lambda config: InferenceEngine(config, 1), "demo-2/engine-1"),
        (lambda config: LearnerRank(config, 0), "demo-2/learner-0"),
    ],
)
def test_an_actor_is_called_by_its_run_its_role_and_its_place(make: Any, name: str) -> None:
    """By its repr, which logs and dashboard show and which two runs of one name on a cluster may share."""
    assert repr(make(load_config(None, ["run.name=demo-2"]))) == name
