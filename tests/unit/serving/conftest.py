"""An endpoint without Ray: the real application and the real policy in this process."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from stateset_ray.serving.meters import METRICS, Meters, Metric


class Recorder:
    """In the place of a metric: keeps what was counted."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.counted: Counter[tuple[str, ...]] = Counter()
        self.values: list[float] = []

    def inc(self, amount, tags):
        assert set(tags) == set(self.metric.labels)
        self.counted[tuple(tags.values())] += amount

    def set(self, value):
        self.values.append(value)

    def observe(self, value, tags):
        assert set(tags) == set(self.metric.labels)
        self.values.append(value)


@pytest.fixture
def recorders():
    return {}


@pytest.fixture
def meters(recorders):
    names = {metric.name: key for key, metric in METRICS.items()}

    def make(metric):
        return recorders.setdefault(names[metric.name], Recorder(metric))

    return Meters(make)


@pytest.fixture
def run(tmp_path):
    support = runpy.run_path(str(Path(__file__).with_name("support_checkpoints.py")))
    return support["new_run"](tmp_path / "shop", 128)


@pytest.fixture(scope="session")
def endpoint():
    """What `support_endpoint.py` defines."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("support_endpoint.py"))))


@pytest.fixture
def held(hardware, endpoint):
    from stateset_ray.serving.held_policy import load_policy
    from stateset_ray.serving.source import Candidate

    return load_policy(Candidate("tiny", "tiny-1", -1), endpoint.SETTINGS, hardware, 256, None)


@pytest.fixture
def policies(held, endpoint):
    return endpoint.Local(held)


@pytest.fixture
def make(policies, meters, endpoint):
    def made(settings=endpoint.SETTINGS):
        return endpoint.gate(policies, meters, settings)

    return made


@pytest.fixture(scope="session")
def redis_url():
    """A real server of its own."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    if importlib.util.find_spec("redis") is None:
        pytest.skip("the redis client is not installed (pip install 'stateset-ray[redis]')")
    import redis

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            client, end = redis.Redis(port=port), time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < end
            client.close()
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
