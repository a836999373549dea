"""Runs as Ray jobs: a cluster with a dashboard and token authentication, started and ended by this file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from playground import slowed

from stateset_ray.config import Config, load_config
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

_T = TypeVar("_T")
ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
SECONDS = 10  # within which an error must be told, where a core is free

CONFIG = """
[run]
name = "job"
dir = "/set/by/the/test"

[model]
name = "tiny"
threads = 1

[environment]
path = "gated:Gated"

[rollout]
max_turns = 2
max_turn_tokens = 4
max_context = 96
concurrency = 16
on_cut_reply = "close"
environment_timeout = 200

[grpo]
group_size = 4

[learner]
learning_rate = 1e-3

[train]
steps = 4
tasks_per_step = 2
checkpoint_every = 1

[evaluate]
tasks = 0

[cluster]
address = "127.0.0.1:1"     # of another cluster: a job joins the one that runs it
"""

GATED = '''
"""Echo whose third step waits until there is a file named GATE; without the variable it waits for nothing."""

import asyncio
import os

from stateset_ray.environments.echo import Echo


class Gated(Echo):
    async def reset(self, task, seed):
        gate = os.environ.get("GATE")
        while gate and task.id in ("train-4", "train-5") and not os.path.exists(gate):
            await asyncio.sleep(0.05)
        return await super().reset(task, seed)
'''


@dataclass
class Cluster:
    """A head node of this file's own.

    Attributes:
        address: of its dashboard.
        agent: of the dashboard's agent on this node.
        variables: of the environment of whoever may use it.
        process: the first of its processes.
    """

    address: str
    agent: str
    variables: dict[str, str]
    process: psutil.Process

    def run(self, *words: str, at: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of `stateset-ray`."""
        with self.start(*words, at=at, **variables) as process:
            out, err = process.communicate(timeout=200)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def start(self, *words: str, at: Path, **variables: str) -> subprocess.Popen[str]:
        """The same, without waiting for it."""
        return subprocess.Popen(
            [sys.executable, "-m", "stateset_ray.cli", *words], cwd=at, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**self.variables, **variables},
        )  # fmt: skip

    def driver(self, name: str) -> psutil.Process:
        """The process that trains the run of this name."""
        return until(lambda: self._driver(name), "the job's process")

    def _driver(self, name: str) -> psutil.Process | None:
        for process in self.process.children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if "stateset_ray.cli" in words and f'run.name="{name}"' in words:
                return process
        return None


def until(found: Callable[[], _T | None], what: str, seconds: float = 120) -> _T:
    """What `found` gives as soon as it gives anything."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := found():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ssj", dir="/tmp")  # short, for the sockets in it
    gcs, dashboard, agent, metrics, client = free_ports(5)
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    with (Path(folder) / "start.log").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=8",
                "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={folder}",
                "--include-dashboard=true", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
                f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
                f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0",
                "--object-store-memory=200000000", "--disable-usage-stats",
            ],
            env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    head = psutil.Process(process.pid)
    try:
        until(lambda: _answers(address) or process.poll(), "the dashboard")
        assert process.poll() is None, (Path(folder) / "start.log").read_text()
        yield Cluster(address, f"http://127.0.0.1:{agent}", variables, head)
    finally:
        # Nothing of it is needed, and to end it in order takes ten seconds.
        family = [head, *head.children(recursive=True)]
        for each in family:
            if each.is_running():
                each.kill()
        psutil.wait_procs(family, timeout=10)
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(address: str) -> bool:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with an environment of its own, as somebody's project is."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "gated.py").write_text(GATED)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "runs").mkdir()
    (folder / "runs" / "old.bin").write_bytes(b"x" * 2**20)
    return folder


def unbroken(project: Path, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The same run in one go, on the cluster of this folder's tests; its folder."""
    patch.syspath_prepend(str(project))
    config: Config = load_config(project / "config.toml", [f'run.dir="{folder}"', "run.name=unbroken"])
    train(config)
    return config.run.folder


def test_a_killed_job_goes_on_from_the_mirror_exactly(
    cluster: Cluster, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted, killed in its third step, its disk lost, submitted again: the run that was never killed."""
    runs, mirror, gate = tmp_path / "runs", tmp_path / "mirror", tmp_path / "gate"
    command = (
        "submit", "config.toml", "--name", "killed", "--address", cluster.address, "--env", f"GATE={gate}",
        "--set", f'run.dir="{runs}"', "--set", f'run.mirror="{mirror}"',
    )  # fmt: skip
    done = cluster.run(*command, at=project)
    assert done.returncode == 0, done.stderr
    assert f"submitted killed to {cluster.address} (2 files, 0.0 MiB)" in done.stdout
    again = cluster.run(*command, at=project)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("killed runs already: nothing was submitted")
    whole = unbroken(project, tmp_path / "whole", monkeypatch)  # while the job comes up

    sent = mirror / "killed" / "checkpoints" / "step-00000002" / "manifest.json"
    until(sent.is_file, "the mirror of the second step")
    cluster.driver("killed").send_signal(signal.SIGKILL)
    shutil.rmtree(runs)
    gate.touch()
    status = until(lambda: _ended(cluster, "killed", project), "the end of the killed job")
    assert status.returncode == 1
    assert "killed " in status.stdout and "failed" in status.stdout

    done = cluster.run(*command, "--follow", at=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted killed-2, attempt 2" in done.stdout
    assert "resumed after step 2" in done.stdout
    assert "step 3/4" in done.stdout and "step 2/4" not in done.stdout
    assert "killed-2 has succeeded" in done.stderr

    broken = runs / "killed"
    records = [JsonLines(folder / "metrics.jsonl").read() for folder in (broken, whole)]
    assert [record["step"] for record in records[0]] == [0, 1, 2, 3]
    for mine, theirs in zip(*records, strict=True):
        for key in ("policy_version", "reward_mean", "reward_std", "loss", "grad_norm", "trajectories"):
            assert mine[key] == theirs[key], (key, mine["step"])
    weights = "checkpoints/step-00000004/model.safetensors"
    assert (broken / weights).read_bytes() == (whole / weights).read_bytes()
    assert (mirror / "killed" / weights).read_bytes() == (whole / weights).read_bytes()
    assert (mirror / "killed" / "summary.json").is_file()


def _ended(cluster: Cluster, name: str, at: Path) -> subprocess.CompletedProcess[str] | None:
    done = cluster.run("submit", "status", name, "--address", cluster.address, at=at)
    return None if "running" in done.stdout or "pending" in done.stdout else done


def test_what_cannot_work_is_told_at_once(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """Each within its time; more ways for an address to be wrong are in tests/unit/test_submit.py."""
    good = ("submit", "config.toml", "--name", "never", "--set", f'run.dir="{tmp_path}"')
    [nobody] = free_ports(1)
    here = ("--address", cluster.address)
    cases: list[tuple[tuple[str, ...], dict[str, str], int, str]] = [
        ((*good, "--address", f"127.0.0.1:{nobody}"), {}, 1, "cannot be asked: Failed to connect"),
        ((*good, *here), {"RAY_AUTH_TOKEN": "f" * 64}, 1, "does not take this token"),
        ((*good, *here), {"RAY_AUTH_MODE": "disabled"}, 1, "wants a token"),
        ((*good, *here, "--set", "train.stepz=1"), {}, 2, "did you mean 'train.steps'"),
        (("submit", "status", "never", *here), {}, 1, "there is no job 'never'"),  # nothing was submitted
    ]
    for words, variables, code, said in cases:
        started = time.monotonic()
        done = cluster.run(*words, at=project, **variables)
        took = time.monotonic() - started
        assert (done.returncode, said in done.stderr) == (code, True), (words, done.stdout, done.stderr)
        assert took < slowed(SECONDS), (words, took)
        assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("token", [None, "f" * 64])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/jobs/"), ("POST", "/api/jobs/"), ("DELETE", "/api/jobs/never"),
        ("GET", "/api/cluster_status"), ("GET", "/nodes?view=summary"), ("GET", "/logical/actors"),
        ("GET", "/api/serve/applications/"), ("PUT", "/api/serve/applications/"),
        ("DELETE", "/api/serve/applications/"), ("POST", "/api/job_agent/jobs/"),
        ("DELETE", "/api/job_agent/jobs/never"),
    ],
)  # fmt: skip
def test_strangers_get_nothing_from_the_dashboard(
    cluster: Cluster, method: str, path: str, token: str | None
) -> None:
    headers = {"content-type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    body = b"{}" if method in ("POST", "PUT") else None
    asked = cluster.agent if path.startswith("/api/job_agent/") else cluster.address
    request = urllib.request.Request(asked + path, data=body, headers=headers, method=method)
    assert until(lambda: _told(request), "an answer") in (401, 403)


def _told(request: urllib.request.Request) -> int | None:
    """The status of the answer; None where nobody listens, as the agent does not at first."""
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code
    except urllib.error.URLError:
        return None


# --- longer ones


@pytest.mark.slow
def test_a_stopped_job_saves_and_the_next_attempt_goes_on(
    cluster: Cluster, project: Path, tmp_path: Path
) -> None:
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    command = (
        "submit", "config.toml", "--name", "stopped", "--address", cluster.address, "--env", f"GATE={gate}",
        "--set", f'run.dir="{runs}"', "--set", "train.checkpoint_every=100",
    )  # fmt: skip
    with cluster.start(*command, "--follow", at=project) as following:
        metrics = JsonLines(runs / "stopped" / "metrics.jsonl")
        until(lambda: len(metrics.read()) == 2, "two steps")
        following.send_signal(signal.SIGINT)  # Ctrl-C leaves the job alone
        out, err = following.communicate(timeout=30)
    assert following.returncode == 130, (out, err)
    assert "stopped goes on without you" in err and "stateset-ray submit stop stopped" in err
    assert cluster.driver("stopped").is_running()

    done = cluster.run("submit", "stop", "stopped", "--address", cluster.address, at=project)
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stdout.splitlines()[-1]
    saved = runs / "stopped" / "checkpoints" / "step-00000002" / "manifest.json"
    assert saved.is_file()
    printed = cluster.run("submit", "logs", "stopped", "--address", cluster.address, at=project)
    assert "SIGTERM: saves at the next safe point" in printed.stdout

    gate.touch()
    done = cluster.run(*command, "--wait", at=project)
    assert done.returncode == 0, done.stderr
    assert "submitted stopped-2, attempt 2" in done.stdout
    assert [record["step"] for record in metrics.read()] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_of_the_page_does_what_it_says(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """Its blocks as one script, with this cluster's address, token and disk in the place of others."""
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    (tmp_path / "token").write_text(TOKEN)
    script = "\n".join(match[1] for match in re.finditer(r"```bash\n(.*?)```", page, re.DOTALL))
    script = script.replace("http://head:8265", cluster.address).replace("demo", "page")
    script = script.replace("~/.ray/auth_token", str(tmp_path / "token"))
    config = (project / "config.toml").read_text().replace("/set/by/the/test", str(tmp_path / "runs"))
    (project / "config.toml").write_text(config)
    variables = {name: value for name, value in cluster.variables.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        ["bash", "-exc", script],
        cwd=project,
        env=variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "submitted page to", "step 4/4", "page has succeeded with these settings: nothing was submitted",
        "submitted page-2, attempt 2", "page-2 has ended already: succeeded",
    ):  # fmt: skip
        assert said in done.stdout, (said, done.stdout, done.stderr)
    steps = [record["step"] for record in JsonLines(tmp_path / "runs" / "page" / "metrics.jsonl").read()]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "runs" / "plain" / "summary.json").is_file()


@pytest.mark.slow
def test_a_job_whose_run_fails_fails_as_it_did(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """A configuration that only the cluster can refuse: the model is not there."""
    command = ("submit", "config.toml", "--name", "failing", "--address", cluster.address, "--follow")
    settings = ("--set", f'run.dir="{tmp_path / "runs"}"', "--set", "model.name=./not-sent")
    done = cluster.run(*command, *settings, at=project)
    assert done.returncode == 1
    assert "no such model folder" in done.stdout
    assert "failing has failed" in done.stderr
