"""Who sits where: a run inside of a placement group uses the group's own room."""

from pathlib import Path
from typing import Any

import pytest
import ray
from playground import small
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stateset_ray.actors.placement import bundles, place
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def _options(config: Config) -> tuple[Any, int, int]:
    """The group that a worker and a learner rank would be created in, and the indices of their bundles."""
    with place(config) as placement:
        worker, learner = (o["scheduling_strategy"] for o in (placement.worker(0), placement.learner(0)))
    return (
        worker.placement_group.id,
        worker.placement_group_bundle_index,
        learner.placement_group_bundle_index,
    )


def _inside(config: Config, specs: list[dict[str, float]]) -> Any:
    group = placement_group(specs)
    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    try:
        task = ray.remote(num_cpus=1)(_options).options(scheduling_strategy=strategy)
        found = ray.get(task.remote(config), timeout=60)
        return found[0] == group.id, found[1:]
    finally:
        remove_placement_group(group)


@pytest.fixture(autouse=True)
def by_value() -> None:
    """Ray loads a task's function before the task could be told where to import it from."""
    import sys

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_a_trial_uses_its_own_group_behind_its_own_bundle(tmp_path: Path) -> None:
    config = small(tmp_path)
    assert _inside(config, [{"CPU": 1.0}, *bundles(config)]) == (True, (1, 2))


def test_a_group_of_other_bundles_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path)
    with pytest.raises(ClusterError, match="last bundles are not those of the run"):
        _inside(config, [{"CPU": 1.0}, {"CPU": 2.0}])


def test_a_run_of_its_own_asks_for_a_group(tmp_path: Path) -> None:
    _, worker, learner = _options(small(tmp_path))
    assert (worker, learner) == (0, 1)
