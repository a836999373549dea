"""A run on several Ray nodes, some of which die, leave and join: what it loses, and how long it takes.

    python -m benchmarks.nodes                             # both; on 2 cores ~3 minutes
    python -m benchmarks.nodes --scenarios lost            # one of them

Prints one JSON object (`--output FILE`: into a file too). The work is `benchmarks.faulty` (echo that answers
late) with the tiny model. All nodes are on this machine, each with a raylet, an object store and processes of
its own, so that what is between them is loopback: no delay, no loss, no partition. (The kernel of the machine
that this was measured on has no netem, with which network namespaces could have those; it is not imitated.)

`lost`: the head holds no actors; two nodes hold a learner rank and a rollout worker each (gloo, DeepSpeed
ZeRO 2). In the middle of a step the second one is killed, whole. Once the run has noticed, another is added.

`autoscaler`: a head alone, and Ray's autoscaler with a provider that starts nodes on this machine. The run
asks for one learner rank and one worker, and lets two more join (`rollout.max_workers`). When they have,
their node is killed; the autoscaler replaces it. After the run's end all nodes but the head go.

| figure        | what it is                                                                             |
|---------------|----------------------------------------------------------------------------------------|
| `nodes`       | Ray nodes on which the learner ranks' bundles lay, before and after                     |
| `noticed`     | seconds from the death of the node until the run said so (`learner_lost`)               |
| `ray_noticed` | the same until Ray did: before that, no bundle finds another node                       |
| `rebuilt`     | seconds from the new node until all ranks had the checkpoint (`learner_rebuilt`)        |
| `recovered`   | seconds from the death of the node to the end of the next step                          |
| `usual`       | seconds of a step, median                                                               |
| `steps_again` | finished steps that had to be taken again                                               |
| `joined`      | seconds from the start of the run until both guests played                              |
| `rejoined`    | seconds from the death of their node until both played again                            |
| `left`        | seconds from the end of the run until the head was alone                                |
| `trajectories` | the run's books, summed over its steps                                                 |
| `unaccounted` | dispatched trajectories that ended nowhere                                              |
| `duplicated`, `missing` | groups that came twice, or never                                              |
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from benchmarks import machine
from benchmarks.faults import unaccounted
from benchmarks.scaled_cluster import ENVIRONMENT, HEAD_ID, MARK, alive, kill_node, scaled
from stateset_ray.actors.run import Run
from stateset_ray.config import Config, load_config
from stateset_ray.metrics import JsonLines, versions
from stateset_ray.train import train, train_step

__all__ = ["SCENARIOS", "main"]

SCENARIOS = ("lost", "autoscaler")
_LIMIT = 240.0  # seconds for anything that is waited for
_LOOK = 0.2


def main() -> None:
    """Measure, then print."""
    options = _options()
    if options.inside:
        print(json.dumps({"lost": _lost, "autoscaler": _autoscaler}[options.scenarios[0]](options)))
        return
    started = machine.describe()
    result = {
        "command": " ".join(["python -m benchmarks.nodes", *sys.argv[1:]]),
        "machine": started,
        "commit": machine.commit(),
        "versions": versions(),
        "scenarios": {name: _in_a_process(name, options) for name in options.scenarios},
    }
    result["machine"] |= {"load_1min_after": machine.describe()["load_1min"]}
    text = json.dumps(result, indent=2)
    print(text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _in_a_process(name: str, options: argparse.Namespace) -> Any:
    """Ray reads its environment once in a process, and the scenarios want different ones."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env["RAY_AUTH_MODE"] = "disabled"
    if name == "autoscaler":
        env |= ENVIRONMENT | {MARK: str(os.getpid())}
    command = [sys.executable, "-m", "benchmarks.nodes", "--inside", "--scenarios", name]
    command += ["--steps", str(options.steps), "--moment", str(options.moment)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- a node dies ------------------------------------------------------------------------------------------


def _lost(options: argparse.Namespace) -> dict[str, Any]:
    events: queue.Queue[tuple[float, Mapping[str, Any]]] = queue.Queue()
    heard: list[tuple[float, Mapping[str, Any]]] = []
    death = threading.Event()

    def until(kind: str) -> float:
        """When this event was told; waits for it."""
        while True:
            moment, event = events.get(timeout=_LIMIT)
            heard.append((moment, event))
            if event["event"] == "failed":
                raise RuntimeError("the run failed") from event["error"]
            if event["event"] == kind:
                return moment

    def tell(event: Mapping[str, Any]) -> None:
        events.put((time.monotonic(), dict(event)))

    places: list[list[str]] = []

    def take(run: Run, step: int) -> Mapping[str, float]:
        if step == 1 and not death.is_set():
            places.append(_learner_nodes(run.config))
            tell({"event": "begun"})
            death.wait(_LIMIT)
        if step == options.steps - 1:
            places.append(_learner_nodes(run.config))
        return train_step(run, step)

    with _folder() as folder, _cluster(folder) as cluster:
        _, second = (cluster.add_node(num_cpus=3) for _ in range(2))
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        config = _config(
            folder, options.steps, "rollout.workers=2", "learner.ranks=2", "learner.zero_stage=2",
            "cluster.learner_cpus=2", "cluster.strategy=SPREAD", f"cluster.address={cluster.address}",
            "train.checkpoint_every=1",
        )  # fmt: skip
        # In a thread, because only the main one may add a node.
        training = threading.Thread(target=_told, args=(config, tell, take), daemon=True)
        training.start()
        until("begun")
        death.set()
        time.sleep(options.moment)  # into the step
        killed = time.monotonic()
        cluster.remove_node(second, allow_graceful=False)
        noticed = until("learner_lost")
        cluster.add_node(num_cpus=3)
        added = time.monotonic()
        while any(node["NodeID"] == second.node_id and node["Alive"] for node in ray.nodes()):
            time.sleep(_LOOK)  # Ray tells nobody when it has noticed
        ray_noticed = time.monotonic()
        rebuilt = until("learner_rebuilt")
        recovered = until("step")
        until("finished")
        training.join(_LIMIT)
        records = JsonLines(config.run.folder / "metrics.jsonl").read()
        result = {
            "nodes": {"before": len(set(places[0])), "after": len(set(places[-1]))},
            "noticed": round(noticed - killed, 2),
            "ray_noticed": round(ray_noticed - killed, 2),
            "rebuilt": round(rebuilt - added, 2),
            "recovered": round(recovered - killed, 2),
            "usual": _usual(heard),
            "steps_again": sum(event["event"] == "step" for _, event in heard) - len(records),
            **_books(config, records),
        }
        ray.shutdown()
    return result


def _told(config: Config, tell: Callable[[Mapping[str, Any]], None], take: Any) -> None:
    try:
        train(config, on_event=tell, take_step=take)
    except BaseException as error:
        tell({"event": "failed", "error": error})
        raise


@contextmanager
def _cluster(folder: Path) -> Iterator[Cluster]:
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder / "ray")}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _learner_nodes(config: Config) -> list[str]:
    """The node of each learner rank: theirs are the last bundles of the run's group."""
    [group] = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
    nodes = [group["bundles_to_node_id"][index] for index in sorted(group["bundles_to_node_id"])]
    return nodes[-config.learner.ranks :]


# -- nodes come and go --------------------------------------------------------------------------------------


def _autoscaler(options: argparse.Namespace) -> dict[str, Any]:
    marks: dict[str, float] = {}
    ended: list[float] = []

    def note(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            ended.append(time.monotonic())

    def take(run: Run, step: int) -> Mapping[str, float]:
        update = train_step(run, step)
        live = run.pool.capacity  # in groups, of which a worker plays one
        marks.setdefault("first", time.monotonic())
        if "joined" not in marks:
            if live == 3:
                marks["joined"] = time.monotonic()
                kill_node(_guests_node())
                marks["killed"] = time.monotonic()
        elif "lost" not in marks:
            if live < 3:
                marks["lost"] = time.monotonic()
        elif live == 3:
            marks["rejoined"] = time.monotonic()
            run.request_stop()
        if time.monotonic() - marks["first"] > _LIMIT:
            raise RuntimeError(f"nothing comes any more: {marks}, {live} workers")
        return update

    with _folder() as folder, scaled(folder) as address:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        config = _config(
            folder, 100_000, "rollout.workers=1", "rollout.max_workers=3", "rollout.concurrency=4",
            "train.checkpoint_every=100000", "learner.engine=torch", f"cluster.address={address}",
        )  # fmt: skip
        begun = time.monotonic()
        with suppress(KeyboardInterrupt):  # it was told to stop, and has saved
            train(config, on_event=note, take_step=take)
        over = time.monotonic()
        records = JsonLines(config.run.folder / "metrics.jsonl").read()
        most = len(alive())
        while len(alive()) > 1:
            if time.monotonic() - over > _LIMIT:
                raise RuntimeError(f"nodes stay: {[node['NodeID'] for node in alive()]}")
            time.sleep(_LOOK)
        left = time.monotonic() - over
        after = [moment for moment in ended if moment > marks["killed"]]
        return {
            "nodes": most,
            "started": round(marks["first"] - begun, 2),
            "joined": round(marks["joined"] - begun, 2),
            "recovered": round(after[0] - marks["killed"], 2),
            "rejoined": round(marks["rejoined"] - marks["killed"], 2),
            "left": round(left, 2),
            "steps": len(records),
            "usual": round(statistics.median(b - a for a, b in itertools.pairwise(ended)), 2),
            **_books(config, records),
        }


def _guests_node() -> str:
    """The id of the node that holds guests and nothing that the run cannot do without."""
    [group] = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
    kept = {*group["bundles_to_node_id"].values(), HEAD_ID}
    [guests] = [node["NodeID"] for node in alive() if node["NodeID"] not in kept]
    return str(guests)


# -- both ---------------------------------------------------------------------------------------------------


@contextmanager
def _folder() -> Iterator[Path]:
    # Short, because the sockets in it must stay below 108 characters.
    with tempfile.TemporaryDirectory(prefix="ssn", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _config(folder: Path, steps: int, *overrides: str) -> Config:
    return load_config(None, [
        f"run.dir={folder}", "run.name=nodes", "run.log_trajectories=1000", "model.name=tiny",
        "model.threads=1", "environment.path=benchmarks.faulty:Faulty", "environment.options.seconds=0.1",
        "rollout.max_turns=2", "rollout.max_turn_tokens=4", "rollout.max_context=128",
        "rollout.on_cut_reply=close", "rollout.turn_timeout=120", "rollout.heartbeat_timeout=20",
        "grpo.group_size=4", "learner.learning_rate=3e-3", "cluster.wait_seconds=180",
        f"train.steps={steps}", "train.tasks_per_step=6", "evaluate.tasks=0", *overrides,
    ])  # fmt: skip


def _usual(heard: Sequence[tuple[float, Mapping[str, Any]]]) -> float:
    """Seconds of a step, by its own clock, so that what happened between steps does not count."""
    return round(statistics.median(sum(e["seconds"].values()) for _, e in heard if e["event"] == "step"), 2)


def _books(config: Config, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {"dropped": Counter(), "aborted": Counter()}
    for record in records:
        counts = record["trajectories"]
        total.update({key: counts[key] for key in ("dispatched", "trained", "filtered")})
        for how, why in reasons.items():
            why.update(counts[how])
    logged = JsonLines(config.run.folder / "trajectories.jsonl").read()
    played = Counter(line["trajectory"]["task"]["id"] for line in logged)
    return {
        "trajectories": {**total, **{how: dict(why) for how, why in reasons.items()}},
        "unaccounted": sum(unaccounted(record["trajectories"]) for record in records),
        "duplicated": sum(count - 1 for count in played.values()),
        "missing": len(records) * config.train.tasks_per_step - len(played),
    }


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS, metavar="SCENARIO"
    )
    parser.add_argument("--steps", type=int, default=6, help="of the scenario `lost`")
    parser.add_argument("--moment", type=float, default=0.2, help="a node dies so many seconds into a step")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
