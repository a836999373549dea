"""The training benchmark runs, says what it promises, and gives both sides the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_training_benchmark_compares_equal_work():
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.training", "--model", "tiny", "--conversations", "4",
            "--repeats", "1", "--no-ray",
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)  # nothing else is printed
    assert result.keys() >= {
        "machine", "commit", "versions", "seed", "repeats", "limits", "work", "rollout", "learner", "publish",
    }  # fmt: skip
    work, rollout, learner = result["work"], result["rollout"], result["learner"]
    sampled = 4 * work["turns"] * work["tokens_per_reply"]
    assert rollout["ours"]["sampled_tokens"] == rollout["plain"]["sampled_tokens"] == sampled
    assert work["masked_tokens"] == work["sampled_tokens"] == sampled
    # Our engine computes every token of a conversation once, and the opening they share once; the plain
    # side computes every prompt again.
    assert work["prefilled_by_ours"] < work["prompt_tokens"] == work["prefilled_by_plain"]
    assert learner["ours"]["tokens"] == learner["plain"]["tokens"] == work["learner_tokens"]
    for figures in (rollout, learner):
        assert figures["speedup"] > 0
        assert all(0 < figures[side]["share_of_matmul_limit"] < 1 for side in ("ours", "plain"))
