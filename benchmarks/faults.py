"""What a run loses when its parts die, hang or lie: a seeded schedule of faults, beside a run without any.

    python -m benchmarks.faults                                # all faults, 3 seeds; on 2 cores ~15 minutes
    python -m benchmarks.faults --seeds 1 --faults worker raise                                  # a trial

Prints one JSON object (`--output FILE`: into a file too). The work: `benchmarks.faulty` (echo that answers
late), the tiny model, two workers and two engines on two local Ray nodes, one learner rank. Of every seed the
same run is trained twice: without faults, and with one fault every `--gap` steps, in an order and at moments
that the seed decides.

| fault     | what is done                                                                             |
|-----------|------------------------------------------------------------------------------------------|
| `worker`  | SIGKILL to a rollout worker                                                              |
| `engine`  | SIGKILL to an inference engine                                                           |
| `learner` | SIGKILL to the learner rank                                                              |
| `node`    | SIGKILL to the raylet of the second node, where another one has just joined              |
| `stop`    | SIGSTOP to a rollout worker, for ever                                                    |
| `slow`    | a rollout worker that runs a tenth of the time until the step ends (SIGSTOP and SIGCONT) |
| `raise`   | an environment whose every reply raises                                                  |
| `hang`    | an environment that never answers                                                        |
| `block`   | an environment that blocks its worker's event loop                                       |

| figure        | what it is                                                                           |
|---------------|--------------------------------------------------------------------------------------|
| `seconds`     | from the fault to the end of the step after the one that it hit, whatever was repeated |
| `usual`       | seconds of a step without faults, median                                             |
| `steps_again` | steps that had to be taken again                                                     |
| `aborted`, `dropped` | trajectories played in vain, or excluded, in those steps, by reason           |
| `unaccounted` | dispatched trajectories that ended nowhere, in the whole run                         |
| `duplicated`  | groups that came twice, in the whole run                                             |
| `missing`     | groups that never came, in the whole run                                             |
| `reward`      | of the last fifth of the steps, with and without faults                              |
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from benchmarks import machine
from stateset_ray.actors.run import Run
from stateset_ray.config import Config, corrected, load_config
from stateset_ray.metrics import JsonLines, versions
from stateset_ray.train import train, train_step
from stateset_ray.train_async import train_async_step

__all__ = ["FAULTS", "main", "unaccounted"]

FAULTS = ("worker", "engine", "learner", "node", "stop", "slow", "raise", "hang", "block")
_IN_TASKS = ("raise", "hang", "block")  # planted in a task, not done to a process
_LOOK = 0.2  # seconds between looks at a node
_SLICE = 0.02  # seconds that a slowed process runs at a time


def main() -> None:
    """Measure, then print."""
    options = _options()
    started = machine.describe()
    runs = []
    with _nodes() as nodes:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            calm, stormy = (_play(seed, faults, options, nodes) for faults in ((), options.faults))
            runs.append(_compared(seed, calm, stormy))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    result = {
        "command": " ".join(["python -m benchmarks.faults", *sys.argv[1:]]),
        "machine": started | {"load_1min_after": machine.describe()["load_1min"]},
        "commit": machine.commit(),
        "versions": versions(),
        "work": {key: value for key, value in vars(options).items() if key != "output"},
        "faults": _by_fault(runs),
        "runs": runs,
    }
    text = json.dumps(result, indent=2)
    print(text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


class _Nodes:
    """The second of two local nodes, and how to lose it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._second = self._join()

    def replace_second(self) -> Callable[[], None]:
        """Let another node join now; what ends the raylet of the second."""
        old, self._second = self._second, self._join()

        def kill() -> None:
            os.kill(old.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            while any(node["NodeID"] == old.node_id and node["Alive"] for node in ray.nodes()):
                time.sleep(_LOOK)  # Ray tells nobody when it has noticed

        return kill

    def _join(self) -> Any:
        return self._cluster.add_node(num_cpus=4)  # in the main thread only: Ray installs a signal handler


@contextmanager
def _nodes() -> Iterator[_Nodes]:
    # Short, because the sockets in it must stay below 108 characters.
    with tempfile.TemporaryDirectory(prefix="ssf", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        os.environ.pop("RAY_ADDRESS", None)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 4, "include_dashboard": False, "temp_dir": folder},
        )
        try:
            ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
            yield _Nodes(cluster)
        finally:
            ray.shutdown()
            cluster.shutdown()


def _play(seed: int, faults: Sequence[str], options: argparse.Namespace, nodes: _Nodes) -> dict[str, Any]:
    """One run; what it learned, and what became of each fault."""
    dice = random.Random(seed)
    order = dice.sample(list(faults), len(faults))
    schedule = {1 + place * options.gap: fault for place, fault in enumerate(order)}
    steps = max(options.steps, 2 + options.gap * len(options.faults))
    again: Counter[int] = Counter()
    hit: dict[int, float] = {}
    ended: dict[int, float] = {}

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            ended[event["step"]] = time.monotonic()

    def take(run: Run, step: int) -> Mapping[str, float]:
        again.update(struck for struck in hit if struck not in ended)
        usual = train_async_step if run.config.train.max_staleness else train_step
        fault = schedule.get(step)
        if fault is None or step in hit:
            return usual(run, step)
        with _under(_fault(fault, run, nodes), 0 if fault in _IN_TASKS else dice.uniform(0, options.moment)):
            hit[step] = time.monotonic()
            return usual(run, step)

    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        config = _config(seed, schedule, steps, Path(folder), options)
        train(config, on_event=watch, take_step=take)
        records = JsonLines(config.run.folder / "metrics.jsonl").read()
        logged = JsonLines(config.run.folder / "trajectories.jsonl").read()
    spans = [ended[step] - ended[step - 1] for step in range(1, steps) if step not in schedule]
    played = Counter(line["trajectory"]["task"]["id"] for line in logged)
    return {
        "rewards": [round(record["reward_mean"] or 0.0, 4) for record in records],
        "usual": round(statistics.median(spans), 2),
        "unaccounted": sum(unaccounted(record["trajectories"]) for record in records),
        "duplicated": sum(count - 1 for count in played.values()),
        "missing": steps * options.tasks - len(played),
        "hits": {
            fault: {
                "step": step,
                "seconds": round(ended[step + 1] - hit[step], 2),
                "steps_again": again[step],
                **_lost(records[min(step, step - again[step] + 1) : step + 2]),
            }
            for step, fault in schedule.items()
        },
    }  # fmt: skip


def _config(
    seed: int, schedule: Mapping[int, str], steps: int, folder: Path, options: argparse.Namespace
) -> Config:
    marks = folder / "marks"
    marks.mkdir()
    planted = {
        str(step * options.tasks): fault for step, fault in schedule.items() if fault in _IN_TASKS
    }  # fmt: skip
    return corrected(load_config(None, [
        f"run.dir={folder}", f"run.seed={seed}", "run.log_trajectories=1000", "model.name=tiny",
        "model.threads=1", "environment.path=benchmarks.faulty:Faulty",
        f"environment.options.seconds={options.latency}", f"environment.options.marks={marks}",
        *[f"environment.options.faults.{index}={fault}" for index, fault in planted.items()],
        "rollout.workers=2", "rollout.engines=2", "rollout.max_turns=2", "rollout.max_turn_tokens=4",
        "rollout.max_context=128", "rollout.on_cut_reply=close", "rollout.environment_timeout=3",
        "rollout.turn_timeout=120", "rollout.heartbeat_timeout=6", f"grpo.group_size={options.group_size}",
        "learner.engine=torch", "learner.learning_rate=3e-3", "learner.restarts=1000",
        "cluster.wait_seconds=240", "cluster.strategy=SPREAD", f"train.steps={steps}",
        f"train.tasks_per_step={options.tasks}", f"train.max_staleness={options.staleness}",
        f"train.checkpoint_every={options.checkpoint_every}", "evaluate.tasks=0",
    ]))  # fmt: skip


def _fault(name: str, run: Run, nodes: _Nodes) -> Callable[[threading.Event], None]:
    """What does the fault; it may go on until the step has ended."""
    pids = {"worker": run.pool.pids, "engine": run.pool.engine_pids, "learner": run.learners.pids}
    match name:
        case "worker" | "engine" | "learner":
            return lambda _: os.kill(pids[name][0], signal.SIGKILL)
        case "stop":
            return lambda _: os.kill(pids["worker"][0], signal.SIGSTOP)
        case "slow":
            return lambda ended: _slow_down(pids["worker"][0], ended)
        case "node":
            kill = nodes.replace_second()
            return lambda _: kill()
    return lambda _: None


def _slow_down(pid: int, ended: threading.Event) -> None:
    try:
        while not ended.wait(_SLICE):
            os.kill(pid, signal.SIGSTOP)
            ended.wait(9 * _SLICE)
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


@contextmanager
def _under(fault: Callable[[threading.Event], None], moment: float) -> Iterator[None]:
    """Do this so many seconds after the block has begun, beside it."""
    ended = threading.Event()

    def strike() -> None:
        if not ended.wait(moment):
            fault(ended)

    thread = threading.Thread(target=strike, name="fault")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _lost(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """What was aborted and dropped in these steps, by reason."""
    return {
        how: dict(sum((Counter(record["trajectories"][how]) for record in records), Counter()))
        for how in ("aborted", "dropped")
    }


def unaccounted(counts: Mapping[str, Any]) -> int:
    """Dispatched trajectories that ended nowhere, by the books of a step or of a run."""
    ended = counts["trained"] + counts["filtered"]
    return int(
        counts["dispatched"] - ended - sum(counts["dropped"].values()) - sum(counts["aborted"].values())
    )


def _compared(seed: int, calm: Mapping[str, Any], stormy: Mapping[str, Any]) -> dict[str, Any]:
    def last(run: Mapping[str, Any]) -> float:
        rewards = run["rewards"]
        return round(statistics.fmean(rewards[-max(1, len(rewards) // 5) :]), 4)

    return {
        "seed": seed, "usual": calm["usual"],
        "reward": {"without": last(calm), "with": last(stormy)},
        "rewards": {"without": calm["rewards"], "with": stormy["rewards"]},
        **{
            key: {"without": calm[key], "with": stormy[key]}
            for key in ("unaccounted", "duplicated", "missing")
        },
        "hits": stormy["hits"],
    }  # fmt: skip


def _by_fault(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each fault over all seeds: the seconds it took and the steps it cost."""
    hits = [(fault, hit) for run in runs for fault, hit in run["hits"].items()]
    return {
        fault: {
            "seconds": [hit["seconds"] for name, hit in hits if name == fault],
            "steps_again": [hit["steps_again"] for name, hit in hits if name == fault],
        }
        for fault in dict.fromkeys(name for name, _ in hits)
    }


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS, metavar="FAULT")
    parser.add_argument(
        "--gap",
        type=int,
        default=6,
        choices=range(2, 100),
        metavar="N",
        help="steps from one fault to the next: what one costs may show a step later",
    )
    parser.add_argument("--steps", type=int, default=0, help="at least so many")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=4, help="groups of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--staleness", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=2)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds of every answer")
    parser.add_argument(
        "--moment", type=float, default=0.5, help="a fault comes within so many seconds of a step"
    )
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
