"""The simulation of more workers than are here, against what can be computed by hand."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.scaling import Recorded, simulate


@given(workers=st.integers(1, 40), places=st.integers(1, 4), rounds=st.integers(2, 6))
def test_with_a_controller_that_costs_nothing_workers_scale(workers: int, places: int, rounds: int) -> None:
    found = simulate(workers, places, rounds, Recorded([2.0], 0.0, 0.0))
    assert found["groups_per_second"] == pytest.approx(workers * places / 2, abs=1e-3)
    assert (found["controller"], found["lag"]) == (0.0, 0.0)


def test_a_controller_that_costs_more_than_there_is_time_is_what_limits() -> None:
    found = simulate(100, 1, 50, Recorded([1.0], 0.02, 0.0))  # 2 s of reports for each second of playing
    assert found["groups_per_second"] == pytest.approx(50, rel=0.05)
    assert found["controller"] > 0.95
    assert found["lag"] > 10


def test_looking_at_many_calls_costs_once_for_all_that_is_there() -> None:
    found = simulate(10, 1, 10, Recorded([1.0], 0.0, 0.001))
    assert found["controller"] == pytest.approx(10 * 2 * 0.001 * 10 / 10, rel=0.1)
