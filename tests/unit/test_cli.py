"""The command line: what is typed, what is printed, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stateset_ray import __version__, cli
from stateset_ray.cli import base, talking
from stateset_ray.config import Config, load_config
from stateset_ray.errors import ConfigError, ModelError

ROOT = Path(__file__).parents[2]
TINY = '[model]\nname = "tiny"\n'
LONG = ["--set", "rollout.max_context=4000", "--set", "learner.micro_batch_tokens=4000"]
TARGET = ["--set", "learner.lora.rank=4", "--set", "learner.lora.targets=['nope']"]

run = CliRunner()


@pytest.fixture(autouse=True)
def _a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("COLUMNS", "300")


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    # Processor time: the same on a busy machine.
    code = (
        "import sys, time\n"
        "from stateset_ray.cli import app\n"
        "for args in (['--help'], ['train', '--help'], ['batch', '--help'], ['version']):\n"
        "    app(args, standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'numpy.linalg.lapack'} & set(sys.modules)\n"
        "print(time.process_time(), sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds, heavy = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert heavy == "[]"
    assert float(seconds) < 2  # about 0.5 on an idle laptop, and this is four commands


def test_the_commands() -> None:
    shown = run.invoke(cli.app, ["--help"]).output
    for command in ("train", "evaluate", "batch", "chat", "init", "doctor", "version"):
        assert f" {command} " in shown
    assert run.invoke(cli.app, ["version"]).output == f"{__version__}\n"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["train", "missing.toml"], 2, ["cannot be read", "missing.toml"]),
        (["train", "."], 2, ["no config.toml"]),
        (["train", "tiny.toml", "--set", "train.stepz=3"], 2, ["did you mean 'train.steps'"]),
        (["train", "tiny.toml", "--set", "nonsense"], 2, ["section.key=value"]),
        (["train", "tiny.toml", "--set", "environment.path=no.where:X"], 2, ["No module named 'no'"]),
        (["train", "tiny.toml", "--dry-run", *LONG], 2, ["2048 positions"]),
        (["train", "tiny.toml", "--dry-run", "--set", "model.name=./gone"], 1, ["no such model folder"]),
        (["train", "broken.toml"], 2, ["not valid TOML"]),
        (["chat"], 2, ["someone to talk to"]),
        (["chat", "tiny", "--environment", "a:B"], 2, ["--play"]),
        (["chat", "--play"], 2, ["a TOML file or --environment"]),
        (["chat", "--play", "--environment", "no colon"], 2, ["environment.path"]),
        (["chat", "./gone"], 1, ["no such folder"]),
        (["chat", "runs/gone"], 1, ["no such folder"]),
        (["chat", "there/gone"], 1, ["no such folder"]),
        (["evaluate", "gone"], 1, ["no such folder"]),
        (["train", "tiny.toml", "--resume"], 1, ["no run of this name to resume"]),
        (["train", "tiny.toml", "--resume", "--dry-run"], 1, ["no run of this name to resume"]),
        (["train", "tiny.toml", "--dry-run", "--set", "run.dir=tiny.toml"], 1, ["cannot be written"]),
        (["train", "tiny.toml", "--dry-run", "--set", "run.mirror=zz://x"], 2, ["zz://"]),
        (["train", "tiny.toml", "--dry-run", *TARGET], 2, ["names no linear module", "q_proj"]),
        (["train", "x" * 300], 2, ["cannot be read", "name too long"]),
        (["batch", "tiny.toml", "gone.jsonl", "out"], 2, ["no such data set"]),
        (["batch", "tiny.toml", "empty.jsonl", "out"], 2, ["no rows"]),
        (["init", "."], 1, ["nothing is overwritten"]),
        (["doctor", "missing.toml"], 2, ["cannot be read"]),
        (["doctor", "--set", "train.nope=3"], 2, ["train.nope"]),
        (["sweep", "tiny.toml", "grpo", "--dry-run", "--name", "a/b"], 2, ["run.name"]),
        (["sweep", "tiny.toml", "grpo", "--dry-run", "--resume", "--name", "x"], 1, ["no sweep"]),
        (["train", "pipe.toml", "--dry-run"], 2, ["named pipe"]),
        (["train", "emptied"], 2, ["configuration of this run is empty"]),
        (["trian"], 2, ["trian"]),
        (["train"], 2, ["CONFIG"]),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_clear_error(args: list[str], code: int, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "broken.toml").write_text("[run")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "there").mkdir()
    (tmp_path / "emptied" / "checkpoints").mkdir(parents=True)
    (tmp_path / "emptied" / "config.toml").write_text("")
    os.mkfifo(tmp_path / "pipe.toml")
    done = run.invoke(cli.app, args)
    assert done.exit_code == code, done.output
    for word in words:
        assert word in done.output
    assert "Traceback" not in done.output
    assert done.output.count("error:") == (0 if args in (["trian"], ["train"]) else 1)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("bad"), 2), (ModelError("bad"), 1), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    with pytest.raises(typer.Exit) as caught, base.errors():
        raise error
    assert caught.value.exit_code == code


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), base.errors():
        _ = 1 / 0


def test_errors_go_to_standard_error() -> None:
    done = run.invoke(cli.app, ["train", "missing.toml"])
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


def test_a_dry_run_prints_toml_and_starts_nothing(tmp_path: Path) -> None:
    import ray

    before = ray.is_initialized()  # other tests may hold a cluster
    (tmp_path / "tiny.toml").write_text(TINY)
    done = run.invoke(cli.app, ["train", "tiny.toml", "--dry-run", "--set", "rollout.workers=3"])
    assert done.exit_code == 0, done.output
    printed = tomllib.loads(done.stdout)
    assert Config.model_validate(printed) == load_config("tiny.toml", ["rollout.workers=3"])
    assert "rollout_workers  3" in done.stdout
    assert "{'CPU': 4.0}" in done.stdout
    assert "KV cache" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.toml"]
    assert ray.is_initialized() == before


def test_a_dry_run_needs_the_expert_that_warm_start_needs(tmp_path: Path) -> None:
    (tmp_path / "mute.py").write_text(
        "from stateset_ray import Environment, Message, Step\n"
        "class Mute(Environment):\n"
        "    def reset(self, task, seed): return Step((Message('user', '?'),))\n"
        "    def step(self, message): return Step(terminated=True)\n"
    )
    (tmp_path / "mute.toml").write_text(TINY + '[environment]\npath = "mute:Mute"\n')
    assert run.invoke(cli.app, ["train", "mute.toml", "--dry-run"]).exit_code == 0
    done = run.invoke(cli.app, ["train", "mute.toml", "--dry-run", "--set", "train.warm_start.steps=1"])
    assert (done.exit_code, "no scripted expert" in done.output) == (2, True)


def test_modules_are_found_beside_the_configuration_and_here(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    base.find_modules_beside(elsewhere / "config.toml")
    assert sys.path[:2] == [str(tmp_path), str(elsewhere)]
    base.find_modules_beside(tmp_path / "config.toml")
    assert sys.path.count(str(tmp_path)) == 1


def test_a_run_folder_resumes_where_it_lies_now(tmp_path: Path) -> None:
    folder = tmp_path / "moved" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(Config.model_validate({"run": {"name": "old"}}).to_toml())
    resumed = base.training_config(folder, ["train.steps=3"], resume=True)
    assert resumed.run.folder == folder
    assert resumed.train.steps == 3
    assert base.training_config(folder, [], resume=False).run.name == "old"


def test_what_chat_takes(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    settings, trained = talking._chat_config("tiny", ["rollout.temperature=0.5"])
    assert (settings.model.name, settings.rollout.temperature, trained) == ("tiny", 0.5, False)
    assert settings.rollout.max_turn_tokens == 256
    settings, trained = talking._chat_config("tiny.toml", [])
    assert (settings.rollout.max_turn_tokens, trained) == (48, True)


def test_a_policy_is_talked_to_also_where_its_environment_is_not_at_hand(tmp_path: Path) -> None:
    settings = '[rollout]\nmax_turn_tokens = 4\n[environment]\npath = "no.where:X"\n'
    (tmp_path / "tiny.toml").write_text(TINY + settings)
    done = run.invoke(cli.app, ["chat", "tiny.toml"], input="hi\n")
    assert done.exit_code == 0, done.output
    assert "without the instructions" in done.output
    assert "assistant: " in done.output


def test_a_person_plays(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    done = run.invoke(cli.app, ["chat", "--play", "tiny.toml"], input="[bold]\x1b[31mno\n/quit\n")
    assert done.exit_code == 0, done.output
    assert "user: Say: " in done.output
    assert "reward -" in done.output
    assert done.output.rstrip().endswith("left: no reward")


def test_a_batch_is_refused_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    done = run.invoke(cli.app, ["batch", "tiny.toml", "in.jsonl", "out", "--score", "--play"])
    assert (done.exit_code, "exclude each other" in done.stderr) == (2, True)
    done = run.invoke(cli.app, ["batch", "tiny.toml", "in.jsonl", "out"])
    assert (done.exit_code, "there is no such data set" in done.stderr) == (2, True)
    (tmp_path / "in.jsonl").write_text('{"id": 1}\n')
    done = run.invoke(cli.app, ["batch", "tiny.toml", "in.jsonl", "out"])
    assert (done.exit_code, "not one of the 1 rows can be used" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["evaluate", "gone"],
        ["chat", "runs/gone"],
        ["batch", "tiny.toml", "gone.jsonl", "out"],
        ["train", "tiny.toml", "--resume"],
        ["train", "tiny.toml", "--set", "run.dir=tiny.toml"],
        ["train", "tiny.toml", "--set", "environment.path=no.where:X"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_said_before_anything_heavy_loads(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    code = (
        "import sys\n"
        "from stateset_ray.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] in ("1 []", "2 []"), done.stdout + done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "command",
    [
        ["train", "quits.toml"],
        ["submit", "quits.toml"],
        ["chat", "--play", "quits.toml"],
        ["chat", "--play", "--environment", "quits:A"],
        ["sweep", "quits.toml", "grpo"],
        ["evaluate", "quits.toml"],
    ],
    ids=" ".join,
)
def test_an_environment_that_exits_on_import_ends_no_command_in_silence(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "quits.py").write_text("import sys; sys.exit(0)\n")
    (tmp_path / "quits.toml").write_text(TINY + '[environment]\npath = "quits:A"\n')
    done = run.invoke(cli.app, command)
    assert (done.exit_code, "it calls sys.exit(0)" in done.output) == (2, True), done.output


def test_help_shows_what_stands_in_brackets() -> None:
    assert "[space]" in run.invoke(cli.app, ["sweep", "--help"]).output
