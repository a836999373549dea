"""The GPU's benchmark, in small and without one: both sides do the same work, and one of them sleeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import measure, parse  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def test_both_sides_learn_the_same() -> None:
    found = measure(parse([
        "--device", "cpu", "--tokenizer", "tiny", "--hidden", "64", "--layers", "2", "--tasks", "2",
        "--group-size", "4", "--turn-tokens", "8", "--prompt-words", "16", "--steps", "2",
    ]))  # fmt: skip
    sides = found["sides"]
    assert sides.keys() == {"together", "sleep"}
    assert sides["together"]["masked_tokens"] == sides["sleep"]["masked_tokens"] > 0
    assert sides["together"]["tokens"] == sides["sleep"]["tokens"]
    for side in sides.values():
        assert side["utilization"]["of_limit"] > 0
        assert abs(side["kl_mismatch"]) < 1e-4
