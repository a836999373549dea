"""`stateset-ray serve`, as far as it goes without starting Ray."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from stateset_ray import serve as module
from stateset_ray.cli import app
from stateset_ray.errors import ClusterError, ConfigError
from stateset_ray.serve import prepared, serve
from stateset_ray.serving.security import ENVIRONMENT
from stateset_ray.serving.source import pinned

support = runpy.run_path(str(Path(__file__).with_name("support_certificate.py")))


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def told(*arguments, code=0):
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_a_key_is_made_and_kept_by_its_hash(tmp_path):
    key = told("--keys", "keys.json", "--new-key", "shop").strip()
    assert key.startswith("sk-ssr-")
    assert key not in (tmp_path / "keys.json").read_text()
    assert "of this name" in told("--keys", "keys.json", "--new-key", "shop", code=2)
    assert "--keys" in told("--new-key", "shop", code=2)


def test_no_network_without_keys(run):
    assert "this machine only" in told(run, "--host", "0.0.0.0", code=2)
    assert "this machine only" in told(run, "--host", "0.0.0.0", "--set", "security.open=true", code=2)
    assert prepared(str(run), [], "127.0.0.1", None).security.open


def test_a_file_for_serve_is_written_and_checked(run, tmp_path):
    told("--keys", "keys.json", "--new-key", "shop")
    arguments = (run, "--keys", "keys.json", "--host", "0.0.0.0", "--write", "policy.yaml")
    told(*arguments, "--set", "policy.slots=3", "--set", "model_id=shop/v1")
    tree = yaml.safe_load((tmp_path / "policy.yaml").read_text())
    assert (tmp_path / "policy.yaml").stat().st_mode & 0o777 == 0o600
    args = tree["applications"][0]["args"]
    assert (args["policy"], args["model_id"], args["source"]) == ({"slots": 3}, "shop/v1", str(run))
    assert args["security"] == {"keys_file": str(tmp_path / "keys.json")}
    told("--check", "policy.yaml")
    assert "already" in told(*arguments, code=2)
    assert "policy.slots" in told(run, "--set", "policy.slot=3", "--port", "1", code=2)


def test_a_run_is_pinned_and_let_go(run):
    told(run, "--pin", "step-00000001")
    assert pinned(run) == "step-00000001"
    assert "it has: step-0" in told(run, "--pin", "step-00000007", code=1)
    told(run, "--pin", "latest")
    assert pinned(run) is None
    assert "only a run" in told("tiny", "--pin", "latest", code=2)


def test_a_port_in_use_is_named_before_anything_starts(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # In a process of its own: another test may have joined this one to a cluster.
        done = subprocess.run(
            [sys.executable, "-m", "stateset_ray.cli", "serve", str(run), "--port", str(port)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"port {port}" in done.stderr


def test_a_cluster_that_is_joined_needs_keys(run):
    with pytest.raises(ConfigError, match="keys are needed"):
        serve(prepared(str(run), [], "127.0.0.1", None), host="127.0.0.1", port=0, address="10.0.0.1:1")


def test_the_cluster_that_is_started_keeps_its_memory_steady(run, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    seen = []

    @contextmanager
    def cluster(*_, **__):
        seen.append((os.environ["MALLOC_ARENA_MAX"], os.environ["GLIBC_TUNABLES"]))
        yield

    monkeypatch.setattr(module, "cluster", cluster)
    monkeypatch.setattr(module, "_run", lambda *_: None)
    monkeypatch.setattr(module, "_is_alone", lambda _: True)  # whatever other tests have joined
    serve(prepared(str(run), [], "127.0.0.1", None), host="127.0.0.1", port=0)
    assert seen == [("3", "glibc.malloc.tcache_count=0")], "unless somebody says otherwise"
    assert "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize("error", [RuntimeError("DEPLOY_FAILED"), KeyboardInterrupt()])
@pytest.mark.parametrize(("there", "removed"), [({}, ["policy"]), ({"policy": None}, [])])
def test_an_endpoint_that_does_not_come_up_leaves_nothing_on_a_cluster(
    run, monkeypatch, error, there, removed
):
    """But what was there before this one stays."""
    gone = []

    def deploy(*_, **__):
        raise error

    for name, does in {
        "start": lambda **_: None, "run": deploy, "delete": gone.append,
        "status": lambda: SimpleNamespace(applications=there),
    }.items():  # fmt: skip
        monkeypatch.setattr(f"ray.serve.{name}", does)
    settings = prepared(str(run), [], "127.0.0.1", None)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ClusterError):
        module._run(settings, "127.0.0.1", 1, False, print, threading.Event())
    assert gone == removed


def test_where_serve_does_not_say_what_was_there_nothing_is_removed(run, monkeypatch):
    gone = []

    def lost():
        raise RuntimeError("no controller")

    for name, does in {"start": lambda **_: None, "status": lost, "delete": gone.append}.items():
        monkeypatch.setattr(f"ray.serve.{name}", does)
    settings = prepared(str(run), [], "127.0.0.1", None)
    with pytest.raises(ClusterError, match="no controller"):
        module._run(settings, "127.0.0.1", 1, False, print, threading.Event())
    assert gone == []


def test_tls_is_checked_before_anything_starts_and_told_to_serve(run, tmp_path):
    pytest.importorskip("cryptography")
    certificate, key = support["write_certificate"](tmp_path)
    _, other = support["write_certificate"](tmp_path, "other")
    arguments = (run, "--write", "policy.yaml", "--tls")
    assert "cannot be used" in told(*arguments, certificate, other, code=2)
    assert "cannot be used" in told(*arguments, certificate, tmp_path / "none", code=2)
    assert "both" in told(run, "--write", "policy.yaml", "--set", f"security.tls_cert={certificate}", code=2)
    key.chmod(0o640)
    assert "read by others" in told(*arguments, certificate, key, code=2)
    key.chmod(0o600)
    told(*arguments, certificate, key)
    options = yaml.safe_load((tmp_path / "policy.yaml").read_text())["http_options"]
    assert (options["ssl_certfile"], options["ssl_keyfile"]) == (str(certificate), str(key))
    told("--check", "policy.yaml")


def test_haproxy_is_asked_for_nothing_that_it_could_not_answer(run, tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    certificate, key = support["write_certificate"](tmp_path)
    keys = tmp_path / "keys.json"
    told("--keys", keys, "--new-key", "shop")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    arguments = (run, "--keys", keys, "--write", "policy.yaml")
    assert "HAProxy speaks no TLS" in told(*arguments, "--tls", certificate, key, code=2)
    assert "finds ingress replicas" in told(*arguments, "--host", "10.0.0.5", code=2)
    told(*arguments, "--host", "0.0.0.0")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    told(run, "--keys", keys, "--write", "other.yaml", "--host", "10.0.0.5")


def test_a_folder_of_transcripts_is_named_in_full(run, tmp_path):
    told(run, "--write", "policy.yaml", "--set", "transcripts.folder=log", "--set", "transcripts.share=0.5")
    args = yaml.safe_load((tmp_path / "policy.yaml").read_text())["applications"][0]["args"]
    assert args["transcripts"] == {"folder": str(tmp_path / "log"), "share": 0.5}


def test_the_page_can_be_left_out(run, tmp_path):
    told(run, "--write", "policy.yaml", "--no-page")
    assert yaml.safe_load((tmp_path / "policy.yaml").read_text())["applications"][0]["args"]["page"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--keys", "nodir/keys.json", "--new-key", "shop"], 2, "file of keys cannot be written"),
        (["--keys", "afile/keys.json", "--new-key", "shop"], 2, "file of keys cannot be written"),
        (["tiny", "--write", "nodir/w.yaml"], 2, "its folder is not there"),
        (["tiny", "--write", "afile/w.yaml"], 2, "its folder is not there"),
        (["tiny", "--port", "99999"], 2, "--port"),
        (["tiny", "--port", "-1"], 2, "--port"),
        (["tiny", "--port", "99999", "--write", "w.yaml"], 2, "--port"),
        (["tiny", "--admin"], 2, "--admin goes with --new-key"),
        (["tiny", "--share", "0.2"], 2, "--share goes with --canary"),
        (["tiny", "--share", "0.2", "--promote"], 2, "--share goes with --canary"),
        (["--check", "afile", "--write", "w.yaml"], 2, "choose one of --check and --write"),
        (["tiny", "--check", "afile", "--promote"], 2, "choose one of --check and --promote"),
        (["tiny", "--pin", "latest", "--write", "w.yaml"], 2, "choose one of --pin and --write"),
        (["tiny", "--pin", "latest", "--port", "8001"], 2, "--port would do nothing beside --pin"),
        (["tiny", "--new-key", "shop", "--keys", "keys.json", "--admin"], 2, "RUN would do nothing"),
        (["tiny", "--write", "w.yaml", "--set", "transcripts.folder=afile"], 2, "transcripts.folder"),
        (["tiny", "--write", "w.yaml", "--set", "transcripts.folder=/proc/nope"], 2, "transcripts.folder"),
        (["tiny", "--set", "=", "--write", "w.yaml"], 2, "given: '='"),
        (["tiny", "--set", "page", "--write", "w.yaml"], 2, "given: 'page'"),
        (["runs/gone"], 1, "there is no such folder"),
        (["afile"], 2, "a file cannot be served"),
        (["gone.toml"], 1, "there is no such folder"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_a_mistake_gets_one_clear_error_and_writes_nothing(arguments, code, says, tmp_path, monkeypatch):
    monkeypatch.setattr("stateset_ray.cli.errand.serve", None)  # nothing is to be served
    (tmp_path / "afile").write_text("{}")
    output = told(*arguments, code=code)
    assert says in output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


def test_a_folder_that_cannot_be_written_to_is_named(run, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("stateset_ray.serving.release._write", refuse)
    assert "cannot be noted" in told(run, "--pin", "step-00000001", code=1)
    monkeypatch.setattr("stateset_ray.serve.os.open", refuse)
    monkeypatch.setattr("stateset_ray.cli.errand.add_key", refuse)
    assert "file of keys cannot be written" in told("--keys", "keys.json", "--new-key", "shop", code=2)


def test_what_was_made_to_see_whether_it_can_be_is_removed(run, tmp_path):
    prepared(str(run), [f"transcripts.folder={tmp_path}/a/b"], "127.0.0.1", None)
    assert not (tmp_path / "a").exists()
