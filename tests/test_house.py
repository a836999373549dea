"""The plan of the house, proved by reading the sources (`ast`), without importing them.

An import goes only downhill. Lazy imports, typing imports and `import_module("a.literal")` count like any
other. To add a file, put it on a floor in `FLOORS`; to use a library, add it to `LIBRARIES`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "stateset_ray"

FLOORS: dict[str, float] = {
    # 1: the ground
    "types": 1, "config": 1, "sections": 1, "objective": 1, "settings": 1, "errors": 1, "deadline": 1,
    "plain": 1,
    # 2: nouns
    "environments": 2, "rewards": 2, "grpo": 2, "metrics": 2, "checkpoint": 2, "manifest": 2, "models": 2,
    "offline_models": 2, "packing": 2, "storage": 2, "dataset": 2, "committed": 2, "hardware": 2,
    # The package itself exports light nouns; those nouns must not lean on it in turn.
    PACKAGE: 2.5,
    # 3: what drives a model
    "policies": 3, "learner": 3,
    # 4: the inner loop, without Ray
    "rollout": 4,
    # 5: every actor and deployment
    "actors": 5, "serving": 5,
    # 6: verbs
    "train": 6, "train_async": 6, "evaluate": 6, "serve": 6,
    # 7: faces
    "sweep": 7, "rllib": 7, "submit": 7, "job_client": 7, "chat": 7, "batch": 7, "report": 7, "doctor": 7,
    "init": 7,
    # 8: the command line
    "cli": 8,
}  # fmt: skip

SIDEWAYS = {
    ("config", "errors"): "a wrong configuration raises a ConfigError",
    ("settings", "errors"): "so does a wrong override",
    ("types", "plain"): "a trajectory is written down, whatever an environment put into it",
    ("config", "settings"): "how a page of settings is read is not what stands on it",
    ("config", "objective"): "one page in three files: the objective has a page of its own",
    (
        "config",
        "sections",
    ): "so have the sections, which are checked one by one; what they agree on is beside them",
    ("sections", "objective"): "sampling that breaks the objective's correction is refused where it is set",
    ("checkpoint", "committed"): "what a writer keeps or removes it finds as readers do",
    ("committed", "manifest"): "what is whole, the manifest says",
    ("checkpoint", "manifest"): "one subject in two files: the order of things, and the bytes",
    ("storage", "checkpoint"): "what is fetched becomes a checkpoint like any other",
    ("storage", "manifest"): "the commit mark of an upload is the manifest",
    ("dataset", "manifest"): "what must outlive a crash is written in one way",
    ("models", "hardware"): "a model is loaded to where it will compute",
    ("models", "offline_models"): "a name of a model is resolved where models are loaded",
    ("sweep", "report"): "what comes from elsewhere is made safe for a terminal in one place",
    ("train_async", "train"): "the same loop; only how a step is taken differs",
    ("submit", "job_client"): "what is checked and what is asked: two halves of one face",
    ("learner", "policies.weights"): "one codec: the learner writes what the engines read",
}
"""Imports along one floor, from a file or package to another, each with its reason."""

LIBRARIES: dict[int | str, set[str]] = {
    1: {"numpy", "pydantic", "tomli_w"},
    2: {"numpy", "pydantic"},
    3: {"numpy", "torch", "transformers", "tokenizers", "safetensors", "deepspeed"},
    4: {"numpy"},
    5: {"numpy", "pydantic", "psutil", "torch", "ray"},
    6: {"numpy", "ray"},
    7: {"numpy", "psutil", "rich", "ray"},
    8: {"rich", "typer"},
    "checkpoint": {"filelock"},
    "dataset": {"filelock", "pyarrow"},
    "doctor": {"torch", "transformers", "deepspeed"},
    "environments.gymnasium_text": {"gymnasium"},
    "hardware": {"torch"},
    "grpo.divergence": {"torch"},
    "grpo.loss": {"torch"},
    "grpo.surrogate": {"torch"},
    "learner.adapters": {"peft"},
    "metrics": {"prometheus_client", "psutil"},
    "models": {"torch", "transformers"},
    "policies.vllm_engine": {"vllm"},
    "offline_models": {"torch", "transformers", "tokenizers", "filelock"},
    "packing": {"pathspec"},
    "policies.vllm": {"vllm"},
    "rllib": {"gymnasium", "pyarrow", "pydantic"},
    "storage": {"fsspec"},
    "serving": {"fastapi", "grpc", "limits", "redis", "starlette", "yaml"},
    "sweep": {"optuna", "pydantic"},
}
"""What a floor may import from outside, and what one file or package may besides."""

IMPORTED_AS = {"grpcio": "grpc", "pyyaml": "yaml"}
"""Packages that are imported under another name."""

Files = Mapping[str, str]


class Module:
    """One source file: its dotted name, its tree, and what it imports."""

    def __init__(self, path: str, text: str) -> None:
        parts = path.removesuffix(".py").split("/")
        self.is_package = parts[-1] == "__init__"
        self.path, self.name = path, ".".join(parts[: -1 if self.is_package else None])
        self.tree = ast.parse(text, path)
        self.inner = self.name.partition(".")[2] or PACKAGE
        self.unit = self.inner.partition(".")[0]

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of each import; `from a import b` gives `a.b`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    up = self.name.split(".")
                    up = up[: len(up) - node.level + self.is_package]
                    base = ".".join([*up, *([base] if base else [])])
                yield from ((node.lineno, f"{base}.{alias.name}".removesuffix(".*")) for alias in node.names)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                    yield node.lineno, node.args[0].value


def parse(files: Files) -> dict[str, Module]:
    modules = (Module(path, text) for path, text in files.items())
    return {module.name: module for module in modules}


def inside(name: str, modules: Mapping[str, Module]) -> Module | None:
    """The module of ours that this dotted name belongs to."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return modules.get(name)


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def unplaced(files: Files) -> Iterator[str]:
    for module in parse(files).values():
        if module.unit not in FLOORS:
            yield f"{module.path}: place {module.unit!r} on a floor (FLOORS in {Path(__file__).name})"


def uphill(files: Files) -> Iterator[str]:
    modules = parse(files)
    for module in modules.values():
        for line, name in module.imports():
            target = inside(name, modules)
            if not under(name, PACKAGE):
                continue
            if target is None or (target.is_package and target.unit == PACKAGE and module.unit == PACKAGE):
                yield f"{module.path}:{line}: there is no {name}"
                continue
            mine, theirs = FLOORS.get(module.unit, 9), FLOORS.get(target.unit, 0)
            side = any(under(module.inner, a) and under(target.inner, b) for a, b in SIDEWAYS)
            if not (mine > theirs or module.unit == target.unit or (mine == theirs and side)):
                yield f"{module.path}:{line}: floor {mine:g} may not import {target.inner} of {theirs:g}"


def foreign(files: Files) -> Iterator[str]:
    modules = parse(files)
    for module in modules.values():
        floor = int(FLOORS.get(module.unit, 1))
        allowed = {
            library
            for place, libraries in LIBRARIES.items()
            if place == floor or (isinstance(place, str) and under(module.inner, place))
            for library in libraries
        }
        for line, name in module.imports():
            root = name.partition(".")[0]
            if root != PACKAGE and root not in sys.stdlib_module_names and root not in allowed:
                yield f"{module.path}:{line}: {root} may not be imported here (LIBRARIES)"
            if under(name, "ray.rllib") and module.unit != "rllib":
                yield f"{module.path}:{line}: ray.rllib belongs to {PACKAGE}/rllib/"
            # RLlib stands on Tune; what its users registered there must be found by every actor.
            tunes = module.unit in ("sweep", "rllib") or under(module.inner, "actors.registered")
            if under(name, "ray.tune") and not tunes:
                yield f"{module.path}:{line}: ray.tune belongs to {PACKAGE}/sweep/ and {PACKAGE}/rllib/"


def strayed_actors(files: Files) -> Iterator[str]:
    for module in parse(files).values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                said = f"{node.value.id}.{node.attr}"
                if said in ("ray.remote", "serve.deployment") and module.unit not in ("actors", "serving"):
                    yield f"{module.path}:{node.lineno}: {said} belongs to actors/ or serving/"


def circles(files: Files) -> Iterator[str]:
    modules = parse(files)
    edges: dict[str, set[str]] = {}
    for module in modules.values():
        targets = (inside(name, modules) for _, name in module.imports())
        edges[module.name] = {t.name for t in targets if t is not None and t is not module}
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> Iterator[str]:
        if name in trail:
            yield "a circle: " + " -> ".join([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in sorted(edges[name]):
                yield from walk(target, [*trail, name])
            done.add(name)

    for name in sorted(edges):
        yield from walk(name, [])


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs at import time, with the branches of `if`, `try` and `with`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def bound_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets if isinstance(node, ast.Assign | ast.AnnAssign) else []:
        for part in ast.walk(target) if target is not None else []:
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then the rest: the order that `ruff --fix` makes (RUF022)."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2), name


def wrong_exports(files: Files) -> Iterator[str]:
    modules = parse(files)
    for module in modules.values():
        exported: list[str] | None = None
        defined: set[str] = set()
        imported: set[str] = {n.rpartition(".")[2] for n in modules if n.rpartition(".")[0] == module.name}
        for node in statements(module.tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            names = set(bound_names(node))
            if "__all__" in names or (isinstance(node, ast.AugAssign) and "__all__" in ast.dump(node)):
                try:
                    exported = list(ast.literal_eval(node.value))  # type: ignore[attr-defined]
                except ValueError:
                    yield f"{module.path}:{node.lineno}: __all__ must be a plain list of strings"
            defined |= names
        public = {name for name in defined if not name.startswith("_")}
        if exported is None:
            if public:
                yield f"{module.path}: has no __all__, and defines {', '.join(sorted(public))}"
            continue
        if exported != (wanted := sorted(set(exported), key=order)):
            yield f"{module.path}: __all__ must be sorted, without doubles: {wanted}"
        if missing := public - set(exported):
            yield f"{module.path}: __all__ lacks {', '.join(sorted(missing))}"
        if extra := set(exported) - defined - imported:
            yield f"{module.path}: __all__ names what is not there: {', '.join(sorted(extra))}"


def prints(files: Files) -> Iterator[str]:
    for module in parse(files).values():
        stack: list[ast.AST] = [module.tree]
        while stack:
            node = stack.pop()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{module.path}:{node.lineno}: prints while it is imported"
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                stack.extend(ast.iter_child_nodes(node))


def long_loops(files: Files) -> Iterator[str]:
    for path, text in files.items():
        count = len(text.splitlines())
        if path in (f"{PACKAGE}/train.py", f"{PACKAGE}/rollout.py") and count > 200:
            yield f"{path}: {count} lines; a loop is read in one go, at most 200: split it by meaning"


CHECKS = [unplaced, uphill, foreign, strayed_actors, circles, wrong_exports, prints, long_loops]


@pytest.fixture(scope="module")
def files() -> Files:
    found = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert found
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_stands(check: Callable[[Files], Iterator[str]], files: Files) -> None:
    problems = list(check(files))
    assert not problems, "\n".join(problems)


def endless(files: Files) -> Iterator[str]:
    """Waits for Ray without a limit: `ray.get` and `ray.wait` without `timeout`."""
    for module in parse(files).values():
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("get", "wait")
                and getattr(node.func.value, "id", "") == "ray"
                and not any(keyword.arg == "timeout" for keyword in node.keywords)
            ):
                yield f"{module.path}:{node.lineno}: ray.{node.func.attr} needs a timeout"


def test_bug_41_every_wait_for_ray_has_a_deadline(files: Files) -> None:
    """That its error names who waited for whom is for `actors.remote.get` and the tests of the pool."""
    assert not list(endless(files))
    assert list(endless({"actors/a.py": "import ray\nray.get(x)\nray.wait(y, timeout=1)\n"})) == [
        "actors/a.py:2: ray.get needs a timeout"
    ]


VIOLATIONS: list[tuple[Callable[[Files], Iterator[str]], dict[str, str], str]] = [
    (unplaced, {"utils": ""}, "place 'utils' on a floor"),
    (unplaced, {"misc/deep": ""}, "place 'misc' on a floor"),
    (
        uphill,
        {"types": "import stateset_ray.models", "models": ""},
        "types.py:1: floor 1 may not import models",
    ),
    (uphill, {"types": "from stateset_ray import models", "models": ""}, "may not import models of 2"),
    (uphill, {"types": "def f():\n from .models import x", "models": ""}, "types.py:2: floor 1"),
    (uphill, {"grpo/loss": "from ..rollout import *", "rollout": ""}, "may not import rollout"),
    (uphill, {"grpo/__init__": "from ..rollout import *", "rollout": ""}, "may not import rollout"),
    (
        uphill,
        {
            "grpo/a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n import stateset_ray.cli",
            "cli": "",
        },
        "a.py:3: floor 2 may not import cli of 8",
    ),
    (
        uphill,
        {"types": "import importlib as i\ni.import_module('stateset_ray.cli')", "cli": ""},
        "types.py:2",
    ),
    (
        uphill,
        {"metrics": "import stateset_ray.models", "models": ""},
        "floor 2 may not import models of 2",
    ),
    (uphill, {"policies/a": "import stateset_ray.learner.b", "learner/b": ""}, "may not import learner.b"),
    (uphill, {"learner/a": "import stateset_ray.policies.b", "policies/b": ""}, "may not import policies.b"),
    (uphill, {"errors": "import stateset_ray.config", "config": ""}, "may not import config"),
    (
        uphill,
        {"models": "from stateset_ray import __version__", "__init__": ""},
        "may not import stateset_ray",
    ),
    (uphill, {"__init__": "from stateset_ray.rollout import x", "rollout": ""}, "2.5 may not import rollout"),
    (uphill, {"cli": "import stateset_ray.gone"}, "there is no stateset_ray.gone"),
    (foreign, {"types": "import torch.nn"}, "torch may not be imported here"),
    (foreign, {"grpo/advantages": "def f():\n import torch"}, "advantages.py:2: torch"),
    (foreign, {"rollout": "from ray import get"}, "ray may not be imported here"),
    (foreign, {"learner/engine": "__import__('ray')"}, "ray may not be imported here"),
    (foreign, {"cli": "import ray"}, "ray may not be imported here"),
    (foreign, {"actors/pool": "from ray import rllib"}, "ray.rllib belongs"),
    (foreign, {"sweep": "from ray.rllib.algorithms import x"}, "ray.rllib belongs"),
    (foreign, {"train": "from ray import tune"}, "ray.tune belongs"),
    (strayed_actors, {"train": "import ray\n@ray.remote\nclass A: ..."}, "train.py:2: ray.remote belongs"),
    (strayed_actors, {"rllib": "import ray\nA = ray.remote(num_cpus=1)(B)"}, "ray.remote belongs"),
    (strayed_actors, {"serve": "@serve.deployment(name='x')\nclass A: ..."}, "serve.deployment belongs"),
    (
        circles,
        {"grpo/a": "from . import b", "grpo/b": "def f():\n from stateset_ray.grpo import a"},
        "grpo.a -> ",
    ),
    (
        circles,
        {"a": "from .b import x", "b": "from .c import x", "c": "from .a import x"},
        "stateset_ray.a -> stateset_ray.b -> stateset_ray.c -> stateset_ray.a",
    ),
    (wrong_exports, {"a": "def f(): ..."}, "has no __all__, and defines f"),
    (wrong_exports, {"a": "__all__ = ['A', 'B']\nclass B: ...\nclass A: ...\nC = 1"}, "lacks C"),
    (wrong_exports, {"a": "__all__ = ['f']\nif 1:\n def f(): ...\nelse:\n X: int = 2"}, "lacks X"),
    (wrong_exports, {"a": "__all__ = ['Bb', 'Aa']\nAa = Bb = 1"}, "must be sorted"),
    (wrong_exports, {"a": "__all__ = ['Aa', 'XX', 'f']\nAa = XX = f = 1"}, "['XX', 'Aa', 'f']"),
    (wrong_exports, {"a": "__all__ = ['A', 'A']\nA = 1"}, "without doubles"),
    (wrong_exports, {"a": "__all__ = ['f', 'g']\ndef f(): ..."}, "not there: g"),
    (wrong_exports, {"a": "__all__ = [*x, 'f']\ndef f(): ..."}, "plain list"),
    (prints, {"a": "x = 1\nif x:\n print(x)"}, "a.py:3: prints"),
    (prints, {"a": "class A:\n print(1)"}, "a.py:2: prints"),
    (long_loops, {"train": "\n" * 201}, "201 lines"),
]

SOUND = {
    "__init__": "from stateset_ray.types import A\n__version__ = '1'\n__all__ = ['A', '__version__']",
    "types": "import json\nimport numpy as np\n__all__ = ['A']\nclass A: ...\n_B = 1",
    "errors": "__all__ = ['E']\nclass E(Exception): ...",
    "config": "import stateset_ray.errors\nfrom pydantic import BaseModel",
    "models": "def _f():\n import transformers\n print(transformers)",
    "grpo/__init__": "",
    "grpo/loss": "import torch\nfrom stateset_ray.grpo import base\nfrom ..types import A",
    "grpo/base": "from stateset_ray.types import A",
    "actors/pool": "import ray\nimport stateset_ray.rollout\n@ray.remote\nclass _A: ...",
    "rollout": "from stateset_ray import types, __version__",
    "train": "import ray\nimport stateset_ray.actors.pool",
    "evaluate": "",
    "rllib": "from ray.rllib.algorithms import Algorithm",
    "cli": "import typer\ndef _main():\n from stateset_ray.train import x",
}


def spread(sources: Mapping[str, str]) -> Files:
    return {f"{PACKAGE}/{name}.py": text for name, text in sources.items()}


@pytest.mark.parametrize(("check", "sources", "wanted"), VIOLATIONS)
def test_a_violation_is_found(
    check: Callable[[Files], Iterator[str]], sources: dict[str, str], wanted: str
) -> None:
    problems = list(check(spread(sources)))
    assert any(wanted in problem for problem in problems), problems


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_sound_house_passes(check: Callable[[Files], Iterator[str]]) -> None:
    assert list(check(spread(SOUND))) == []


def test_every_library_imported_is_declared(files: Files) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {re.split(r"[\[<>=~!; ]", line)[0].replace("-", "_") for line in lines}
    declared |= {IMPORTED_AS[name] for name in declared & IMPORTED_AS.keys()}
    roots = {name.partition(".")[0] for module in parse(files).values() for _, name in module.imports()}
    assert roots - set(sys.stdlib_module_names) - {PACKAGE} - declared == set()


HEAVY = ("deepspeed", "ray", "torch", "transformers")
REPORT = f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=60
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = run(f"import sys, {PACKAGE}; {REPORT}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_the_command_lines_help_loads_nothing_heavy() -> None:
    start = time.monotonic()
    done = run(
        "import runpy, sys; sys.argv = ['stateset-ray', '--help']\n"
        f"try: runpy.run_module('{PACKAGE}.cli', run_name='__main__')\n"
        f"finally: {REPORT}"
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert time.monotonic() - start < 20  # seconds; about one on an idle laptop
