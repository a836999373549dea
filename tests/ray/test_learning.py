"""The learning benchmark, in small: it plays what `train` would, and its runs do not touch each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.learning_runs import Arm, player, settings  # noqa: E402
from stateset_ray.metrics import JsonLines  # noqa: E402
from stateset_ray.train import train  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

STEPS = 3


@pytest.fixture(autouse=True)
def where_workers_find_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers import from the folder that the driver runs in."""
    monkeypatch.chdir(ROOT)


def test_a_run_on_actors_that_stay_is_the_run_of_train_digit_for_digit(tmp_path: Path) -> None:
    arm = Arm("presets", "gspo", 5, 1e-2, STEPS)
    config = settings(arm).with_overrides([f'run.dir="{tmp_path}"'])
    summary = train(config)
    metrics = JsonLines(config.run.folder / "metrics.jsonl").read()
    with player(arm) as learning:
        # Something else first, on the same actors: nothing of it may be left.
        learning.play(Arm("presets", "dapo", 6, 3e-2, STEPS))
        record = learning.play(arm)
    assert record["rewards"] == [round(step["reward_mean"], 6) for step in metrics]
    assert record["grad_norm"] == [round(step["grad_norm"], 5) for step in metrics]
    assert record["heldout_before"] == summary["heldout_before"]
    assert record["heldout_after"] == summary["heldout_after"]
    assert record["heldout_after"] != record["heldout_before"]
    assert record["stopped"] is None
