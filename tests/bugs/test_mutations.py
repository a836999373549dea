"""Every bug on the list has a test, and that test fails where the bug is.

`mutations.toml` says how each bug looks in the source. One at a time they are put into a copy of the
project, where the named test must fail; in a copy without any they must all pass. A test that cannot fail
proves nothing.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutations.toml")
LIMIT = 300  # seconds for one test in a copy

# Runs in the copy: what is tested must be the copy, and not what is installed.
RUN = """
import sys
from pathlib import Path
try:
    import stateset_ray
except BaseException as error:
    sys.exit(f"the copy cannot be imported: {error}")
found = Path(stateset_ray.__file__)
if not found.is_relative_to(Path.cwd()):
    sys.exit(f"not the copy is tested but {found}")
import pytest
sys.exit(100 + pytest.main(sys.argv[1:]))
"""
PASSED, FAILED = 100, 101


class Mutation(NamedTuple):
    """One entry of the list."""

    bug: int
    test: str
    file: str
    find: str
    replace: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.find) == 1, (
            f"{self.find!r} occurs {text.count(self.find)} times in {self.file}"
        )
        path.write_text(text.replace(self.find, self.replace), encoding="utf-8")


MUTATIONS = [Mutation(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutation"]]
NAMES = [f"bug-{m.bug:02}-{[n.bug for n in MUTATIONS[:i]].count(m.bug) + 1}" for i, m in enumerate(MUTATIONS)]


def copy_project(to: Path) -> Path:
    """Everything that tests may look at, without environments, caches and runs."""
    hidden = shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__")
    return Path(shutil.copytree(ROOT, to, ignore=hidden))


def run_tests(root: Path, *tests: str) -> tuple[int, str]:
    """The exit code and output of pytest on these tests of a copy."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [*tests, "-q", "-x", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(root)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=root, env=environment, capture_output=True, text=True,
        timeout=LIMIT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def defined(file: str) -> set[str]:
    """The test functions of a file, and those of its classes as `Class::test`."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = {node.name for node in tree.body if isinstance(node, functions)}
    for group in tree.body:
        if isinstance(group, ast.ClassDef):
            found |= {f"{group.name}::{node.name}" for node in group.body if isinstance(node, functions)}
    return found


@pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)
def test_the_list_fits_the_source(mutation: Mutation) -> None:
    """What is found there once is changed, and the test exists: the list cannot rot unseen."""
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.find) == 1, f"{mutation.find!r} occurs {text.count(mutation.find)} times"
    assert mutation.find != mutation.replace
    ast.parse(text.replace(mutation.find, mutation.replace))
    file, _, test = mutation.test.partition("::")
    assert re.sub(r"\[.*", "", test, flags=re.DOTALL) in defined(file)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
def test_without_the_bugs_all_pass(tmp_path: Path) -> None:
    root = copy_project(tmp_path / "copy")
    code, output = run_tests(root, *sorted({mutation.test for mutation in MUTATIONS}))
    assert code == PASSED, output[-4000:]
    assert "skipped" not in output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)
def test_with_the_bug_its_test_fails(mutation: Mutation, tmp_path: Path) -> None:
    root = copy_project(tmp_path / "copy")
    mutation.apply(root)
    code, output = run_tests(root, mutation.test)
    assert code == FAILED, f"exit code {code}\n{output[-4000:]}"
    # By its own assertions: an error while it was set up would be any bug's doing.
    end = next(line for line in reversed(output.splitlines()) if re.search(r"\b\d+ (failed|error)", line))
    assert "failed" in end, output[-4000:]
    assert "error" not in end, output[-4000:]
