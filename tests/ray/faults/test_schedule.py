"""The schedule of faults, in short: parts of a run die, hang and lie, and every trajectory is booked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]


def test_bug_37_no_fault_loses_or_doubles_a_trajectory(tmp_path: Path) -> None:
    """In a cluster of its own, whose second node may be killed; other faults are in files of their own."""
    faults = ["worker", "learner", "node", "raise"]
    file = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--seeds", "1", "--gap", "2", "--checkpoint-every", "1",
         "--tasks", "2", "--group-size", "4", "--latency", "0.05", "--moment", "0.25",
         "--faults", *faults, "--output", str(file)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=450,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [run] = json.loads(file.read_text())["runs"]
    for figure in ("unaccounted", "duplicated", "missing"):
        assert run[figure] == {"without": 0, "with": 0}
    hits = run["hits"]
    assert hits.keys() == set(faults)
    assert hits["worker"]["aborted"].keys() == {"worker_died"}
    assert hits["learner"]["aborted"].keys() == {"rewound"}
    assert hits["learner"]["steps_again"] >= 1
    assert hits["raise"]["dropped"] == {"environment_error": 4}
    assert hits["node"]["dropped"] == {}
    assert all(hits[fault]["steps_again"] == 0 for fault in ("worker", "raise"))
