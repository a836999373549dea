"""The slope of a soak, and its interval."""

from __future__ import annotations

import random

import pytest

from benchmarks.serving_soak import theil_sen


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
