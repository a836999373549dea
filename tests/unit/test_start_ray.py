"""Ray's own start, where the machine is too busy for it; without Ray."""

import pytest
import ray

from stateset_ray.actors import placement
from stateset_ray.actors.placement import start_ray

SLOW = Exception(
    "The current node timed out during startup. This could happen because some of the raylet ..."
)


@pytest.fixture
def starts(monkeypatch):
    """What each start raises, to be filled in; and what it was asked for."""
    outcomes, asked = [], []

    def init(**options):
        asked.append(options)
        if outcomes and (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    return outcomes, asked


def test_a_start_that_took_too_long_is_tried_once_more(starts):
    outcomes, asked = starts
    outcomes[:] = [SLOW, None]
    start_ray(num_cpus=3)
    assert asked == [{"address": "local", "num_cpus": 3}] * 2


def test_a_second_time_is_enough(starts):
    outcomes, asked = starts
    outcomes[:] = [SLOW, SLOW, None]
    with pytest.raises(Exception, match="timed out during startup"):
        start_ray()
    assert len(asked) == 2


def test_any_other_error_is_final(starts):
    outcomes, asked = starts
    outcomes[:] = [ValueError("no such option"), None]
    with pytest.raises(ValueError, match="no such option"):
        start_ray()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("given", "in_turn", "wanted"),
    [
        ({}, True, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}),
        ({}, False, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"GOMP_SPINCOUNT": "5"}, True, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, True, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_idle_threads_sleep_and_sooner_where_others_compute(monkeypatch, given, in_turn, wanted):
    monkeypatch.setattr(placement.os, "environ", dict(given))
    placement._let_idle_threads_sleep(in_turn)
    assert placement.os.environ == wanted
