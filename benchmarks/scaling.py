"""How conversations a second grow with the workers, and a simulation of as many as are not here.

    python -m benchmarks.scaling                                      # 1, 2, 4, 8 workers; ~4 minutes
    python -m benchmarks.scaling --workers 1 2 --rounds 2                                  # a trial

Prints one JSON object (`--output FILE`: into a file too). The work: `benchmarks.late` (echo whose answers are
late, without computing), played by its own expert, so that nothing but this project and Ray computes.

| figure       | what it is                                                                         |
|--------------|------------------------------------------------------------------------------------|
| `per_second` | conversations that reached the controller                                          |
| `efficiency` | that by the figure of one worker times the workers: 1 is linear                    |
| `controller` | share of the time in which the controller's thread computed                        |
| `predicted`  | what the simulation says for the same workers; `error`: by how much it is off      |

The simulation takes what was recorded: how long each group took, how long the controller computes for each
report, and how long `ray.wait` takes by the number of calls it looks at. It plays workers that begin their
next group when one ends, and one controller that takes reports one after the other, all that are there at a
time. It assumes what it cannot know: that workers do not slow each other down (a core each, environments
that scale), that engines keep up, and the network, too. So it finds where this project's controller is the
first to be slow.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from benchmarks import machine
from stateset_ray.actors.jobs import GroupJob
from stateset_ray.actors.placement import cluster, place
from stateset_ray.actors.rollout_pool import RolloutPool, rollout_pool
from stateset_ray.config import Config, load_config
from stateset_ray.environments.base import build_environment
from stateset_ray.metrics import versions
from stateset_ray.models import local_folder

__all__ = ["Recorded", "simulate"]

_LOOKS = 30  # at each number of calls


def main() -> None:
    """Measure, simulate, print."""
    options = _options()
    started = machine.describe()
    measured = {workers: _measure(workers, options) for workers in options.workers}
    one = measured[min(measured)]
    recorded = Recorded(
        one["groups"], statistics.fmean(m["seconds_per_report"] for m in measured.values()), _look_seconds()
    )
    for workers, m in measured.items():
        m["efficiency"] = round(m["per_second"] / (one["per_second"] * workers / min(measured)), 3)
        predicted = simulate(workers, options.concurrency // options.group_size, options.rounds, recorded)
        m["predicted"] = round(predicted["groups_per_second"] * options.group_size, 1)
        m["error"] = round(m["predicted"] / m["per_second"] - 1, 3)
        del m["groups"]
    result = {
        "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
        "machine": started | {"load_1min_after": machine.describe()["load_1min"]},
        "commit": machine.commit(),
        "versions": versions(),
        "work": {key: value for key, value in vars(options).items() if key != "output"},
        "measured": measured,
        "recorded": {
            "group_seconds": round(statistics.fmean(recorded.groups), 4),
            "report_seconds": round(recorded.report, 7),
            "look_seconds_per_call": recorded.look,
        },
        "simulated": _simulated(recorded, options),
    }
    text = json.dumps(result, indent=2)
    print(text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


class Recorded:
    """What the simulation is fed with.

    Args:
        groups: seconds that groups took on a worker.
        report: seconds that the controller computes for one.
        look: seconds of `ray.wait`, by call that it looks at.
    """

    def __init__(self, groups: Sequence[float], report: float, look: float) -> None:
        self.groups, self.report, self.look = list(groups), report, look


def simulate(workers: int, places: int, rounds: int, recorded: Recorded, seed: int = 0) -> dict[str, float]:
    """Play `rounds` groups in each place of each worker.

    Args:
        places: groups that a worker plays at once.

    Returns:
        `groups_per_second`; `controller`, the share of the time in which it computes; `lag`, the 99th
        percentile of the seconds from the end of a group to that of its report.

    Example:
        >>> fast = Recorded([1.0], 0.0, 0.0)
        >>> simulate(2, 3, 5, fast)["groups_per_second"]
        6.0
    """
    dice = random.Random(seed)
    left = [places * rounds - places] * workers
    ends = [(dice.choice(recorded.groups), worker) for worker in range(workers) for _ in range(places)]
    heapq.heapify(ends)
    now = busy = 0.0
    lags: list[float] = []
    while ends:
        now = max(now, ends[0][0])
        came = []
        while ends and ends[0][0] <= now:  # the workers do not wait for the controller
            ended, worker = heapq.heappop(ends)
            came.append(ended)
            if left[worker]:
                left[worker] -= 1
                heapq.heappush(ends, (ended + dice.choice(recorded.groups), worker))
        cost = 2 * recorded.look * workers + recorded.report * len(came)
        now, busy = now + cost, busy + cost
        lags += [now - ended for ended in came]
    lag = statistics.quantiles(lags, n=100)[98] if len(lags) > 1 else lags[0]
    return {
        "groups_per_second": round(len(lags) / now, 3),
        "controller": round(busy / now, 3),
        "lag": round(lag, 4),
    }


def _simulated(recorded: Recorded, options: argparse.Namespace) -> dict[str, Any]:
    """Rows for workers that are not here, and the first that the controller cannot keep up with."""
    places = options.concurrency // options.group_size
    rows = {
        workers: simulate(workers, places, options.rounds, recorded)
        for workers in (8, 64, 128, 256, 512, 1024)
    }
    one = simulate(1, places, options.rounds, recorded)["groups_per_second"]
    for workers, row in rows.items():
        row["efficiency"] = round(row["groups_per_second"] / (one * workers), 3)
    late = [workers for workers, row in rows.items() if row["controller"] > 0.9]
    return {"rows": rows, "controller_saturated_at": late[0] if late else None}


def _measure(workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Play the same work for each worker on so many of them."""
    config = _config(workers, options)
    local_folder(config.model.name)
    with cluster(config), place(config, learners=False) as placement, rollout_pool(config, placement) as pool:
        _collect(pool, config, workers, 1, options)  # connections, imports
        started, computed = time.monotonic(), time.thread_time()
        groups = _collect(pool, config, workers, options.rounds, options)
        took, computed = time.monotonic() - started, time.thread_time() - computed
    return {
        "per_second": round(len(groups) * options.group_size / took, 2),
        "controller": round(computed / took, 4),
        "seconds_per_report": computed / len(groups),
        "groups": groups,
    }


def _collect(
    pool: RolloutPool, config: Config, workers: int, rounds: int, options: argparse.Namespace
) -> list[float]:
    """Play groups by the expert; the seconds of the slowest conversation of each."""
    environment = build_environment(config.environment.path, config.environment.options)
    count = workers * rounds * (options.concurrency // options.group_size)
    jobs = [
        GroupJob(
            f"scaling/{rounds}/{i}", environment.task("train", i), i, options.group_size, 1.0, expert=True
        )
        for i in range(count)
    ]
    collected = pool.collect(jobs)
    payloads = ray.get([handle.payload for handle in collected.groups])
    return [max(t.seconds for t in payload.group.trajectories) for payload in payloads]


def _look_seconds() -> float:
    """Seconds of `ray.wait` for each call that it looks at, by the difference of many and few."""
    with cluster(load_config(None, [])):
        silent = ray.remote(num_cpus=0)(_Silent).remote()
        calls = [silent.wait.remote() for _ in range(1000)]
        seconds = []
        for count in (100, 1000):
            started = time.perf_counter()
            for _ in range(_LOOKS):
                ray.wait(calls[:count], timeout=0, fetch_local=False)
            seconds.append((time.perf_counter() - started) / _LOOKS)
        ray.kill(silent)
    return max(0.0, (seconds[1] - seconds[0]) / 900)


class _Silent:
    """An actor that answers nothing."""

    async def wait(self) -> None:
        await asyncio.Event().wait()


def _config(workers: int, options: argparse.Namespace) -> Config:
    return load_config(None, [
        f"run.dir={tempfile.gettempdir()}", "model.name=tiny", "model.threads=1",
        "environment.path=benchmarks.late:Late", f"environment.options.median={options.latency}",
        f"environment.options.tail={options.tail}", f"rollout.workers={workers}",
        # One engine for all: they need no model, because the expert answers.
        "rollout.engines=1", f"rollout.concurrency={options.concurrency}",
        f"grpo.group_size={options.group_size}", "cluster.wait_seconds=300",
    ])  # fmt: skip


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--concurrency", type=int, default=32, help="conversations of a worker at once")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10, help="groups in each place of a worker")
    parser.add_argument("--latency", type=float, default=1.0, help="median seconds of an answer")
    parser.add_argument("--tail", type=float, default=2.0, help="p99 of the latency by its median")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
