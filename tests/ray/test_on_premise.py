"""`cluster/on_premise.sh`, carried out: two nodes on this machine, a token, a training, and an end of all."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from playground import gone

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "cluster" / "on_premise.sh")
QUIET = ("--object-store-memory=100000000", "--dashboard-agent-listen-port=0")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def node(env: dict[str, str], log: Path, *arguments: str) -> Iterator[list[int]]:
    """A node in the foreground of a process; the ids of all its processes once it is up."""
    with log.open("w") as file:
        process = subprocess.Popen(["bash", SCRIPT, *arguments], env=env, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    pids: list[int] = []
    try:
        while "will now block forever" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        pids += [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        yield pids
    finally:
        process.terminate()  # as systemd would
        process.wait(60)
        assert gone(pids)


def driver(env: dict[str, str], program: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=env | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


NODES = """
import os, ray
ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
print(sorted(n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]))
"""


def test_two_nodes_a_token_and_a_training(tmp_path: Path) -> None:
    short = tempfile.mkdtemp(prefix="op", dir="/tmp")
    port, dashboard, client, *metrics = free_ports(5)
    address = f"127.0.0.1:{port}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    bin_folder = str(Path(sys.executable).parent)
    env = kept | {
        "HOME": str(tmp_path), "PATH": f"{bin_folder}:{kept['PATH']}", "RAY_PORT": str(port),
        "RAY_DASHBOARD_PORT": str(dashboard), "STATESET_RAY_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    here = ["--node-ip-address=127.0.0.1", f"--temp-dir={short}", *QUIET]
    head = ["head", *here, f"--ray-client-server-port={client}", "--include-dashboard=false"]
    logs = tmp_path / "head.log", tmp_path / "worker.log"
    try:
        with ExitStack() as stack:
            head_pids = stack.enter_context(node(env | {"RAY_METRICS_PORT": str(metrics[0])}, logs[0], *head))
            assert len(head_pids) > 3
            worker = ["worker", "127.0.0.1", "--num-cpus=3", *here]
            stack.enter_context(node(env | {"RAY_METRICS_PORT": str(metrics[1])}, logs[1], *worker))
            inside = env | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}

            nodes = driver(inside, NODES)
            assert nodes.stdout.split("\n")[-2:] == ["[0, 3.0]", ""], nodes.stderr[-2000:]
            wrong = driver(inside, NODES, RAY_AUTH_TOKEN="0" * 64)
            assert wrong.returncode != 0
            assert "[" not in wrong.stdout
            no_token = driver(inside, NODES, RAY_AUTH_MODE="disabled")
            assert no_token.returncode != 0

            small = ["train.steps=1", "evaluate.tasks=0", f"run.dir={tmp_path}", "train.tasks_per_step=1"]
            trained = subprocess.run(
                ["stateset-ray", "train", str(ROOT / "examples" / "quickstart.toml"),
                 *[word for setting in small for word in ("--set", setting)]],
                env=inside, capture_output=True, text=True, check=False, timeout=180,
            )  # fmt: skip
            assert trained.returncode == 0, trained.stdout + trained.stderr
            assert "step 1/1" in trained.stdout
    finally:
        shutil.rmtree(short, ignore_errors=True)
