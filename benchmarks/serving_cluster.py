"""An endpoint whose cluster changes under it, while clients ask without a pause and without retries.

    python -m benchmarks.serving_cluster                    # both
    python -m benchmarks.serving_cluster --scenarios gcs --times 5

Prints one JSON object (`--output FILE`: into a file too). The tiny model; every scenario has a cluster of its
own on this machine.

`nodes`: many clients ask, until there are three policy replicas, each on a node that Ray's autoscaler has
started; then one client asks twice a second, until there is one replica and one such node.

`gcs`: SIGKILL to the head's GCS, which keeps its state in a real redis-server. Seconds later it is started
again, and a policy replica is killed, which only a whole cluster replaces. Conversations and rates are in the
same server.

| figure                   | what it is                                                                   |
|--------------------------|------------------------------------------------------------------------------|
| `requests`, `failed`     | that clients made, and what those that failed were told                      |
| `up`, `down`             | seconds until there were three replicas, and until there was one again       |
| `nodes`                  | beside the head: before, with three replicas, in the end                     |
| `nodes_left`             | seconds until the last node that was not needed had gone                     |
| `gone`                   | seconds without a GCS                                                        |
| `without`, `without_ms`  | requests begun meanwhile; their 50th and 99th percentile in milliseconds     |
| `total_ms`               | the same of all requests                                                     |
| `answers`                | seconds from the start of the GCS until Serve's controller answered          |
| `replaced`               | seconds from the death of a replica until there were two again               |
| `kept`                   | messages of a conversation: before, in each absence of the GCS, in the end   |
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks import machine
from benchmarks.scaled_cluster import ENVIRONMENT, HEAD_ID, MARK, alive, scaled
from benchmarks.serving_clients import Client, Told, crowd, percentiles, summary
from benchmarks.serving_endpoint import Endpoint, free_port
from stateset_ray.metrics import versions
from stateset_ray.serving.settings import (
    SERVE_LOGGING,
    AutoscalingSettings,
    ConversationSettings,
    RateSettings,
)

__all__ = ["SCENARIOS", "main"]

SCENARIOS = ("nodes", "gcs")
_CLIENTS = 12  # of the load under which replicas come
_LIMIT = 240.0  # seconds for anything that is waited for
_LOOK = 0.2


def main() -> None:
    """Measure, then print."""
    options = _options()
    if options.inside:
        print(json.dumps({"nodes": _nodes, "gcs": _gcs}[options.scenarios[0]](options)))
        return
    result = {
        "machine": machine.describe(), "commit": machine.commit(), "versions": versions(),
        "scenarios": {name: _in_a_process(name, options) for name in options.scenarios},
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _in_a_process(name: str, options: argparse.Namespace) -> Any:
    """Ray reads its environment once in a process, and the scenarios want different ones."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, "-m", "benchmarks.serving_cluster", "--inside", "--scenarios", name]
    command += ["--times", str(options.times), "--seconds", str(options.seconds)]
    if name == "nodes":
        env |= ENVIRONMENT | {MARK: str(os.getpid())}
        return _told(command, env)
    with _redis() as port:
        return _told(command, env | {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"})


def _told(command: Sequence[str], env: dict[str, str]) -> Any:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- replicas and nodes come and go -------------------------------------------------------------------------


def _nodes(_: argparse.Namespace) -> dict[str, Any]:
    with _folder() as folder, scaled(folder, most=3) as address:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        made = Endpoint(folder, "tiny", 512, 8)
        scaling = AutoscalingSettings(
            max_replicas=3, target_tokens=60.0, upscale_delay=2.0, downscale_delay=10.0, interval=1.0
        )
        made.settings = made.settings.model_copy(update={"autoscaling": scaling})
        serve.start(
            http_options={"host": "127.0.0.1", "port": made.port},
            proxy_location="HeadOnly",
            logging_config=SERVE_LOGGING,
        )
        try:
            # So that no two replicas fit on a node of two CPUs, but the ingress beside one does.
            made.deploy(replicas=1, cpus=1.5, queued=64, surge=0)
            marks, seen = {"began": time.monotonic()}, [_workers()]

            def grow() -> None:
                _await(lambda: len(made.replicas()) == 3, "three replicas")
                marks["up"] = time.monotonic()
                seen.append(_workers())
                time.sleep(5)

            def shrink() -> None:
                marks["calm"] = time.monotonic()
                _await(lambda: len(made.replicas()) == 1, "one replica")
                marks["down"] = time.monotonic()
                _await(lambda: _workers() == 1, "one node")
                marks["left"] = time.monotonic()
                seen.append(_workers())

            found = asyncio.run(crowd(made, _CLIENTS, grow, tokens=60, stream=False, lasting=False))
            found += asyncio.run(_calm(made, shrink))
        finally:
            serve.shutdown()
        return {
            **summary(found),
            "up": round(marks["up"] - marks["began"], 1),
            "down": round(marks["down"] - marks["calm"], 1),
            "nodes_left": round(marks["left"] - marks["calm"], 1),
            "nodes": seen,
        }


def _workers() -> int:
    """Nodes that the autoscaler has started and not taken back."""
    return sum(node["NodeID"] != HEAD_ID for node in alive())


async def _calm(made: Endpoint, work: Callable[[], None]) -> list[Told]:
    """One client that asks twice a second while `work` is done in a thread."""
    found: list[Told] = []
    working = asyncio.create_task(asyncio.to_thread(work))
    async with Client.of(made) as client:
        while not working.done():
            told, _ = await client.ask(tokens=20, session="calm", stream=False)
            found.append(told)
            await asyncio.sleep(0.5)
    await working
    return found


# -- the head's state server dies ---------------------------------------------------------------------------


def _gcs(options: argparse.Namespace) -> dict[str, Any]:
    url = f"redis://{os.environ['RAY_REDIS_ADDRESS']}"
    args = {
        "num_cpus": 8, "include_dashboard": False, "gcs_server_port": free_port(),
        "object_store_memory": 150 << 20,
    }  # fmt: skip
    with _folder() as folder:
        cluster = Cluster(initialize_head=True, head_node_args={**args, "temp_dir": str(folder / "ray")})
        try:
            ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
            made = Endpoint(folder, "tiny", 512, 16)
            made.settings = made.settings.model_copy(update={
                "conversations": ConversationSettings(store=f"{url}/1"),
                "rates": RateSettings(requests="10000000/minute", concurrent=100_000, storage=f"{url}/2"),
            })  # fmt: skip
            serve.start(
                http_options={"host": "127.0.0.1", "port": made.port},
                proxy_location="HeadOnly",
                logging_config=SERVE_LOGGING,
            )
            made.deploy()
            return _without_gcs(made, cluster.head_node, options)
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


def _without_gcs(made: Endpoint, head: Any, options: argparse.Namespace) -> dict[str, Any]:
    gone: list[tuple[float, float]] = []
    answers: list[float] = []
    replaced: list[float] = []
    with openai.OpenAI(base_url=f"{made.url}/v1", api_key=made.key, max_retries=0) as ai:
        talk = ai.conversations.create()

        def say() -> int:
            """A turn of a conversation that is kept; how many messages it has then."""
            ai.chat.completions.create(
                model="bench", messages=[{"role": "user", "content": "hi"}], max_tokens=4,
                extra_body={"conversation": talk.id},
            )  # fmt: skip
            return len(ai.conversations.items.list(talk.id, limit=100).data)

        kept = [say()]

        def work() -> None:
            for _ in range(options.times):
                time.sleep(2)
                head.kill_gcs_server()
                killed = time.monotonic()
                kept.append(say())
                time.sleep(options.seconds)
                head.start_gcs_server()
                started = time.monotonic()
                gone.append((killed, started))
                _await(lambda: serve.status().applications["policy"].status == "RUNNING", "Serve")
                answers.append(time.monotonic() - started)
                begun = time.monotonic()
                made.kill_policy()
                replaced.append(time.monotonic() - begun)
            kept.append(say())

        found = asyncio.run(crowd(made, 4, work, tokens=20, stream=False))
    good = [t for t in found if t.told == "answered"]
    without = [t for t in good if any(killed <= t.begun <= started for killed, started in gone)]
    return {
        "requests": len(found),
        "failed": dict(Counter(t.told for t in found if t.told != "answered")),
        "times": len(gone),
        "gone": [round(started - killed, 1) for killed, started in gone],
        "without": len(without),
        "without_ms": percentiles([t.ended - t.begun for t in without]),
        "total_ms": percentiles([t.ended - t.begun for t in good]),
        "answers": [round(seconds, 1) for seconds in answers],
        "replaced": [round(seconds, 1) for seconds in replaced],
        "kept": kept,
    }


@contextmanager
def _redis() -> Iterator[int]:
    """A redis-server of our own, with nothing on disk; its port."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed (apt-get install redis-server)")
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            yield port
        finally:
            server.terminate()


# -- both ---------------------------------------------------------------------------------------------------


@contextmanager
def _folder() -> Iterator[Path]:
    # Short, because the sockets in it must stay below 108 characters.
    with tempfile.TemporaryDirectory(prefix="ssc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _await(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _LIMIT
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come in {_LIMIT:g} s")
        time.sleep(_LOOK)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--times", type=int, default=3, help="the GCS is killed")
    parser.add_argument("--seconds", type=float, default=5, help="it stays away")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
