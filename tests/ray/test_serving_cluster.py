"""An endpoint whose cluster changes under it, in clusters of their own: nobody notices."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def measured(scenario: str, folder: Path, *options: str) -> dict[str, Any]:
    file = folder / "cluster.json"
    command = [sys.executable, "-m", "benchmarks.serving_cluster", "--scenarios", scenario]
    done = subprocess.run(
        [*command, "--output", str(file), *options], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(file.read_text())["scenarios"][scenario]
    return found


def test_replicas_come_with_nodes_of_the_autoscaler_and_leave_with_them(tmp_path: Path) -> None:
    run = measured("nodes", tmp_path)
    assert run["failed"] == {}
    assert run["nodes"] == [1, 3, 1]
    assert run["requests"] > 20


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
@pytest.mark.skipif(importlib.util.find_spec("redis") is None, reason="the redis client is not installed")
def test_the_gcs_dies_and_requests_are_answered_all_the_same(tmp_path: Path) -> None:
    run = measured("gcs", tmp_path, "--times", "1")
    assert run["failed"] == {}
    assert run["without"] >= 8  # four clients, each more than once: none waited for the GCS
    assert run["without_ms"][0] < 1000 * run["gone"][0] / 2
    assert run["kept"] == [2, 4, 6]
