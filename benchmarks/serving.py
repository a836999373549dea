"""What clients of an endpoint notice when replicas die and checkpoints come: how many requests fail.

    python -m benchmarks.serving                          # 10 of each fault; on 2 busy cores about 6 minutes
    python -m benchmarks.serving --times 1 --faults swap  # a trial

Prints one JSON object (`--output FILE`: into a file too). Ray Serve on this machine, two ingress and two
policy replicas, the tiny model; four clients (OpenAI's, without its own retries) ask for 20 tokens without a
pause, each in a session of its own, and are not streamed.

| fault  | what is done                                                                                  |
|--------|-----------------------------------------------------------------------------------------------|
| `none` | nothing, for 20 seconds                                                                       |
| `kill` | SIGKILL to a policy replica; the next one when there are two again                            |
| `swap` | a newer checkpoint; the next one when both replicas answer with it                            |
| `bad`  | a checkpoint whose weights are NaN; the next one when both replicas have refused it            |

| figure           | what it is                                                                         |
|------------------|------------------------------------------------------------------------------------|
| `requests`       | that clients made meanwhile                                                         |
| `failed`         | of them, by what clients were told                                                  |
| `ms`, `ms_after` | 50th and 99th percentile in milliseconds: of all, of those begun 5 s after a fault  |
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import ray
from ray import serve
from safetensors.torch import load_file, save_file

from benchmarks import machine
from stateset_ray import checkpoint
from stateset_ray.config import load_config
from stateset_ray.metrics import versions
from stateset_ray.models import local_folder
from stateset_ray.serving.app import build
from stateset_ray.serving.security import add_key
from stateset_ray.serving.settings import (
    PolicySettings,
    RateSettings,
    SecuritySettings,
    ServeSettings,
    SwapSettings,
)

__all__ = ["FAULTS", "main"]

FAULTS = ("none", "kill", "swap", "bad")
_CLIENTS = 4
_CALM = 20.0  # seconds without a fault
_AFTER = 5.0  # seconds in which a fault may be felt
_PATIENCE = 120.0  # seconds that anything may take


def main() -> None:
    """Measure, then print."""
    options = _options()
    started = machine.describe()
    with tempfile.TemporaryDirectory(prefix="ssr", dir="/tmp") as folder, _endpoint(Path(folder)) as endpoint:
        found = {fault: _measured(endpoint, fault, options.times) for fault in options.faults}
    result = {"machine": started, "versions": versions(), "times": options.times, "faults": found}
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--times", type=int, default=10, help="of each fault")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


class _Endpoint:
    """Where it is, its keys, and the run that it follows."""

    def __init__(self, url: str, key: str, admin: str, run: Path) -> None:
        self.url, self.key, self.run = url, key, run
        self._admin = {"authorization": f"Bearer {admin}"}
        self._step = 0

    def replicas(self) -> list[dict[str, Any]]:
        answer = httpx2.get(f"{self.url}/admin/weights", headers=self._admin, timeout=_PATIENCE)
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()["replicas"]
        return found

    def reaches(self, wanted: Callable[[list[dict[str, Any]]], bool]) -> None:
        end = time.monotonic() + _PATIENCE
        while not wanted(found := self.replicas()):
            if time.monotonic() > end:
                raise TimeoutError(f"the replicas stay as they are: {found}")
            time.sleep(0.1)

    def save(self, scale: float) -> int:
        """A checkpoint of the tiny model, its weights multiplied."""

        def write(folder: Path) -> None:
            shutil.copytree(local_folder("tiny"), folder, dirs_exist_ok=True)
            weights = load_file(folder / "model.safetensors")
            save_file(
                {k: v * scale for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"}
            )

        self._step += 1
        meta = {"version": self._step, "results": {}}
        checkpoint.save(self.run / "checkpoints", self._step, write, meta=meta, keep=3)
        return self._step


@contextmanager
def _endpoint(folder: Path) -> Iterator[_Endpoint]:
    run, keys = folder / "run", folder / "keys.json"
    run.mkdir()
    settings = ("model.name=tiny", "model.threads=1", "model.device=cpu")
    (run / "config.toml").write_text(load_config(None, settings).to_toml(), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    endpoint = _Endpoint(url, add_key(keys, "client"), add_key(keys, "admin", admin=True), run)
    endpoint.save(1.0)
    os.environ["RAY_AUTH_MODE"] = "disabled"  # a cluster of this program's own, gone with it
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _temp_dir=str(folder / "ray"),
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        args = ServeSettings(
            source=str(run), model_id="tiny",
            policy=PolicySettings(replicas=2, threads=1), swap=SwapSettings(poll_seconds=0.5),
            rates=RateSettings(requests="1000000/minute"), security=SecuritySettings(keys_file=keys),
        )  # fmt: skip
        serve.run(build(args), name="policy", route_prefix="/")
        yield endpoint
    finally:
        serve.shutdown()
        ray.shutdown()


def _measured(endpoint: _Endpoint, fault: str, times: int) -> dict[str, Any]:
    """Clients ask while a fault is done so many times, one after the other."""
    requests: list[tuple[float, float, str]] = []  # (begun, seconds, what was told)
    moments: list[float] = []
    over = threading.Event()

    def ask(number: int) -> None:
        with openai.OpenAI(
            base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=0, timeout=_PATIENCE
        ) as client:
            while not over.is_set():
                begun, told = time.monotonic(), "answered"
                try:
                    client.chat.completions.create(
                        model="tiny", max_tokens=20, messages=[{"role": "user", "content": "hi"}],
                        extra_headers={"x-session-id": str(number)},
                    )  # fmt: skip
                except openai.OpenAIError as error:
                    told = f"{type(error).__name__}: {error}"
                requests.append((begun, time.monotonic() - begun, told))

    with ThreadPoolExecutor(_CLIENTS) as pool:
        asking = [pool.submit(ask, number) for number in range(_CLIENTS)]
        try:
            for _ in range(times if fault != "none" else 1):
                moments.append(time.monotonic())
                _do(endpoint, fault)
        finally:
            over.set()
        for one in asking:
            one.result(timeout=_PATIENCE)
    after = [s for begun, s, _ in requests if any(0 <= begun - m <= _AFTER for m in moments)]
    return {
        "requests": len(requests),
        "failed": dict(Counter(told for _, _, told in requests if told != "answered")),
        "ms": _percentiles([s for _, s, _ in requests]),
        "ms_after": _percentiles(after) if fault != "none" else None,
    }


def _do(endpoint: _Endpoint, fault: str) -> None:
    """One fault, until it is over."""
    if fault == "none":
        time.sleep(_CALM)
    elif fault == "kill":
        victim = endpoint.replicas()[0]["pid"]
        os.kill(victim, signal.SIGKILL)
        endpoint.reaches(lambda found: len(found) == 2 and victim not in {r["pid"] for r in found})
    elif fault == "swap":
        step = endpoint.save(1.001)
        endpoint.reaches(lambda found: len(found) == 2 and all(r["step"] == step for r in found))
    else:
        name = f"step-{endpoint.save(float('nan')):08d}"
        endpoint.reaches(lambda found: all(r["problem"].startswith(name) for r in found))


def _percentiles(seconds: list[float]) -> list[float]:
    cuts = statistics.quantiles(seconds, n=100)
    return [round(cuts[49] * 1000, 1), round(cuts[98] * 1000, 1)]


if __name__ == "__main__":
    main()
