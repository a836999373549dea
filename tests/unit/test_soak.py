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


@pytest.mark.parametrize(
    ("periods", "correlation", "least"), [(40, 0.0, 184), (40, 0.5, 180), (40, 0.8, 178), (20, 0.8, 172)]
)
def test_an_interval_knows_that_what_follows_is_like_what_went_before(periods, correlation, least):
    rng = random.Random(3)
    held = found = 0
    for _ in range(200):
        values = [0.0]
        for _ in range(20 + periods):
            values.append(correlation * values[-1] + rng.gauss(0, 0.1))
        wandering = values[-periods:]
        _, low, high = theil_sen(range(periods), wandering)
        held += low <= 0 <= high
        found += theil_sen(range(periods), [x + 0.3 * i for i, x in enumerate(wandering)])[1] > 0
    assert held >= least, "of 200"  # some 120 would be with 0.8, if each were taken for new
    assert found >= 176


def test_what_shrinks_is_what_grows_in_a_mirror():
    rng = random.Random(5)
    values = [rng.gauss(0, 1) for _ in range(12)]
    slope, low, high = theil_sen(range(12), values)
    assert theil_sen(range(12), [-value for value in values]) == (-slope, -high, -low)


@pytest.mark.parametrize(("growth", "holds_zero"), [(0.0, True), (0.5, False)])
def test_what_wanders_does_not_grow_and_what_grows_does(growth, holds_zero):
    rng = random.Random(4)
    rows, wandering = [], 0.0
    for sample in range(600):
        wandering = 0.8 * wandering + rng.gauss(0, 0.1)
        own = 120 + wandering + growth * sample / 30
        rows.append((2.0 * sample, own, 80 + own, 77, 38 + (sample < 100)))
    found = _grown(rows, 400)
    assert found["own_mib"]["holds_zero"] is found["rss_mib"]["holds_zero"] is holds_zero
    assert found["own_mib"]["slope_per_minute"] == pytest.approx(growth, abs=0.05)
    assert found["descriptors"] == {
        "first": 77, "last": 77, "slope_per_minute": 0, "interval": [0, 0], "holds_zero": True
    }  # fmt: skip
    assert found["threads"]["holds_zero"], "the warm-up counts"
    assert len(found["own_mib_by_period"]) == 20 and found["period_seconds"] == 60


def test_a_process_that_was_replaced_is_told_and_not_judged():
    assert _grown([(2.0 * sample, 1.0, 2.0, 77, 38) for sample in range(10)], 400) == {
        "samples": 10, "seconds": 18.0
    }  # fmt: skip


def test_a_process_that_has_just_come_is_told_and_not_judged():
    assert _grown([(0.0, 1.0, 2.0, 77, 38)], 0) == {"samples": 1, "seconds": 0.0}


def test_periods_begin_where_the_warm_up_ends():
    rows = [(2.0 * sample, 10.0 if sample < 205 else 20.0, 30.0, 77, 38) for sample in range(615)]
    found = _grown(rows, 410)
    assert (found["own_mib"]["first"], found["own_mib"]["slope_per_minute"]) == (20, 0)
    assert found["own_mib_by_period"].count(20) == 14, "and none of the 20 s that are left over"
