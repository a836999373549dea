"""Submitting a run: what is refused before anything is sent, what a second submission does. No Ray."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stateset_ray import cli
from stateset_ray.config import load_config
from stateset_ray.environments.base import build_environment
from stateset_ray.errors import ClusterError, ConfigError
from stateset_ray.job_client import Job, dashboard_address
from stateset_ray.submit import Order, Outcome, environment_variables, order, submit

ROOT = Path(__file__).parents[2]
AGENT = "from stateset_ray.environments.echo import Echo\nclass Agent(Echo): pass\n"
run = CliRunner()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's project, and we are in it."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    (folder / "agents").mkdir()
    # Modules stay loaded: a name of its own for every test.
    name = f"agent_{tmp_path.name.replace('-', '_')}"
    (folder / "agents" / f"{name}.py").write_text(AGENT)
    (folder / "configs" / "small.toml").write_text(
        f'[run]\nname = "small"\ndir = "/shared/runs"\n[model]\nname = "tiny"\n'
        f'[environment]\npath = "agents.{name}:Agent"\n'
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.delitem(sys.modules, "agents", raising=False)
    return folder


def ordered(project: Path, *overrides: str, **options: Any) -> Order:
    source = project / "configs" / "small.toml"
    config = load_config(source, overrides)
    build_environment(config.environment.path, config.environment.options)
    return order(config, source, overrides=overrides, **options)


# --- what is sent


def test_the_command_is_what_one_would_type_in_the_folder_that_is_sent(project: Path) -> None:
    wanted = ordered(project, "train.steps=7", 'model.name="a b"')
    words = shlex.split(wanted.command)
    assert words == [
        "exec", "python", "-m", "stateset_ray.cli", "train", "configs/small.toml", "--continue",
        "--set", "train.steps=7", "--set", 'model.name="a b"', "--set", 'run.name="small"',
    ]  # fmt: skip
    context = typer.main.get_command(cli.app).commands["train"].make_context("train", words[5:])
    assert context.params["go_on"] is True
    assert Path("configs/small.toml") in wanted.package.files


def test_what_ray_prepares_on_every_node(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for everybody")
    wanted = ordered(project, variables={"AGENT_MODE": "strict"}, grace=90)
    assert wanted.runtime_env(tmp_path / "p.zip") == {
        "working_dir": str(tmp_path / "p.zip"),
        "env_vars": {"HF_HUB_OFFLINE": "1", "RAY_JOB_STOP_WAIT_TIME_S": "90", "AGENT_MODE": "strict"},
    }
    assert ordered(project, pip=["stateset-ray==1.0"]).runtime_env(tmp_path)["pip"] == ["stateset-ray==1.0"]


def test_settings_have_a_digest_however_they_were_given(project: Path) -> None:
    text = (project / "configs" / "small.toml").read_text()
    by_override = ordered(project, "train.steps=7").settings
    assert by_override != ordered(project).settings
    (project / "configs" / "small.toml").write_text(text + "[train]\nsteps = 7\n")
    assert ordered(project).settings == by_override


def test_variables_are_taken_from_here_or_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "yes=no")
    monkeypatch.delenv("GONE", raising=False)
    assert environment_variables(["A=1", "HERE", "B=", "C=x=y"]) == {
        "A": "1", "HERE": "yes=no", "B": "", "C": "x=y",
    }  # fmt: skip
    for wrong in ("GONE", "1A=2", "=3", "a b=1", ""):
        with pytest.raises(ConfigError):
            environment_variables([wrong])


# --- what is refused


def test_a_run_that_would_leave_nothing_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="nothing would be left") as caught:
        ordered(project, 'run.dir="runs"')
    assert "run.mirror" in caught.value.mend
    ordered(project, 'run.dir="runs"', 'run.mirror="s3://bucket/runs"')


@pytest.mark.parametrize("ignored", ["*.toml\n", "agents/\n", "agent_*.py\n"])
def test_what_the_job_would_look_for_in_vain_is_refused(project: Path, ignored: str) -> None:
    """And the mend that is named mends it."""
    (project / ".gitignore").write_text(ignored)
    with pytest.raises(ConfigError, match=r"is not sent: a \.gitignore") as caught:
        ordered(project)
    line = caught.value.mend.split()[1]
    (project / ".rayignore").write_text(f"{line}\n")
    ordered(project)


def test_what_lies_where_nothing_is_sent_must_move(project: Path) -> None:
    (project / "agents").rename(project / "node_modules")
    path = load_config(project / "configs" / "small.toml").environment.path.replace(
        "agents.", "node_modules."
    )
    with pytest.raises(ConfigError, match=r"nothing that lies in such a place is \(node_modules\)") as caught:
        ordered(project, f'environment.path="{path}"')
    assert caught.value.mend == "move it"


def test_what_lies_outside_of_the_folder_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="the environment's module lies outside"):
        ordered(project, working_dir=project / "configs")
    with pytest.raises(ConfigError, match="the configuration lies outside"):
        ordered(project, working_dir=project / "agents")


def test_a_mirror_in_the_folder_is_not_sent(project: Path) -> None:
    (project / "kept").mkdir()
    (project / "kept" / "model.bin").write_text("x")
    files = ordered(project, f'run.mirror="{project}/kept"').package.files
    assert Path("kept/model.bin") not in files and Path("configs/small.toml") in files


def test_a_run_folder_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="run folders are not sent"):
        order(load_config(project / "configs" / "small.toml"), project / "configs")


def test_an_environment_that_is_installed_need_not_be_sent(project: Path) -> None:
    wanted = ordered(project, "environment.path=stateset_ray.environments.echo:Echo")
    assert "configs/small.toml" in {path.as_posix() for path in wanted.package.files}


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("head:8265", "http://head:8265"),
        ("https://ray.example/", "https://ray.example"),
        ("", "http://127.0.0.1:8265"),
    ],
)
def test_addresses(given: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert dashboard_address(given) == address


def test_where_the_address_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://b:1")
    assert dashboard_address() == "http://b:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://a:1")
    assert dashboard_address() == "http://a:1"
    assert dashboard_address("http://c:1") == "http://c:1"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert dashboard_address() == "http://127.0.0.1:8265"


@pytest.mark.parametrize("address", ["ray://head:10001", "10.0.0.1:6379", "http://head:port", "http://"])
def test_what_is_no_dashboard_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="dashboard") as caught:
        dashboard_address(address)
    assert caught.value.given == address


# --- a second submission


class Server:
    """A job server that keeps what it is given, and runs nothing."""

    address = "http://here"

    def __init__(self) -> None:
        self.known: list[Job] = []
        self.sent: list[dict[str, Any]] = []
        self.rivals: list[Job] = []  # somebody else's, handed in just before ours

    def jobs(self) -> list[Job]:
        return list(self.known)

    def submit(self, job_id: str, command: str, **what: Any) -> bool:
        if self.rivals:
            self.known.append(self.rivals.pop(0))
        if any(job.id == job_id for job in self.known):
            return False
        with zipfile.ZipFile(what["runtime_env"]["working_dir"]) as archive:
            self.sent.append({"id": job_id, "command": command, "files": archive.namelist(), **what})
        self.known.append(Job(job_id, what["name"], what["attempt"], "PENDING", settings=what["settings"]))
        return True

    def end(self, status: str) -> None:
        last = self.known.pop()
        self.known.append(Job(last.id, last.name, last.attempt, status, settings=last.settings))


def submitted(server: Server, wanted: Order) -> Outcome:
    return submit(server, wanted)  # type: ignore[arg-type]


def test_a_job_is_submitted_under_the_name_of_its_run(project: Path) -> None:
    server, wanted = Server(), ordered(project)
    assert submitted(server, wanted) == Outcome("submitted", "small", 1)
    [sent] = server.sent
    assert (sent["id"], sent["command"], sent["attempt"]) == ("small", wanted.command, 1)
    assert "configs/small.toml" in sent["files"]


def test_a_job_that_runs_is_not_submitted_twice(project: Path) -> None:
    server, wanted = Server(), ordered(project)
    submitted(server, wanted)
    for status in ("PENDING", "RUNNING"):
        server.end(status)
        assert submitted(server, wanted) == Outcome("runs", "small", 1)
    other = ordered(project, "train.steps=99")
    assert submitted(server, other) == Outcome("runs", "small", 1, other_settings=True)
    assert len(server.sent) == 1


def test_what_failed_or_was_stopped_is_tried_again_under_the_next_number(project: Path) -> None:
    server, wanted = Server(), ordered(project)
    submitted(server, wanted)
    for number, status in ((2, "FAILED"), (3, "STOPPED"), (4, "FAILED")):
        server.end(status)
        assert submitted(server, wanted) == Outcome("submitted", f"small-{number}", number)
    assert [sent["attempt"] for sent in server.sent] == [1, 2, 3, 4]


def test_what_has_succeeded_is_done_unless_more_is_wanted(project: Path) -> None:
    server, wanted = Server(), ordered(project)
    submitted(server, wanted)
    server.end("SUCCEEDED")
    assert submitted(server, wanted) == Outcome("done", "small", 1)
    assert submitted(server, ordered(project, "train.steps=99")) == Outcome("submitted", "small-2", 2)


def test_a_run_whose_name_looks_like_an_attempt_is_another_run(project: Path) -> None:
    server, wanted = Server(), ordered(project)
    submitted(server, ordered(project, "run.name=small-2"))
    assert submitted(server, wanted) == Outcome("submitted", "small", 1)
    server.end("FAILED")
    assert submitted(server, wanted) == Outcome("submitted", "small-3", 2)


def test_whoever_comes_second_at_the_same_moment_submits_nothing(project: Path) -> None:
    server, wanted = Server(), ordered(project)
    server.rivals = [Job("small", "small", 1, "RUNNING", settings=wanted.settings)]
    assert submitted(server, wanted) == Outcome("runs", "small", 1)
    assert server.sent == []


def test_races_do_not_last_for_ever(project: Path) -> None:
    server, wanted = Server(), ordered(project)
    server.rivals = [Job("small" if n == 1 else f"small-{n}", "other", 1, "FAILED") for n in range(1, 99)]
    with pytest.raises(ClusterError, match="at the same moment"):
        submitted(server, wanted)


ENDS = (
    ("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("FAILED", -9, 1), ("FAILED", 130, 1),
    ("FAILED", None, 1), ("STOPPED", None, 1),
)  # fmt: skip


@pytest.mark.parametrize(("status", "driver_exit", "code"), ENDS)
def test_exit_codes(status: str, driver_exit: int | None, code: int) -> None:
    job = Job("a", "a", 1, status, driver_exit=driver_exit)
    assert (job.over, job.exit_code) == (True, code)


# --- the command


def test_the_word_run_may_be_left_out(project: Path) -> None:
    group = typer.main.get_command(cli.app).commands["submit"]
    for words in (["configs/small.toml", "--wait"], ["--wait", "configs/small.toml"], ["run", "x.toml"]):
        with group.make_context("submit", words) as context:
            assert context._protected_args == ["run"] or "run" in context.args
    for word in ("status", "logs", "stop"):
        with group.make_context("submit", [word, "name"]) as context:
            assert "run" not in [*context._protected_args, *context.args]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.toml"], "cannot be read"),
        (["configs/small.toml", "--set", "train.stepz=1"], "did you mean 'train.steps'"),
        (["configs/small.toml", "--set", "environment.path=gone:Gone"], "No module named 'gone'"),
        (["configs/small.toml", "--set", 'run.dir="runs"'], "nothing would be left"),
        (["configs/small.toml", "--address", "ray://head:10001"], "not the address of one"),
        (["configs/small.toml", "--env", "NOT_SET_HERE"], "not set here"),
        (["configs/small.toml", "--name", "a b"], "run.name"),
        (["configs"], "no config.toml"),
    ],
)
def test_what_is_wrong_is_told_before_any_server_is_asked(
    project: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no server at this address, and the exit code says that the command is wrong."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    done = run.invoke(cli.app, ["submit", *words])
    assert (done.exit_code, said in done.output) == (2, True), done.output


def test_every_command_of_the_page_is_one_that_the_program_takes() -> None:
    """That they do what the page says, `tests/ray/test_jobs.py` tests."""
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    blocks = [match[1].replace("\\\n", " ") for match in re.finditer(r"```bash\n(.*?)```", page, re.DOTALL)]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(stateset-ray [^`]+)`", page)
    commands = [
        shlex.split(line[line.index("stateset-ray") :], comments=True)
        for line in lines
        if "stateset-ray" in line
    ]
    assert len(commands) >= 9
    group = typer.main.get_command(cli.app)
    for command in commands:
        _, name, *words = command
        with group.commands[name].make_context(name, words) as context:
            if name == "submit":
                word, *rest = [*context._protected_args, *context.args]
                group.commands[name].commands[word].make_context(word, rest).close()


def test_every_toml_block_of_the_page_is_a_configuration(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "block.toml").write_text(block)
        assert load_config(tmp_path / "block.toml").run.dir.is_absolute()


class _Strange(BaseHTTPRequestHandler):
    """Something else that speaks HTTP."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def strange() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Strange)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_servers_that_are_none_are_told_in_time(project: Path, strange: str) -> None:
    """Nobody there, nothing that answers, something else: an error of one sentence, each within its time."""
    deaf = socket.socket()
    deaf.bind(("127.0.0.1", 0))
    deaf.listen()
    nobody = socket.socket()
    nobody.bind(("127.0.0.1", 0))
    port = nobody.getsockname()[1]
    nobody.close()
    code = (
        "import json, sys, time\n"
        "from stateset_ray.errors import ClusterError\n"
        "from stateset_ray.job_client import JobClient\n"
        "import ray.job_submission\n"  # seconds on a busy machine, and not what is measured
        "for address in sys.argv[1:]:\n"
        "    started = time.monotonic()\n"
        "    try: JobClient('http://' + address)\n"
        "    except ClusterError as error: print(json.dumps([str(error), time.monotonic() - started]))\n"
    )
    addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{deaf.getsockname()[1]}", strange, "no.such.host.invalid:1"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *addresses], capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    deaf.close()
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(addresses), done.stderr
    for address, (said, seconds) in zip(addresses, told, strict=True):
        assert said.startswith("the cluster's job server cannot be asked: "), said
        assert address in said and "http://HOST:8265" in said
        assert seconds < 10, (address, seconds)
    assert time.monotonic() - started < 60
