"""The slope of a soak, and its interval."""

from __future__ import annotations

import random

import pytest

from benchmarks.serving_soak import _grown, theil_sen


@pytest.mark.parametrize("slope", [0.0, 0.5, -2.0])
def test_a_slope_is_found_in_noise_and_outliers(slope):
    rng = random.Random(1)
    times = [second / 30 for second in range(120)]
    values = [100 + slope * x + rng.gauss(0, 0.3) + 50 * (i in (20, 90)) for i, x in enumerate(times)]
    found, low, high = theil_sen(times, values)
    assert low < slope < high
    assert high - low < 0.2
    assert found == pytest.approx(slope, abs=0.1)


def test_an_interval_misses_seldom():
    rng = random.Random(2)
    held = 0
    for _ in range(200):
        _, low, high = theil_sen(range(40), [rng.gauss(0, 1) for _ in range(40)])
        held += low <= 0 <= high
    assert 180 <= held <= 199  # of 200, at 95 %


@pytest.mark.parametrize(("growth", "holds_zero"), [(0.0, True), (0.5, False)])
def test_what_wanders_does_not_grow_and_what_grows_does(growth, holds_zero):
    rng = random.Random(4)
    rows, wandering = [], 0.0
    for sample in range(600):
        wandering = 0.8 * wandering + rng.gauss(0, 0.1)
        rows.append((2.0 * sample, 200 + wandering + growth * sample / 30, 77, 38 + (sample < 100)))
    found = _grown(rows)
    assert found["rss_mib"]["holds_zero"] is holds_zero
    assert found["rss_mib"]["slope_per_minute"] == pytest.approx(growth, abs=0.05)
    assert found["descriptors"] == {
        "first": 77, "last": 77, "slope_per_minute": 0, "interval": [0, 0], "holds_zero": True
    }  # fmt: skip
    assert found["threads"]["holds_zero"], "the warm-up counts"
    assert len(found["rss_mib_by_period"]) == 20 and found["period_seconds"] == 60
