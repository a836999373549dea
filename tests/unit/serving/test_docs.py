"""docs/serving.md: its commands are commands, its tables are what the code says."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from stateset_ray.cli import app
from stateset_ray.serving.meters import METRICS
from stateset_ray.serving.settings import ServeSettings

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_every_command_is_one_that_the_program_takes():
    command = typer.main.get_command(app).commands["serve"]
    lines = [line.partition(" #")[0] for block in blocks("bash") for line in block.splitlines()]
    shown = [line for line in lines if line.startswith("stateset-ray ")]
    assert len(shown) >= 10
    for line in shown:
        words = shlex.split(line)
        assert words[1] == "serve"
        command.make_context("serve", words[2:]).close()
    assert {line for line in lines if line not in shown} == {"pip install 'stateset-ray[serve]'"}


def test_the_python_is_python():
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        assert ast.parse(block)


def table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def metrics() -> str:
    rows = [
        (f"`{m.name}`", m.kind, ", ".join(f"`{label}`" for label in m.labels), m.help)
        for m in METRICS.values()
    ]
    return table(rows, ("name", "kind", "labels", "what"))


def settings(model: type[BaseModel], section: str = "") -> list[tuple[str, ...]]:
    rows = []
    for name, field in model.model_fields.items():
        default = field.default
        if isinstance(default, BaseModel):
            rows += settings(type(default), f"{name}.")
        else:
            shown = "must be given" if field.is_required() else f"`{default!r}`"
            rows.append((f"`{section}{name}`", shown))
    return rows


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("metrics", metrics()), ("settings", table(settings(ServeSettings), ("setting", "default")))],
)
def test_the_tables_are_what_the_code_says(name, wanted):
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)\n?<!-- {name}:end -->", TEXT, re.DOTALL)
    assert found
    assert found[1] == wanted


def test_every_code_of_an_error_is_listed():
    source = "".join(path.read_text() for path in (ROOT / "stateset_ray" / "serving").glob("*.py"))
    raised = set(re.findall(r"(?:ApiError|Refused)\(\s*\d+,\s*\"([a-z_]+)\"", source))
    raised |= set(re.findall(r"_too_long\(|\"(limit_exceeded)\"", source)) - {""}
    listed = set(
        re.findall(r"`([a-z_]+)`", TEXT[TEXT.index("| status |") : TEXT.index("A stream that breaks")])
    )
    assert raised - listed == set()
