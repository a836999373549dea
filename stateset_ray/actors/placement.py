"""Ray itself: joining or starting a cluster, and asking it for room.

Who sits where is decided by `[cluster]` in the configuration and by nothing else. The room is one
placement group: a bundle per rollout worker, per inference engine, and per learner rank.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stateset_ray.actors.address import address_of, check_answers
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError

__all__ = [
    "Placement", "bundles", "check_room", "cluster", "describe", "free_room", "import_paths", "place",
    "start_ray",
]  # fmt: skip

_log = logging.getLogger(__name__)


def bundles(config: Config, *, learners: bool = True) -> list[dict[str, float]]:
    """The bundles to ask for: one per rollout worker, one per inference engine, one per learner rank."""
    room = config.cluster
    learner = {"CPU": room.learner_cpus, "GPU": room.learner_gpus}
    worker = {"CPU": room.worker_cpus, "GPU": room.worker_gpus}
    engine = {"CPU": room.engine_cpus, "GPU": room.engine_gpus}
    wanted = [worker] * config.rollout.workers + [engine] * config.rollout.engines
    wanted += [learner] * (config.learner.ranks if learners else 0)
    return [{name: amount for name, amount in bundle.items() if amount} for bundle in wanted]


def _totals(config: Config, *, learners: bool = True) -> Counter[str]:
    total: Counter[str] = Counter()
    for bundle in bundles(config, learners=learners):
        total.update(bundle)
    return total


def describe(config: Config) -> dict[str, Any]:
    """The placement as plain data, for `--dry-run`."""
    return {
        "strategy": config.cluster.strategy,
        "address": address_of(config)[0] or "a local cluster of its own",
        "learner_ranks": config.learner.ranks,
        "rollout_workers": config.rollout.workers,
        "inference_engines": config.rollout.engines or "one in each rollout worker",
        "bundles": bundles(config),
        "total": dict(_totals(config)),
    }


def import_paths() -> list[str]:
    """Folders that the controller imports from and a worker may lack: where the user's code lies."""
    return [os.path.abspath(p or ".") for p in dict.fromkeys(["", *sys.path]) if not _installed(p)]


def _installed(path: str) -> bool:
    return path.startswith((sys.prefix, sys.base_prefix)) or path.endswith(".zip")


def start_ray(**options: Any) -> None:
    """Start Ray on this machine, for this process alone.

    Ray gives its own node 30 seconds to come up, which a busy machine exceeds: then it is tried once more.

    Args:
        options: of `ray.init`.

    Raises:
        Exception: what `ray.init` raises.
    """
    try:
        ray.init(address="local", **options)
    except Exception as error:  # Ray raises nothing more exact
        if "timed out during startup" not in str(error):
            raise
        ray.init(address="local", **options)


@contextmanager
def cluster(config: Config, *, at_least_cpus: float = 0, in_turn: bool = False) -> Iterator[None]:
    """Be connected to Ray: use this process's connection, join a cluster, or start one and end it.

    Args:
        at_least_cpus: logical CPUs of a cluster that is started, where `[rollout]` and `[learner]` say less.
        in_turn: in a cluster that is started, learner and workers compute one after the other, never beside
            each other.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    address, source = address_of(config)
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            "this is the address of a dashboard: it takes jobs, but no run can join a cluster there",
            given=address,
            mend="submit the run (stateset-ray submit CONFIG), or give HOST:6379 on a machine of the cluster",
        )
    check_answers(address, source)
    try:
        if address:
            ray.init(address=address, log_to_driver=True, logging_level="ERROR")
        else:
            _let_idle_threads_sleep(in_turn)
            # Logical CPUs: on a laptop, actors that take turns may share a core.
            cpus = max(os.cpu_count() or 1, math.ceil(max(_totals(config)["CPU"], at_least_cpus)))
            start_ray(
                num_cpus=cpus, include_dashboard=config.cluster.dashboard,
                log_to_driver=True, logging_level="ERROR",
            )  # fmt: skip
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError, ...
        if address:
            raise ClusterError(
                f"Ray cannot be reached: {error}", given=f"{address} ({source})",
                mend=f"check {source} and the token; stateset-ray doctor tells more",
            ) from error  # fmt: skip
        raise ClusterError(
            f"Ray did not start on this machine: {error}",
            mend="look for a machine that is overloaded, short of memory, or without room in /tmp (df /tmp); "
            "stateset-ray doctor --ray tries it alone",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _let_idle_threads_sleep(in_turn: bool) -> None:
    """Have idle OpenMP threads of all actors sleep; an environment that says otherwise is left alone.

    Actors share cores, and a spinning thread of one is a stolen core of another. But the products of a
    forward pass follow each other within microseconds, and to wake a thread for each costs a fifth of it:
    where nobody else computes, GNU's OpenMP (PyTorch's on Linux) waits awake for half a millisecond.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if in_turn:
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class Placement:
    """Granted room: where each learner rank, engine and rollout worker may be created.

    Args:
        config: of the run.
        group: has the bundles of `bundles`.
        first: index of the first of them in the group.
    """

    def __init__(self, config: Config, group: PlacementGroup, first: int = 0) -> None:
        self._config = config
        self._first = first
        self.group = group

    def learner(self, rank: int) -> dict[str, Any]:
        """Actor options of one learner rank."""
        room = self._config.cluster
        before = self._config.rollout.workers + self._config.rollout.engines
        return self._options(before + rank, room.learner_cpus, room.learner_gpus)

    def engine(self, index: int) -> dict[str, Any]:
        """Actor options of one inference engine."""
        room = self._config.cluster
        return self._options(self._config.rollout.workers + index, room.engine_cpus, room.engine_gpus)

    def worker(self, index: int) -> dict[str, Any]:
        """Actor options of one rollout worker; a guest sits wherever there is room, or will be."""
        room = self._config.cluster
        if index >= self._config.rollout.workers:
            return {
                "num_cpus": room.worker_cpus, "num_gpus": room.worker_gpus, "scheduling_strategy": "SPREAD"
            }  # fmt: skip
        return self._options(index, room.worker_cpus, room.worker_gpus)

    def _options(self, bundle: int, cpus: float, gpus: float) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self.group, placement_group_bundle_index=self._first + bundle,
            placement_group_capture_child_tasks=True,
        )  # fmt: skip
        return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}


@contextmanager
def place(config: Config, *, learners: bool = True) -> Iterator[Placement]:
    """Reserve room for the whole run, all or nothing, and give it back.

    Where this process has been placed in a group itself (a trial of Ray Tune), that group's room is used.

    Args:
        learners: False for rollouts alone, as in an evaluation.

    Raises:
        ClusterError: not granted within `cluster.wait_seconds`; the message says what is missing.
    """
    if own := get_current_placement_group():
        yield Placement(config, own, _first_bundle(own, bundles(config, learners=learners)))
        return
    group = placement_group(bundles(config, learners=learners), strategy=config.cluster.strategy)
    wanted = _totals(config, learners=learners)
    deadline = time.monotonic() + config.cluster.wait_seconds
    try:
        while not group.wait(timeout_seconds=min(5, max(0.1, deadline - time.monotonic()))):
            missing = _missing(config, wanted)
            _log.warning("waiting for resources: %s", missing)
            # A cluster of this run's own never grows, so there is nothing to wait for.
            if time.monotonic() > deadline or not address_of(config)[0]:
                raise ClusterError(
                    f"Ray did not grant the resources in time: {missing}",
                    given=dict(wanted),
                    mend="add nodes, ask for less in [cluster], or raise cluster.wait_seconds",
                )
        yield Placement(config, group)
    finally:
        remove_placement_group(group)


def check_room(config: Config, wanted: Sequence[Mapping[str, float]], what: str) -> None:
    """Make sure that bundles can ever be placed, on the cluster as it is or as it grows while this waits.

    Args:
        config: has the strategy and, where a cluster may grow, how long to wait.
        wanted: the bundles of one group; what others hold of the cluster now does not count.
        what: is to be placed, for the error.

    Raises:
        ClusterError: they cannot be, with what is missing: at once where the cluster never grows.
    """
    strategy = config.cluster.strategy
    if not (lack := _lacking(wanted, strategy)):
        return
    problem = ClusterError(
        f"{what} can never be placed on this cluster: {lack}",
        given=[dict(bundle) for bundle in wanted],
        mend="add nodes, or ask for less in [cluster], rollout.workers, rollout.engines and learner.ranks",
    )
    if not address_of(config)[0]:
        raise problem
    deadline = time.monotonic() + config.cluster.wait_seconds
    group = placement_group([dict(bundle) for bundle in wanted], strategy=strategy)  # what autoscalers see
    try:
        while not group.wait(timeout_seconds=min(5, max(0.1, deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                raise problem
            _log.warning("waiting for nodes: %s", _lacking(wanted, strategy) or "others hold the room")
    finally:
        remove_placement_group(group)


def free_room() -> str:
    """What of the cluster nobody holds, in words."""
    have, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in ("CPU", "GPU") if have.get(name)]
    return ", ".join(f"{name} {free.get(name, 0):g} of {have[name]:g}" for name in names)


def _lacking(wanted: Sequence[Mapping[str, float]], strategy: str) -> str:
    """What the nodes as they are lack for these bundles, were they empty; "" if nothing."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total: Counter[str] = Counter()
    for bundle in wanted:
        total.update(bundle)
    lines = []
    for name, amount in total.items():
        there = sum(node.get(name, 0) for node in nodes)
        if there < amount:
            lines.append(f"{name}: {amount:g} wanted, {there:g} there")
    if lines:
        return "; ".join(lines)
    largest = [dict(total)] if strategy == "STRICT_PACK" else [dict(bundle) for bundle in wanted]
    for bundle in largest:
        if not any(all(node.get(n, 0) >= amount for n, amount in bundle.items()) for node in nodes):
            return f"no node has {bundle} for {'all of it' if strategy == 'STRICT_PACK' else 'one bundle'}"
    if strategy == "STRICT_SPREAD" and len(wanted) > len(nodes):
        return f"nodes: {len(wanted)} wanted, one for each bundle, {len(nodes)} there"
    return _unfit(wanted, nodes)


def _unfit(wanted: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> str:
    """The first bundle that finds no node, the large ones put first; "" if all do."""
    free = [dict(node) for node in nodes]
    for bundle in sorted(wanted, key=lambda b: (-b.get("GPU", 0), -b.get("CPU", 0))):
        for node in free:
            if all(node.get(name, 0) >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] -= amount
                break
        else:
            return f"no node has room left for {dict(bundle)} beside the other bundles"
    return ""


def _first_bundle(group: PlacementGroup, wanted: list[dict[str, float]]) -> int:
    """Where the wanted bundles begin in a group: they are its last ones."""
    first = len(group.bundle_specs) - len(wanted)
    if first < 0 or group.bundle_specs[first:] != wanted:
        raise ClusterError(
            "this process was placed in a group whose last bundles are not those of the run",
            given=group.bundle_specs,
            mend=f"ask for {wanted} behind the bundle of this process (actors.placement.bundles)",
        )
    return first


def _missing(config: Config, wanted: Counter[str]) -> str:
    have, free = ray.cluster_resources(), ray.available_resources()
    lines = [
        f"{name}: {amount:g} wanted, {free.get(name, 0):g} free of {have.get(name, 0):g}"
        for name, amount in wanted.items()
        if free.get(name, 0) < amount
    ]
    return "; ".join(lines) or f"no node fits a single bundle with strategy {config.cluster.strategy}"
