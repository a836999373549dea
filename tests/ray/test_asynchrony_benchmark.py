"""The benchmark of rollouts that run ahead, in small: every side does the same work and lags as it may."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.asynchrony import play, report  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_sides_learn_from_as_many_and_lag_as_far_as_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where Ray's workers find the benchmarks
    options = argparse.Namespace(
        steps=5,
        tasks=2,
        group_size=4,
        workers=1,
        concurrency=32,
        median=0.01,
        tail=20.0,
        learning_rate=3e-3,
    )
    runs = {side: [play(side, 0, options)] for side in ("0", "1", "1-plain")}
    assert all(len(run["rewards"]) == 5 for [run] in runs.values())
    assert runs["0"][0]["staleness"]["max"] == 0
    lag = runs["1"][0]["staleness"]
    assert 0 < lag["mean"] <= 0.8  # all steps but the first, by at most one
    assert lag["max"] == 1
    sides = report(runs)["sides"]
    assert sides["0"]["ratio"] == 1.0
    assert sides["1"]["ratio"] > 0
