"""A cluster on this machine whose nodes Ray's autoscaler starts and ends, with Ray's provider for tests.

Each node has a raylet, an object store and processes of its own. `ray.cluster_utils.AutoscalingCluster` does
the same, but ends every Ray on the machine first; here only what carries a mark in its environment is ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.services import get_node_ip_address

__all__ = ["ENVIRONMENT", "HEAD_ID", "MARK", "alive", "kill_node", "scaled"]

HEAD_ID = "f" * 51 + "00000"
"""What the provider calls the head."""
MARK = "STATESET_RAY_NODES"
"""In the environment of every process of the cluster, and of the one that starts it."""
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}  # fmt: skip
"""That head and driver must be started with, beside the mark: Ray reads it once in a process."""
_LIMIT = 120.0  # seconds until the head is there
_LOOK = 0.2


@contextmanager
def scaled(folder: Path, most: int = 2) -> Iterator[str]:
    """A head without CPUs and an autoscaler that starts nodes of two CPUs here, so many; its address."""
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("", 0))
        port, client = first.getsockname()[1], second.getsockname()[1]
    address = f"{get_node_ip_address()}:{port}"
    node = {"node_config": {}, "min_workers": 0}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
             "rsync_filter")  # fmt: skip
    scaling = {
        "cluster_name": "nodes", "max_workers": most, "upscaling_speed": 1.0, "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external", "gcs_address": address, "launch_multiple": True, "head_node_id": HEAD_ID,
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": node | {"resources": {"CPU": 0}, "max_workers": 0},
            "worker": node | {"resources": {"CPU": 2, "object_store_memory": 10**8}, "max_workers": most},
        },
        "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }  # fmt: skip
    file = folder / "scaling.json"
    file.write_text(json.dumps(scaling), encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
        "--num-cpus=0", f"--autoscaling-config={file}", f"--temp-dir={folder / 'ray'}",
        "--object-store-memory=100000000", "--include-dashboard=false", "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={client}",
    ]  # fmt: skip
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _await_port(port, head, folder / "head.log")
        yield address
    finally:
        ray.shutdown()
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(30)
        _end_marked()


def _await_port(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline and head.poll() is None:
        with socket.socket() as probe:
            if "--block" in log.read_text() and probe.connect_ex((get_node_ip_address(), port)) == 0:
                return
        time.sleep(_LOOK)
    raise RuntimeError(f"Ray did not start: {log.read_text()[-2000:]}")


def alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def kill_node(node: str) -> None:
    """SIGKILL to a node's raylet, which its workers do not outlive."""
    for process in _marked():
        with suppress(psutil.Error):
            if (
                process.name() == "raylet"
                and process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node
            ):
                process.kill()
                return
    raise RuntimeError(f"node {node} has no raylet here")


def _marked() -> Iterator[psutil.Process]:
    """The processes of this cluster: those that carry its mark, but for this one and its parents."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid not in own and process.environ().get(MARK) == os.environ[MARK]:
                yield process


def _end_marked() -> None:
    """What outlives the head: nodes that the autoscaler has started."""
    left = list(_marked())
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=30)
