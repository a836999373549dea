"""Several Ray nodes, in clusters of their own: one dies, another joins; an autoscaler brings and takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


def measured(scenario: str, folder: Path, *options: str) -> dict[str, Any]:
    file = folder / "nodes.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.nodes", "--scenarios", scenario, "--output", str(file), *options],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(file.read_text())["scenarios"][scenario]
    return found


def balanced(run: dict[str, Any]) -> bool:
    counts = run["trajectories"]
    ended = counts["trained"] + counts["filtered"]
    ended += sum(counts["dropped"].values()) + sum(counts["aborted"].values())
    return bool(counts["dispatched"] == ended)


@pytest.mark.slow  # a node that dies is in every schedule of tests/ray/faults, which is not slow
@pytest.mark.timeout(420)
def test_learner_ranks_on_two_nodes_survive_the_death_of_one(tmp_path: Path) -> None:
    run = measured("lost", tmp_path, "--steps", "3")
    assert run["nodes"] == {"before": 2, "after": 2}
    assert (run["unaccounted"], run["duplicated"], run["missing"]) == (0, 0, 0)
    assert balanced(run)
    assert set(run["trajectories"]["aborted"]) <= {"worker_died", "payload_lost", "rewound"}
    assert run["trajectories"]["dropped"] == {}
    assert run["steps_again"] <= 1  # a checkpoint after every step
    assert run["recovered"] >= run["rebuilt"] > 0


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_workers_come_with_nodes_of_the_autoscaler_and_leave_with_them(tmp_path: Path) -> None:
    run = measured("autoscaler", tmp_path)
    assert run["nodes"] == 3  # the head, and two for three workers and a rank
    assert (run["unaccounted"], run["duplicated"], run["missing"]) == (0, 0, 0)
    assert balanced(run)
    assert set(run["trajectories"]["aborted"]) <= {"worker_died", "payload_lost"}
    assert run["trajectories"]["dropped"] == {}
    assert run["rejoined"] > run["recovered"] > 0  # it did not wait for the new node
