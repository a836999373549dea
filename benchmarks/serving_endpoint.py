"""An endpoint on a Ray Serve of its own, for `benchmarks.serving`: its keys, its run, its processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import ray
from ray import serve
from safetensors.torch import load_file, save_file

from stateset_ray import checkpoint
from stateset_ray.config import load_config
from stateset_ray.models import local_folder
from stateset_ray.serving.app import build
from stateset_ray.serving.deploy_file import deploy_file
from stateset_ray.serving.security import add_key
from stateset_ray.serving.settings import (
    SERVE_LOGGING,
    STEADY_MEMORY,
    PolicySettings,
    RateSettings,
    SecuritySettings,
    ServeSettings,
    SwapSettings,
)

__all__ = ["KINDS", "PATIENCE", "Endpoint", "endpoint", "free_port"]

PATIENCE = 120.0  # seconds that anything may take
KINDS = {
    "policy": "ray::ServeReplica:policy:Policy", "ingress": "ray::ServeReplica:policy:Ingress",
    "bare": "ray::ServeReplica:bare:", "proxy": "ray::ProxyActor",
}  # fmt: skip
"""Of processes: how their names begin."""


class Endpoint:
    """Where it is, its keys, and the run that it follows."""

    def __init__(self, folder: Path, model: str, context: int, slots: int) -> None:
        self.port, self.dashboard = free_port(), free_port()
        self.seconds = 10.0  # of a measurement
        self.url = f"http://127.0.0.1:{self.port}"
        self.run, keys = folder / "run", folder / "keys.json"
        self.run.mkdir()
        config = (
            f"model.name={model}",
            "model.threads=1",
            "model.device=cpu",
            f"rollout.max_context={context}",
        )
        (self.run / "config.toml").write_text(load_config(None, config).to_toml(), encoding="utf-8")
        self.key = add_key(keys, "client")
        self._admin = {"authorization": f"Bearer {add_key(keys, 'admin', admin=True)}"}
        self._model, self._step, self.context = model, 0, context
        self.save(1.0)
        self.settings = ServeSettings(
            source=str(self.run), model_id="bench",
            policy=PolicySettings(replicas=2, threads=1, slots=slots, ongoing=slots, queued=slots, surge=50),
            swap=SwapSettings(poll_seconds=0.5),
            rates=RateSettings(requests="10000000/minute", concurrent=100_000),
            security=SecuritySettings(keys_file=keys),
        )  # fmt: skip

    def deploy(self, **policy: Any) -> None:
        """Deploy it, with other settings of the policy, and wait until that is done."""
        changed = self.settings.policy.model_copy(update=policy)
        self.settings = self.settings.model_copy(update={"policy": changed})
        serve.run(build(self.settings), name="policy", route_prefix="/")

    def deploy_by_command(self, **policy: Any) -> None:
        """The same through `serve deploy FILE`, which answers before anything is done."""
        changed = self.settings.policy.model_copy(update=policy)
        self.settings = self.settings.model_copy(update={"policy": changed})
        file = self.run.parent / "policy.yaml"
        file.write_text(deploy_file(self.settings, "127.0.0.1", self.port), encoding="utf-8")
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file)]
        subprocess.run(
            [*command, "--address", f"http://127.0.0.1:{self.dashboard}"], check=True, capture_output=True,
            timeout=PATIENCE,
        )  # fmt: skip

    def replicas(self) -> list[dict[str, Any]]:
        """What each policy replica holds and does; [] while none answers."""
        try:
            answer = httpx2.get(f"{self.url}/admin/weights", headers=self._admin, timeout=PATIENCE)
            answer.raise_for_status()
        except httpx2.HTTPError:
            return []
        found: list[dict[str, Any]] = answer.json()["replicas"]
        return found

    def reaches(self, wanted: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Wait until the replicas are as wanted."""
        end = time.monotonic() + PATIENCE
        while not (found := self.replicas()) or not wanted(found):
            if time.monotonic() > end:
                raise TimeoutError(f"the replicas stay as they are: {found}")
            time.sleep(0.1)

    def save(self, scale: float) -> int:
        """A checkpoint of the model, its weights multiplied."""

        def write(folder: Path) -> None:
            shutil.copytree(local_folder(self._model), folder, dirs_exist_ok=True)
            weights = load_file(folder / "model.safetensors")
            save_file(
                {k: v * scale for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"}
            )

        self._step += 1
        meta = {"version": self._step, "results": {}}
        # All are kept: ten of NaN would push out the last one that a replica can start with.
        checkpoint.save(self.run / "checkpoints", self._step, write, meta=meta, keep=1000)
        return self._step

    def processes(self, *kinds: str) -> dict[int, tuple[str, psutil.Process]]:
        """Their kind and themselves by process id, of some of `KINDS` or all: only our own."""
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                name = " ".join(process.cmdline())
            except psutil.Error:
                continue
            for kind in kinds or KINDS:
                if name.startswith(KINDS[kind]):
                    found[process.pid] = kind, process
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """That were used so far: by `KINDS` of processes, and by this one (the clients)."""
        used = dict.fromkeys(KINDS, 0.0)
        for kind, process in self.processes().values():
            with suppress(psutil.Error):
                used[kind] += sum(process.cpu_times()[:2])
        return used | {"clients": sum(psutil.Process().cpu_times()[:2])}

    def kill_ingress(self) -> None:
        """SIGKILL to one ingress replica; returns when there are as many again."""
        before = self.processes("ingress")
        victim = next(iter(before))
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + PATIENCE
        while len(self.processes("ingress").keys() - {victim}) < len(before):
            if time.monotonic() > end:
                raise TimeoutError("the ingress replica does not come back")
            time.sleep(0.1)
        self.reaches(bool)

    def kill_policy(self) -> None:
        """SIGKILL to one policy replica; returns when there are two that answer."""
        victim = self.replicas()[0]["pid"]
        os.kill(victim, signal.SIGKILL)
        self.reaches(lambda found: len(found) == 2 and victim not in {r["pid"] for r in found})


@contextmanager
def endpoint(
    folder: Path, *, model: str = "tiny", context: int = 512, slots: int = 16, dashboard: bool = False
) -> Iterator[Endpoint]:
    """An endpoint of two ingress and two policy replicas, gone afterwards."""
    made = Endpoint(folder, model, context, slots)
    os.environ["RAY_AUTH_MODE"] = "disabled"  # a cluster of this program's own, gone with it
    os.environ |= STEADY_MEMORY  # as `stateset-ray serve` starts it
    ray.init(
        address="local", num_cpus=8, include_dashboard=dashboard, dashboard_port=made.dashboard,
        log_to_driver=False, logging_level="ERROR", _temp_dir=str(folder / "ray"),
    )  # fmt: skip
    try:
        serve.start(
            http_options={"host": "127.0.0.1", "port": made.port},
            proxy_location="HeadOnly",
            logging_config=SERVE_LOGGING,
        )
        made.deploy()
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
