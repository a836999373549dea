"""The project that `init` writes: it works as it is, and its own test means something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stateset_ray.config import load_config
from stateset_ray.environments.base import build_environment
from stateset_ray.errors import RunError
from stateset_ray.init import init
from stateset_ray.types import Message

ROOT = Path(__file__).parents[2]


def own_test(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the generated test as its owner would."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "agent"
    assert [path.name for path in init(folder)] == [
        "environment.py", "config.toml", "test_environment.py", "README.md",
    ]  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {path.name for path in init(tmp_path / "other")}


def test_its_own_test_passes_and_finds_a_broken_environment(tmp_path: Path) -> None:
    init(tmp_path)
    done = own_test(tmp_path)
    assert done.returncode == 0, done.stdout
    environment = tmp_path / "environment.py"
    environment.write_text(environment.read_text().replace("2 * right", "3 * right"))
    done = own_test(tmp_path)
    assert done.returncode == 1
    assert "test_the_expert_earns_one" in done.stdout


def test_its_configuration_loads_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(tmp_path / "config.toml")
    assert config.model.name == "tiny"
    environment = build_environment(config.environment.path, config.environment.options)
    try:
        environment.reset(environment.task("train", 0), 0)
        turns = 0
        while True:
            words = environment.expert()
            step = environment.step(Message("assistant", words))
            turns += 1
            # A letter is a token of the tiny model, and the stop token is one more.
            assert len(words) + 1 <= config.rollout.max_turn_tokens
            if step.terminated:  # type: ignore[union-attr]
                break
        assert turns <= config.rollout.max_turns
    finally:
        sys.modules.pop("environment", None)


@pytest.mark.parametrize("what", ["file inside", "a file"])
def test_nothing_is_overwritten(tmp_path: Path, what: str) -> None:
    target = tmp_path / "agent"
    if what == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "environment.py").write_text("mine")
    with pytest.raises(RunError, match="nothing is overwritten") as caught:
        init(target)
    assert caught.value.given == str(target)
    assert (target if target.is_file() else target / "environment.py").read_text() == "mine"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        init(tmp_path / "file" / "agent")
