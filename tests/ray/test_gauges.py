"""What Ray exports of a run, as Prometheus would read it."""

import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
import ray
from playground import small
from prometheus_client.parser import text_string_to_metric_families

from stateset_ray.actors.gauges import METRICS
from stateset_ray.actors.run import open_run
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train_step

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def scraped(run: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Metric -> its labels' values -> its value, of what this run has set, from this node's endpoint."""
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    labels = {f"ray_{metric.name}": metric.labels for metric in METRICS.values()}
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in labels and sample.labels.get("run") == run:
                key = tuple(sample.labels[label] for label in labels[sample.name])
                found[sample.name.removeprefix("ray_")][key] = sample.value
    return found


def test_a_step_is_seen_at_the_nodes_metrics_endpoint(tmp_path: Path) -> None:
    name = "exported-" + tmp_path.name[-8:]
    config = small(tmp_path, f'run.name="{name}"', "train.steps=3")
    with open_run(config) as run:
        for step in run.steps():
            train_step(run, step)
            if step == 1:
                break
        records = JsonLines(run.folder / "metrics.jsonl").read()
        deadline = time.monotonic() + 60  # Ray sends what is new every ten seconds
        while (found := scraped(name)).get("stateset_train_step", {}).get(()) != 2:
            assert time.monotonic() < deadline, f"Ray exports {sorted(found)}"
            time.sleep(0.5)
    assert found["stateset_train_reward_mean"][()] == pytest.approx(records[-1]["reward_mean"])
    assert found["stateset_train_policy_version"][()] == records[-1]["policy_version"]
    assert found["stateset_train_steps_total"][()] == 2
    assert set(found["stateset_train_phase_seconds"]) == {(phase,) for phase in records[-1]["seconds"]}
    ended = sum(found["stateset_rollout_trajectories_total"].values())
    assert ended == found["stateset_rollout_dispatched_total"][()]
    assert ended == sum(record["trajectories"]["dispatched"] for record in records)
