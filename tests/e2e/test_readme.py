"""README.md says what is so: its blocks run, its commands, files, targets and names exist. No Ray."""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stateset_ray.config import Config, load_config
from stateset_ray.types import StopReason, Trajectory

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the paragraph before it."""

    language: str
    text: str
    before: str


BLOCKS = [
    Block(m[1], m[2], README[: m.start()].rstrip().rpartition("\n\n")[2]) for m in _FENCE.finditer(README)
]
_SPOKEN = re.findall(r"`([^`\n]+)`", _FENCE.sub("", README))
"""What stands in backticks between the blocks."""


def blocks(language: str, holding: str = "") -> list[Block]:
    found = [b for b in BLOCKS if b.language == language and holding in b.text]
    assert found, f"README.md has no {language} block with {holding!r}"
    return found


# --- the environment of one's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """The README's environment and its TOML, saved under the names that the README gives them."""
    [code], [toml] = blocks("python", "(Environment)"), blocks("toml", "[environment]")
    names = [match for b in (code, toml) for match in re.findall(r"`([\w.]+)`", b.before)]
    assert [Path(name).suffix for name in names] == [".py", ".toml"], names
    for name, block in zip(names, (code, toml), strict=True):
        (tmp_path / name).write_text(block.text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield load_config(tmp_path / names[1])
    sys.modules.pop(Path(names[0]).stem, None)


def play(config: Config, script, index: int, renderer) -> Trajectory:
    from stateset_ray.environments.base import build_environment
    from stateset_ray.policies.scripted import ScriptedPolicy
    from stateset_ray.rollout import rollout

    environment = build_environment(config.environment.path, config.environment.options)
    policy = ScriptedPolicy(renderer, lambda messages: script(environment, messages))
    task = environment.task("train", index)
    return asyncio.run(rollout(environment, task, policy, renderer, config.rollout, id=task.id, seed=index))


@pytest.fixture(scope="module")
def renderer():
    from stateset_ray.models import load_tokenizer
    from stateset_ray.policies.renderer import Renderer

    return Renderer(load_tokenizer("tiny"))


def test_the_expert_of_the_own_environment_earns_one_within_the_limits(own, renderer) -> None:
    for index in range(8):
        played = play(own, lambda environment, _: environment.expert(), index, renderer)
        assert (played.stop_reason, played.reward) == (StopReason.COMPLETED, 1.0), played.error
        assert len(played.turns) == own.rollout.max_turns
        assert all(renderer.stopped(turn.token_ids) for turn in played.turns)  # not one is cut


@pytest.mark.parametrize("junk", ["", "?", "b", "bcdefghi", "iiii", "I do not know."])
def test_junk_earns_nothing_in_the_own_environment(own, renderer, junk: str) -> None:
    rewards = [play(own, lambda *_: junk, index, renderer).reward for index in range(24)]
    assert all(reward is not None for reward in rewards)
    assert sum(rewards) / len(rewards) < 0, rewards
    assert min(rewards) >= -1


def test_the_own_environment_repeats_itself(own, renderer) -> None:
    first, again, other = (play(own, lambda *_: "b", index, renderer) for index in (3, 3, 4))
    assert first.messages == again.messages != other.messages


# --- what else is shown


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "toml"], ids=lambda b: b.text.split()[0]
)
def test_every_toml_block_is_a_configuration(block: Block, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(block.text, encoding="utf-8")
    assert load_config(tmp_path / "config.toml") != Config()


def test_the_python_interface_is_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, not run: training needs Ray, and is tested in tests/ray."""
    [block] = blocks("python", "train(")
    tree = ast.parse(block.text)
    functions: dict[str, ast.FunctionDef] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = module_source(str(node.module))
            exported = next(ast.literal_eval(n.value) for n in source.body if _assigns(n, "__all__"))
            assert {alias.name for alias in node.names} <= set(exported), ast.unparse(node)
            functions |= {n.name: n for n in source.body if isinstance(n, ast.FunctionDef)}
    [call] = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "train"]
    known = {argument.arg for argument in functions["train"].args.args + functions["train"].args.kwonlyargs}
    assert {keyword.arg for keyword in call.keywords} <= known
    monkeypatch.chdir(ROOT)
    [loading] = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "load_config"
    ]
    assert load_config(*[ast.literal_eval(argument) for argument in loading.args])


def module_source(name: str) -> ast.Module:
    path = ROOT / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


def commands() -> list[str]:
    lines = [line for b in blocks("bash") for line in b.text.splitlines()]
    parts = [part.partition(" #")[0].strip() for line in lines for part in line.split("&&")]
    return sorted({c for c in [*parts, *_SPOKEN] if c.startswith("stateset-ray ")})


def test_every_command_shown_is_one_that_the_program_takes() -> None:
    """Parsed by the program's own parser, options and arguments included, and not carried out."""
    import typer

    from stateset_ray.cli import app

    group = typer.main.get_command(app)
    shown = commands()
    for command in shown:
        name, *arguments = shlex.split(command)[1:]
        assert name in group.commands, f"{command}: there is no such command"
        try:
            group.commands[name].make_context(name, arguments).close()
        except Exception as error:  # the parser's own errors and its exits
            pytest.fail(f"{command}: {type(error).__name__}: {error}")
    assert {shlex.split(command)[1] for command in shown} == set(group.commands)


def test_every_option_shown_exists() -> None:
    import typer

    from stateset_ray.cli import app

    commands = [*typer.main.get_command(app).commands.values()]
    for command in commands:  # and those that are commands of a command
        commands += getattr(command, "commands", {}).values()
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    foreign = {"--no-deps", "--extra-index-url"}  # pip's
    shown = {word for code in _SPOKEN for word in re.findall(r"--[a-z-]+", code)}
    assert shown - foreign <= known
    assert {"--set", "--resume", "--dry-run", "--json", "--play", "--ray"} <= shown


def test_every_make_target_shown_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    code = [*_SPOKEN, *(b.text for b in blocks("bash"))]
    shown = {target for text in code for target in re.findall(r"\bmake ([a-z]+)", text)}
    assert {"demo", "test", "install"} <= shown <= targets


def tree() -> list[str]:
    """The paths in the drawing of the tree; folders end with a slash."""
    [block] = blocks("text", "THE OUTER LOOP")
    parents: list[str] = []
    paths = []
    for line in block.text.splitlines():
        match = re.fullmatch(r"( *)(\S+?)(?: {2,}\S.*)?", line)
        assert match is not None, line
        assert len(match[1]) % 2 == 0, line
        parents = [*parents[: len(match[1]) // 2], match[2]]
        paths.append("".join(parents))
    return paths


def test_everything_in_the_tree_exists() -> None:
    wrong = [p for p in tree() if not ((ROOT / p).is_dir() if p.endswith("/") else (ROOT / p).is_file())]
    assert not wrong


def test_every_module_stands_in_the_tree() -> None:
    paths = tree()
    assert len(paths) == len(set(paths))
    modules = {f.relative_to(ROOT).as_posix() for f in (ROOT / "stateset_ray").rglob("*.py")}
    missing = {m for m in modules if not m.endswith("__init__.py")} - set(paths)
    assert not missing, f"add a line for each to the tree in README.md: {sorted(missing)}"
    examples = {f.relative_to(ROOT).as_posix() for f in (ROOT / "examples").iterdir() if f.is_file()}
    assert examples <= set(paths)


def test_every_path_named_exists() -> None:
    """Links, and what is named in backticks by its place in the checkout."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    spoken = [s for s in _SPOKEN if re.fullmatch(r"(?:stateset_ray|examples|tests|docs)/[\w./-]*", s)]
    assert links
    assert spoken
    assert [path for path in [*links, *spoken] if not (ROOT / path).exists()] == []


def test_the_run_folder_is_as_drawn() -> None:
    """By the names that the code writes."""
    [block] = blocks("text", "runs/demo/\n  config.toml")
    drawn = re.findall(r"^ +([\w.]+)(?= )", block.text, re.MULTILINE)
    writers = ("actors/journal.py", "actors/run_folder.py", "committed.py", "checkpoint.py")
    sources = [(ROOT / "stateset_ray" / f).read_text(encoding="utf-8") for f in writers]
    assert drawn == ["config.toml", "metrics.jsonl", "trajectories.jsonl", "summary.json", "latest"]
    assert [name for name in drawn if not any(f'"{name}"' in source for source in sources)] == []


def test_real_output_has_its_place() -> None:
    begin, end = "<!-- demo-output:begin -->", "<!-- demo-output:end -->"
    assert (README.count(begin), README.count(end)) == (1, 1)
    assert README.index(begin) < README.index(end)


def test_the_circle_is_drawn_in_the_order_of_the_loop() -> None:
    [drawing] = blocks("text", "| environments |")
    boxes = re.findall(r"\| (\w+) \|", drawing.text)
    documented = ast.get_docstring(module_source("stateset_ray.train")) or ""
    assert " -> ".join(boxes) in documented
