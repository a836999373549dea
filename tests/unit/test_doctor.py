"""The doctor finds what is wrong, says how to mend it, and is not brought down by it."""

from __future__ import annotations

import io
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from stateset_ray import doctor
from stateset_ray.actors.memory import expected_memory, size
from stateset_ray.config import Config
from stateset_ray.doctor import TESTED, Finding, examine, show
from stateset_ray.environments.echo import Echo
from stateset_ray.models import Hardware, load_model
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.types import Split, Task

ROOT = Path(__file__).parents[2]


def config(*overrides: str) -> Config:
    return Config().with_overrides(["model.name=tiny", *overrides])


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_this_machine_can_run_the_smallest_configuration(tmp_path: Path) -> None:
    findings = examine(config(f'run.dir="{tmp_path}"'))
    assert [finding for finding in findings if finding.status == "fail"] == []
    found = {finding.name: finding for finding in findings}
    assert found.keys() >= {"python", *TESTED, "devices", "ray cluster", "model", "environment", "memory"}
    assert "its expert earns 1, 1, 1" in found["environment"].detail
    assert "<|im_end|>" in found["chat template"].detail
    assert "shows no tools" in found["chat template"].detail


def test_without_a_configuration_the_machine_alone_is_checked() -> None:
    assert "model" not in {finding.name for finding in examine()}


def test_the_tested_versions_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, (lowest, newest) in TESTED.items():
        assert re.search(rf'"{name}(\[[\w,]+\])?>={re.escape(lowest)}"', project), name
        assert pinned[name].startswith(f"{newest}."), name


@pytest.mark.parametrize(
    ("bounds", "status"),
    [(("1.0", "999.0"), "ok"), (("1.0", "1.0"), "warn"), (("999.0", "999.0"), "fail")],
)
def test_a_version_outside_its_bounds(
    bounds: tuple[str, str], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TESTED, "torch", bounds)
    assert doctor._package("torch").status == status


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TESTED, "no-such-package", ("1.0", "1.0"))
    finding = doctor._package("no-such-package")
    assert (finding.status, finding.mend) == ("fail", "pip install 'no-such-package>=1.0'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there() -> None:
    assert doctor._devices(config("cluster.learner_gpus=2")).status == "fail"
    # Those of another cluster cannot be seen from here.
    assert doctor._devices(config("cluster.learner_gpus=2", 'cluster.address="h:1"')).status == "ok"


def test_a_cluster_is_knocked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")  # so that what it says is not looked at
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert doctor._ray_address(config(f'cluster.address="{address}"')).status == "fail"
        server.listen()
        assert doctor._ray_address(config(f'cluster.address="{address}"')).status == "ok"
        monkeypatch.setenv("RAY_ADDRESS", f"ray://{address}")
        assert "(RAY_ADDRESS)" in doctor._ray_address(config()).detail
        elsewhere = config('cluster.address="10.0.0.1:6379"')
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # a job joins the cluster that runs it
        assert doctor._ray_address(elsewhere).detail == f"ray://{address} answers (RAY_ADDRESS)"
        monkeypatch.setenv("RAY_grpc_enable_http_proxy", "1")
        assert doctor._ray_address(elsewhere).status == "note"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert doctor._ray_address(config()).status == "note"


def test_what_answers_and_is_no_cluster_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as thread:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = thread.submit(doctor._ray_address, config(f'cluster.address="{address}"'))
        with server.accept()[0] as peer:
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            check = told.result(30)
    assert (check.status, "no Ray cluster" in check.detail) == ("fail", True)


def test_a_token_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor._ray_token(config()).status == "ok"  # a cluster of its own makes one
    joined = config('cluster.address="h:1"')
    assert doctor._ray_token(joined).status == "fail"
    (tmp_path / "token").write_text("x")
    assert doctor._ray_token(joined).status == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "none")
    assert doctor._ray_token(joined).status == "fail"


def test_an_environment_that_is_missing_cut_or_worthless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = doctor._guarded("environment", lambda: doctor._environment(config("environment.path=no.where:X")))
    assert gone.status == "fail"
    assert "No module named 'no'" in gone.detail
    assert gone.mend
    cut = doctor._environment(config("rollout.max_turn_tokens=2"))
    assert (cut.status, "turn_tokens" in cut.detail) == ("warn", True)
    (tmp_path / "poor.py").write_text(
        "from stateset_ray import Environment, Message, Step\n"
        "class Poor(Environment):\n"
        "    def reset(self, task, seed): return Step((Message('user', '?'),))\n"
        "    def step(self, message): return Step(terminated=True)\n"
        "    def expert(self): return 'x'\n"
        "class Broken(Poor):\n"
        "    def step(self, message): raise OSError('down')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._environment(config("environment.path=poor:Poor")).status == "warn"
    broken = doctor._environment(config("environment.path=poor:Broken"))
    assert (broken.status, "down" in broken.detail) == ("fail", True)


def test_a_model_that_is_missing_or_too_short() -> None:
    names = {"model.name=./gone": "no such model folder", "rollout.max_context=2049": "2048 positions"}
    for override, words in names.items():
        settings = config("learner.micro_batch_tokens=4096", override)
        finding = doctor._guarded("model", lambda settings=settings: doctor._model(settings))  # type: ignore[misc]
        assert (finding.status, words in finding.detail) == ("fail", True)


def test_too_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_memory", lambda: 2**20)
    assert doctor._memory(config()).status == "warn"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**10}))
    assert doctor._run_folder(config()).status == "fail"
    assert doctor._shared_memory(config()).status in ("warn", "note")
    assert doctor._cache().status == "warn"


def test_a_check_that_breaks_is_a_finding() -> None:
    finding = doctor._guarded("x", lambda: Finding("x", "ok", str(1 / 0)))
    assert (finding.status, "ZeroDivisionError" in finding.detail) == ("fail", True)


def test_what_is_printed() -> None:
    out = io.StringIO()
    show([Finding("a", "ok", "[fine]"), Finding("b", "fail", "broken", "glue it")], Console(file=out))
    rows = [row.split() for row in out.getvalue().splitlines()]
    assert rows == [
        ["ok", "a", "[fine]"], ["fail", "b", "broken"], ["to", "mend:", "glue", "it"],
        ["1", "to", "mend,", "0", "to", "look", "at"],
    ]  # fmt: skip


def test_expected_memory_is_what_is_allocated() -> None:
    settings = config(
        "rollout.concurrency=5", "rollout.max_context=200", "rollout.workers=2", "model.dtype=float32"
    )
    expected = expected_memory(settings)
    hardware = Hardware("cpu", torch.float32, 1)
    model = load_model("tiny", hardware)
    weights = sum(p.nbytes for p in model.parameters())
    engine = TransformersEngine(model, {2}, slots=5, max_context=200, hardware=hardware)  # type: ignore[arg-type]
    assert expected.kv_cache == engine._cache.entries.nbytes
    assert expected.weights == weights


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MiB"), (2**20, "1.0 MiB"), (2**30, "1.00 GiB")])
def test_size(count: int, text: str) -> None:
    assert size(count) == text


class Breaks(Echo):
    def expert(self) -> str:
        raise KeyError("no such order")

    def task(self, split: Split, index: int) -> Task:
        raise ValueError("no such split")


def test_what_an_environment_raises_is_its_authors_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quits.py").write_text("import sys; sys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path, says in (("quits:A", "sys.exit(0)"), (f"{__name__}:Breaks", "ValueError: no such split")):
        settings = config(f"environment.path={path}")
        found = doctor._guarded("environment", partial(doctor._environment, settings))
        assert (found.status, says in found.detail, "report" in found.mend) == ("fail", True, False)
