"""What is sent to a cluster with a job: a folder's files, without what nobody wants there, as one archive.

Left out is what `.gitignore` and `.rayignore` say, those of this folder, of those below it, and of those
above it up to the root of the repository. Where both have a word, `.rayignore` has the last one:
`!weights.bin` in it sends what git ignores. Never sent, whatever they say, are runs, virtual environments,
caches, what git keeps, and secrets (`.env`, tokens of Ray). A link that leads out of the folder is refused,
unless an ignore file says that it is meant (`!lib`): what it leads to was perhaps never to be sent.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stateset_ray.errors import ConfigError

__all__ = ["LIMIT", "Package", "collect", "left_out", "write_archive"]

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
            bytes would be (the message names the largest files); or links lead out of it.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise ConfigError("there is no such folder to send", given=str(root))
    if root in (Path(root.anchor), Path.home()):
        raise ConfigError(
            "a home folder or the root of a file system is not sent to a cluster", given=str(root),
            mend="go to the project's folder, or name it with --working-dir",
        )  # fmt: skip
    outside: list[Path] = []
    try:
        walk = _walk(root, {Path(path).absolute() for path in never}, outside)
        sizes = {path.relative_to(root): path.stat().st_size for path in walk}
    except OSError as error:
        raise ConfigError(
            f"what would be sent cannot be looked at: {error.strerror}", given=str(error.filename),
            mend="make it readable, or name it in .rayignore",
        ) from error  # fmt: skip
    if outside:
        lines = [f"\n  - {link.relative_to(root)} -> {link.resolve()}" for link in outside[:_LARGEST]]
        first = outside[0].relative_to(root)
        raise ConfigError(
            f"{len(outside)} links lead out of the folder that is sent:{''.join(lines)}", given=str(root),
            mend=f"name them in .rayignore: /{first} leaves it out, !/{first} sends what it leads to",
        )  # fmt: skip
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


def left_out(root: Path, file: Path) -> tuple[Path, bool] | None:
    """Because of what a file in a folder is not sent.

    Returns:
        The outermost of the folders above it, or the file itself, that is left out, relative to the root,
        and whether an ignore file says so, which another could take back; None where nothing leaves it out.
    """
    root = Path(root).absolute()
    rules = _rules_of_root(root)
    for part in reversed([file, *file.parents][: len(file.relative_to(root).parts)]):
        rules = [*rules, *_rules_of(part.parent)]
        if _never_sent(part) or (part == file and part.suffix == ".pyc"):
            return part.relative_to(root), False
        if _word(part, rules, folder=part != file):
            return part.relative_to(root), True
    return None


def _rules_of_root(root: Path) -> list[_Rules]:
    above = list(_rules_above(root))
    # Whoever sends a folder that its repository ignores means it.
    return [] if _word(root, above, folder=True) else above


def _walk(root: Path, never: set[Path], outside: list[Path]) -> Iterator[Path]:
    top = root.resolve()

    def below(folder: Path, above: Sequence[_Rules], trail: set[Path]) -> Iterator[Path]:
        """The files below a folder; links are followed, but for those that lead back up or out."""
        rules = [*above, *_rules_of(folder)]
        for entry in sorted(folder.iterdir()):
            folders = entry.is_dir()
            if _never_sent(entry) or entry in never or not (folders or entry.is_file()):
                continue
            word, real = _word(entry, rules, folder=folders), entry.resolve()
            if word or real in trail or entry.suffix == ".pyc":
                continue
            if entry.is_symlink() and word is None and not real.is_relative_to(top):
                outside.append(entry)
            elif folders:
                yield from below(entry, rules, trail | {real})
            else:
                yield entry

    yield from below(root, _rules_of_root(root), {top})


def _never_sent(entry: Path) -> bool:
    name = entry.name
    return name in _NEVER or name.startswith(_TOKENS) or (entry / "pyvenv.cfg").is_file()


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


def _word(path: Path, rules: Sequence[_Rules], *, folder: bool) -> bool | None:
    """Whether it is ignored, as the nearest file says that has a word on it, as in git."""
    words = (each.say(path, folder=folder) for each in reversed(rules))
    return next((word for word in words if word is not None), None)


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
