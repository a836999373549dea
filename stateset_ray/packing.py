"""What is sent to a cluster with a job: a folder's files, without what nobody wants there, as one archive.

Left out is what `.gitignore` and `.rayignore` say, those of this folder, of those below it, and of those
above it up to the root of the repository. Where both have a word, `.rayignore` has the last one:
`!weights.bin` in it sends what git ignores. Never sent, whatever they say, are runs, virtual environments,
caches, what git keeps, and secrets (`.env`, tokens of Ray).
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stateset_ray.errors import ConfigError

__all__ = ["LIMIT", "Package", "collect", "write_archive"]

LIMIT = 100 * 2**20
"""Bytes, before compression: Ray keeps what is sent in the memory of the head node."""

_NEVER = frozenset(
    (
        "runs", ".venv", "venv", ".git", ".hg", ".svn", "__pycache__", ".mypy_cache", ".pytest_cache",
        ".ruff_cache", ".hypothesis", ".tox", ".nox", ".ipynb_checkpoints", "node_modules",
        ".env", "auth_token",
    )
)  # fmt: skip
_TOKENS = ".ray-token"  # what a job of Slurm keeps its token in
_IGNORE_FILES = (".gitignore", ".rayignore")  # the later one has the last word
_LARGEST = 5  # files that a refusal names
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file, so that the same contents are the same archive


@dataclass(frozen=True)
class Package:
    """The files that would be sent.

    Attributes:
        root: the folder, absolute.
        files: relative to it, sorted.
        size: bytes, before compression.
    """

    root: Path
    files: tuple[Path, ...]
    size: int


def collect(root: Path, *, never: Sequence[Path] = (), limit: int = LIMIT) -> Package:
    """The files of a folder that are sent.

    Args:
        never: files and folders in it that are not, besides what is left out anyway.
        limit: bytes.

    Raises:
        ConfigError: there is no such folder, it cannot be read, nothing in it is sent, or more than `limit`
            bytes would be; the message names the largest files.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise ConfigError("there is no such folder to send", given=str(root))
    if root in (Path(root.anchor), Path.home()):
        raise ConfigError(
            "a home folder or the root of a file system is not sent to a cluster", given=str(root),
            mend="go to the project's folder, or name it with --working-dir",
        )  # fmt: skip
    try:
        walk = _walk(root, {Path(path).absolute() for path in never})
        sizes = {path.relative_to(root): path.stat().st_size for path in walk}
    except OSError as error:
        raise ConfigError(
            f"what would be sent cannot be looked at: {error.strerror}", given=str(error.filename),
            mend="make it readable, or name it in .rayignore",
        ) from error  # fmt: skip
    if not sizes:
        raise ConfigError(
            "nothing in this folder would be sent", given=str(root),
            mend="check .gitignore and .rayignore, also those above it in the repository",
        )  # fmt: skip
    if (total := sum(sizes.values())) > limit:
        largest = sorted(sizes, key=lambda path: (-sizes[path], path))[:_LARGEST]
        lines = [f"\n  - {path}  {sizes[path] / 2**20:.1f} MiB" for path in largest]
        raise ConfigError(
            f"{total / 2**20:.1f} MiB would be sent to the cluster, more than {limit / 2**20:g} MiB; "
            f"the largest files:{''.join(lines)}",
            given=str(root),
            mend="name them in .rayignore, and let the job read large files from shared storage",
        )
    return Package(root, tuple(sorted(sizes)), total)


def write_archive(package: Package, archive: Path) -> None:
    """Write a package as a zip file; the same names and contents give the same bytes.

    Raises:
        ConfigError: a file cannot be read.
    """
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name in package.files:
            file = package.root / name
            entry = zipfile.ZipInfo(name.as_posix(), _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            try:
                entry.external_attr = (0o755 if os.access(file, os.X_OK) else 0o644) << 16
                target.writestr(entry, file.read_bytes())
            except OSError as error:
                raise ConfigError(
                    f"a file that would be sent cannot be read: {error.strerror}", given=str(file),
                    mend="make it readable, or name it in .rayignore",
                ) from error  # fmt: skip


def _walk(root: Path, never: set[Path]) -> Iterator[Path]:
    above = list(_rules_above(root))
    if _ignored(root, above, folder=True):
        above = []  # whoever sends a folder that its repository ignores means it
    yield from _below(root, above, never, {root.resolve()})


def _below(folder: Path, above: Sequence[_Rules], never: set[Path], trail: set[Path]) -> Iterator[Path]:
    """The files below a folder; links are followed, but for those that lead back up."""
    rules = [*above, *_rules_of(folder)]
    for entry in sorted(folder.iterdir()):
        if (
            entry.name in _NEVER
            or entry.name.startswith(_TOKENS)
            or entry in never
            or (entry / "pyvenv.cfg").is_file()
        ):
            continue
        if entry.is_dir():
            real = entry.resolve()
            if real not in trail and not _ignored(entry, rules, folder=True):
                yield from _below(entry, rules, never, trail | {real})
        elif entry.is_file() and entry.suffix != ".pyc" and not _ignored(entry, rules, folder=False):
            yield entry


class _Rules:
    """One ignore file."""

    def __init__(self, folder: Path, lines: Sequence[str]) -> None:
        from pathspec import GitIgnoreSpec

        self._folder = folder
        self._spec = GitIgnoreSpec.from_lines(lines)

    def say(self, path: Path, *, folder: bool) -> bool | None:
        """Whether the path is ignored; None where this file has no word on it."""
        name = path.relative_to(self._folder).as_posix()
        return self._spec.check_file(f"{name}/" if folder else name).include


def _ignored(path: Path, rules: Sequence[_Rules], *, folder: bool) -> bool:
    """What the nearest file says, as in git."""
    words = (each.say(path, folder=folder) for each in reversed(rules))
    return next((word for word in words if word is not None), False)


def _rules_of(folder: Path) -> Iterator[_Rules]:
    for name in _IGNORE_FILES:
        file = folder / name
        if file.is_file():
            yield _Rules(folder, file.read_text(encoding="utf-8", errors="replace").splitlines())


def _rules_above(root: Path) -> Iterator[_Rules]:
    """Those of the folders from the repository's root down to the one above this."""
    parents: list[Path] = []
    for folder in (root, *root.parents):
        if (folder / ".git").exists():
            for parent in reversed(parents):
                yield from _rules_of(parent)
            return
        parents.append(folder.parent)
