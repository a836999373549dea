"""docs/sweeps.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stateset_ray import cli
from stateset_ray.config import load_config
from stateset_ray.sweep.plan import read_plan, shipped, trials_to_run
from stateset_ray.sweep.sections import SweepConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    [text] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(text)


def test_the_commands_are_accepted(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    dry, real = (line.split()[1:] for line in block("bash").splitlines())
    done = CliRunner().invoke(cli.app, dry)
    assert done.exit_code == 0, done.output
    assert "trials     12" in done.output
    again = CliRunner().invoke(cli.app, [*real, "--dry-run"])
    assert again.exit_code == 0, again.output
    assert "trials     4" in again.output


def test_what_is_wrong_ends_with_2_before_anything_starts(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    for space, said in (("grppo", "give a TOML file"), ("grpo --set train.steps=2", "sweep.asha.grace = 2")):
        done = CliRunner().invoke(cli.app, ["sweep", "examples/quickstart.toml", *space.split()])
        assert (done.exit_code, said in done.output) == (2, True), done.output


def test_the_space_is_read(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(block("toml"))
    plan = read_plan(load_config(None, ["train.evaluate_every=4"]), path)
    assert len(trials_to_run(plan)[0]) == 16


def test_the_tuner_is_built(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)  # what it writes down, it writes there
    names: dict[str, Any] = {}
    exec(block("python"), names)
    assert names["tuner"] is not None


def test_every_space_and_setting_is_named() -> None:
    assert all(f"`{name}`" in PAGE for name in shipped())
    settings = SweepConfig.model_fields
    missing = [name for name in settings if f"`{name}`" not in PAGE and f"{name} = " not in PAGE]
    assert not missing


@pytest.mark.parametrize("name", ["results.json", "best.toml", "sweep.svg", "config.toml", "space.toml"])
def test_what_a_sweep_leaves_is_written_under_that_name(name: str) -> None:
    sources = [(ROOT / "stateset_ray" / "sweep" / f).read_text() for f in ("results.py", "driver.py")]
    assert name in PAGE
    assert any(f'"{name}"' in source for source in sources)
