"""The benchmark's part through Ray, in small: all that was dispatched comes into the learner's hands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import overhead_ray  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_every_conversation_comes_into_the_learners_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where Ray's workers find the benchmarks
    found = overhead_ray.measure([8], flights=2, flight=64)
    size = found["group_sizes"]["8"]
    assert found["conversations"] == 128
    assert size["tokens"] == 128 * 95
    assert size["per_second"] > 0 and size["bare"]["per_second"] > 0
    assert size["bytes_per_group"]["report"] < size["bytes_per_group"]["payload"]
    assert set(size["cores"]) == {"controller", "workers", "hands"}
