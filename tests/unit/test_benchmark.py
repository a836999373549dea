"""The benchmarks run, say what they promise, and give both sides the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
        for side in (
            "ours",
            "plain",
        ):  # whoever else computes meanwhile lowers the limit
            assert figures[side]["share_of_matmul_limit"] > 0


def run(module: str, *options: str) -> dict[str, Any]:
    """What a benchmark prints, on the tiny model; nothing but JSON may be on its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--model", "tiny", "--threads", "1", *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


SMALL = ("--tokens", "64", "--budget", "256", "--groups", "2", "--group-size", "4", "--engines", "torch")


@pytest.mark.timeout(300)
def test_the_learners_benchmark_gives_both_sides_the_same_update(tmp_path: Path) -> None:
    output = tmp_path / "learner.json"
    result = run("benchmarks.learner", *SMALL, "--repeats", "1", "--output", str(output))
    assert json.loads(output.read_text()) == result
    sides, work = result["sides"], result["work"]
    assert sides.keys() == {
        "naive", "torch", "torch checkpointing", "torch unshared", "torch checkpointing unshared",
    }  # fmt: skip
    # Same rows, same loss, same weights, one step before: whatever else differs, this must not.
    for side in sides.values():
        assert side["losses"] == pytest.approx(sides["naive"]["losses"], rel=1e-4)
        assert side["of_naive"]["memory"] > 0 and side["of_naive"]["speed"] > 0
    assert work["trajectory_tokens"] == 2 * 4 * 64 == sides["naive"]["computed_tokens"]
    assert sides["torch unshared"]["computed_tokens"] == 2 * 4 * 64
    assert sides["torch"]["computed_tokens"] == 2 * (32 + 4 * 32)
    assert (work["prompt_share"], work["sampled_share"]) == (0.5, 0.312)
    assert {name: side["micro_batches"] for name, side in sides.items()} == {
        "naive": 2, "torch": 2, "torch checkpointing": 2, "torch unshared": 2,
        "torch checkpointing unshared": 2,
    }  # fmt: skip


@pytest.mark.timeout(300)
def test_the_prefix_benchmark_finds_the_same_gradient_with_and_without_sharing() -> None:
    result = run("benchmarks.learner", "--prefix", *SMALL, "--repeats", "1")
    cells = {(cell["prompt_share"], cell["group_size"]): cell for cell in result["cells"]}
    assert len(cells) == 12
    assert 0 < result["largest_gradient_difference"] <= 1e-5
    assert cells[0.75, 8]["computed_tokens"] == {"shared": 48 + 8 * 16, "unshared": 8 * 64}


def test_the_learners_report_divides_medians_by_the_naive_sides() -> None:
    from benchmarks.learner import compared, table

    def answers(seconds: list[float], peak: float) -> list[dict[str, Any]]:
        return [
            {
                "seconds": s, "processor_seconds": 2 * s, "peak_bytes": peak * 2**30, "computed_tokens": 10,
                "micro_batches": 1, "loss": 0.5,
            }
            for s in seconds
        ]  # fmt: skip

    sides = compared({"naive": answers([4, 2, 9], 4), "torch": answers([2.5, 1, 2], 1)}, tokens=100)
    assert sides["torch"]["tokens_per_second"] == 50
    assert sides["torch"]["of_naive"] == {"memory": 0.25, "speed": 2, "speed_in_processor_seconds": 2}
    assert sides["naive"]["seconds"] == {"median": 4, "min": 2, "max": 9, "all": [4, 2, 9]}
    assert "| torch | 1.00 (1.00-1.00) | 0.25 | 50.0 | 2.0 (1.0-2.5) | 2.0 |" in table(
        {"kind": "update", "sides": sides}
    )


def test_packed_layers_beside_plain_ones() -> None:
    result = run("benchmarks.packed", "--model", "tiny", "--rows", "1", "3", "--repeats", "1")
    assert [row["rows"] for row in result["rows"]] == [1, 3]
    assert all(row["ratio"] > 0 for row in result["rows"])
    assert result["threads"] == 1


@pytest.mark.timeout(300)
def test_the_engines_benchmark_gives_every_side_the_same_conversations() -> None:
    size = ("--conversations", "16", "--turns", "3", "--tokens", "4", "--repeats", "2")
    result = run("benchmarks.engine", *size)
    sides, work = result["sides"], result["work"]
    assert sides.keys() == {"ours", "generate", "continuous"}
    assert all(side["sampled_tokens"] == 16 * 3 * 4 == work["sampled_tokens"] for side in sides.values())
    assert result["ratios"].keys() == {"generate", "continuous"}
    # They sample from one distribution: 192 tokens of a nearly uniform one.
    likely = [sides[side]["mean_logprob"] for side in ("ours", "continuous")]
    assert likely[0] == pytest.approx(likely[1], abs=0.15)
    # Ours computes what cannot be avoided, and at most the last token of a prompt again per conversation.
    computed = sides["ours"]["prefill_tokens"] + 16 * 3 * 4 - 16 * 3
    assert 0 <= computed - result["limit"]["computed_tokens"] <= 16
    assert sides["generate"]["prefill_tokens"] > 4 * sides["ours"]["prefill_tokens"]
    assert all(side["share_of_limit"] > 0 for side in sides.values())


def test_the_engines_limit_counts_what_cannot_be_avoided() -> None:
    from benchmarks.engine import contexts, positions

    # Two conversations of two turns: they share two tokens of three, and reply with two tokens each time.
    rows = [([1, 2, 3], [[9]]), ([1, 2, 4], [[8]])]
    assert positions(rows, 2) == 4 + 2 * (2 + 1 + 1)  # the last token of a reply that ends it is not computed
    attended, read = contexts(rows, 2)
    assert attended == (1 + 2 + 3 + 3) + 2 * (4 + 5 + 6 + 7)
    assert read == 2 * (4 + 7)  # each reply's second token is computed alone, its first comes from the prompt
