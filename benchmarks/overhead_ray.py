"""Part `ray` of `benchmarks.overhead`: scripted conversations through Ray, into the learner's hands.

The controller dispatches flights of 2,048 conversations to a `RolloutPool` of two `RolloutWorker`s, the
next one before it waits for the last, as a run with rollouts ahead does. The jobs are an expert's, so that
no model is asked. The payloads of each flight go to an actor in the learner's place by reference, which
fetches them, credits each row and counts its tokens.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import ray

from stateset_ray.actors.flight import Flight
from stateset_ray.actors.jobs import GroupJob, GroupPayload
from stateset_ray.actors.placement import place
from stateset_ray.actors.rollout_pool import RolloutPool, rollout_pool
from stateset_ray.config import Config, load_config
from stateset_ray.environments.echo import Echo

__all__ = ["measure"]

_TURNS = 3
_WORKERS = 2
_FLIGHT = 2048  # conversations
_WARM = 2  # flights before the clock starts


class _Hands:
    """Takes payloads as a learner rank does."""

    def ready(self) -> int:
        return os.getpid()

    def take(self, payloads: Sequence[Any], advantages: tuple[float, ...]) -> int:
        """Tokens of all rows, credited."""
        fetched: list[GroupPayload] = ray.get(list(payloads))
        rows = [row for payload in fetched for of_one in payload.samples for row in of_one]
        return sum(len(row.credited(advantages)) for row in rows)


class _Courier:
    """Sends bytes by a stream, two things for each group, and does nothing else."""

    def ready(self) -> int:
        return os.getpid()

    async def play(self, groups: int, payload: bytes, report: bytes) -> AsyncIterator[bytes]:
        for _ in range(groups):
            yield payload
            yield report


def measure(sizes: Sequence[int], flights: int, flight: int = _FLIGHT) -> dict[str, Any]:
    """Conversations a second for each group size, beside what Ray's streams carry alone.

    Args:
        flights: that are timed.
        flight: conversations of each.
    """
    with _cluster() as folder:
        return {
            "workers": _WORKERS,
            "conversations": flights * flight,
            "group_sizes": {str(size): _compared(folder, size, flights, flight // size) for size in sizes},
        }


def _compared(folder: str, size: int, flights: int, groups: int) -> dict[str, Any]:
    config = load_config(
        None,
        [
            f'run.dir="{folder}"', "model.name=tiny", "model.threads=1",
            "environment.path=stateset_ray.environments.echo:Echo", f"environment.options.turns={_TURNS}",
            f"rollout.workers={_WORKERS}", f"rollout.max_turns={_TURNS}", f"grpo.group_size={size}",
            "evaluate.tasks=0",
        ],
    )  # fmt: skip
    with place(config, learners=False) as placement, rollout_pool(config, placement) as pool:
        ours, sent = _ours(config, pool, size, flights, groups)
    bare = _bare(sent, flights * groups, size)
    return {**ours, "bare": bare, "of_bare": round(ours["per_second"] / bare["per_second"], 3)}


def _ours(
    config: Config, pool: RolloutPool, size: int, flights: int, groups: int
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The rate, and the bytes of a payload and of a report."""
    hands = ray.remote(num_cpus=0)(_Hands).remote()
    roles = {"controller": [os.getpid()], "workers": pool.pids, "hands": [ray.get(hands.ready.remote())]}
    tasks = Echo(turns=_TURNS)

    def begin(number: int) -> Flight:
        flight = Flight()
        drawn = [tasks.task("train", number * groups + i) for i in range(groups)]
        jobs = [GroupJob(f"r/{number}/{task.id}", task, number, size, 1.0, expert=True) for task in drawn]
        pool.dispatch(flight, jobs)
        return flight

    taken, clock, busy = [], 0.0, {}
    flight = begin(0)
    for number in range(_WARM + flights):
        if number == _WARM:
            ray.get(taken)
            clock, busy = time.perf_counter(), _processor_seconds(roles)
        following = begin(number + 1)
        pool.wait(flight)
        handles = pool.collected(flight).groups
        if [h.report.rewards for h in handles] != [(1.0,) * size] * groups:
            raise RuntimeError("a conversation was not played as it should be")
        taken.append(hands.take.remote([h.payload for h in handles], (1.0,) * _TURNS))
        flight = following
    tokens = sum(ray.get(taken)[_WARM:])
    spent = time.perf_counter() - clock
    after = _processor_seconds(roles)
    pool.wait(flight)
    example = handles[0]
    sizes = tuple(len(ray.cloudpickle.dumps(x)) for x in (ray.get(example.payload), example.report))
    return {
        "per_second": round(flights * groups * size / spent),
        "groups_per_second": round(flights * groups / spent, 1),
        "tokens": tokens,
        "cores": {role: round((after[role] - busy[role]) / spent, 2) for role in roles},
        "bytes_per_group": {"payload": sizes[0], "report": sizes[1]},
    }, (sizes[0], sizes[1])


def _bare(sent: tuple[int, int], groups: int, size: int) -> dict[str, Any]:
    couriers = [ray.remote(num_cpus=0)(_Courier).remote() for _ in range(_WORKERS)]
    roles = {
        "controller": [os.getpid()],
        "couriers": [ray.get(courier.ready.remote()) for courier in couriers],
    }
    payload, report = (bytes(length) for length in sent)
    start, busy = time.perf_counter(), _processor_seconds(roles)
    streams = [
        courier.play.options(num_returns="streaming").remote(groups // _WORKERS, payload, report)
        for courier in couriers
    ]
    while streams:
        [stream], _ = ray.wait(streams, num_returns=1, fetch_local=False)
        try:
            next(stream)
            ray.get(next(stream))
        except StopIteration:
            streams.remove(stream)
    spent, after = time.perf_counter() - start, _processor_seconds(roles)
    for courier in couriers:
        ray.kill(courier)
    return {
        "per_second": round(groups * size / spent),
        "groups_per_second": round(groups / spent, 1),
        "cores": {role: round((after[role] - busy[role]) / spent, 2) for role in roles},
    }


def _processor_seconds(roles: dict[str, list[int]]) -> dict[str, float]:
    return {
        role: sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids) for role, pids in roles.items()
    }


@contextmanager
def _cluster() -> Iterator[str]:
    """A local Ray of the benchmark's own, or the one that this process is connected to; a folder for it."""
    folder = tempfile.mkdtemp(prefix="ovh", dir="/tmp")  # short: its sockets' names are bounded
    started = not ray.is_initialized()
    try:
        if started:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            ray.init(
                address="local", num_cpus=_WORKERS + 1, include_dashboard=False, log_to_driver=False,
                logging_level="ERROR", _temp_dir=folder,
            )  # fmt: skip
        yield folder
    finally:
        if started:
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
