"""Which checkpoints a folder holds that are whole, and which of them is the one to go on from.

For readers: no lock is taken, and nothing in the folder changes. `stateset_ray.checkpoint` writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stateset_ray.errors import CheckpointError
from stateset_ray.manifest import MANIFEST, STEP_FOLDER, Checkpoint, verify

__all__ = ["POINTER", "latest", "open_checkpoint", "pointed", "steps"]

POINTER = "latest"
"""The file that names the checkpoint that was committed last."""
_logger = logging.getLogger(__name__)


def latest(root: Path) -> Checkpoint | None:
    """The checkpoint to resume from, verified; None where there is none, or none that is whole.

    Starts at the one that was committed last and walks to older steps until one verifies; newer ones
    (left where a run was taken back to an earlier step) are tried last. Each that is passed over is
    named in a warning. `open_checkpoint` raises instead of answering None.
    """
    found, problems = _walk(Path(root))
    for problem in problems:
        _logger.warning("a checkpoint was passed over: %s", problem)
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """The verified checkpoint at `path`: a run's folder, its `checkpoints` folder, or one checkpoint.

    Raises:
        CheckpointError: there is none there, or none that is whole.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            "there is no such folder", given=str(path), mend="give a run's folder or one checkpoint"
        )
    if (path / MANIFEST).exists() or STEP_FOLDER.fullmatch(path.name):
        return verify(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = latest(root)
    if found is not None:
        return found
    _, problems = _walk(root)
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints here is whole; the first tried: {problems[0].problem}",
            given=str(root),
            mend="restore one from a backup, or train again",
        ) from problems[0]
    raise CheckpointError(
        "no checkpoint has been saved here",
        given=str(path),
        mend="give a run's folder, its checkpoints folder or one step-* folder",
    )


def pointed(root: Path) -> str:
    """The name of what was committed last, not verified; empty where that is not known."""
    try:
        return (Path(root) / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _walk(root: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    newest = STEP_FOLDER.fullmatch(pointed(root))  # a lost pointer loses nothing: start at the newest
    folders = sorted(steps(root), key=lambda f: (-f[0], len(f[1].name)))  # whole names before `.old-`
    last = int(newest[1]) if newest else max((step for step, _ in folders), default=0)
    problems: list[CheckpointError] = []
    for _, folder in [f for f in folders if f[0] <= last] + [f for f in folders if f[0] > last]:
        try:
            return verify(folder), problems
        except CheckpointError as error:
            problems.append(error)
    return None, problems


def steps(root: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every committed checkpoint, those moved aside included, in no order."""
    with suppress(FileNotFoundError):
        for entry in root.iterdir():
            match = STEP_FOLDER.fullmatch(entry.name)
            if match and entry.is_dir():
                yield int(match[1]), entry
