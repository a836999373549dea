"""Which checkpoints a folder holds that are whole, and which of them is the one to go on from.

For readers: no lock is taken, and nothing in the folder changes. `stateset_ray.checkpoint` writes it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from stateset_ray.config import Config, load_config
from stateset_ray.errors import CheckpointError
from stateset_ray.manifest import MANIFEST, STEP_FOLDER, Checkpoint, verify

__all__ = [
    "POINTER", "check_not_a_path", "latest", "newest", "open_checkpoint", "pointed", "steps",
    "trained_config",
]  # fmt: skip

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


def newest(run: Path, *, written: bool = False) -> Checkpoint | None:
    """The checkpoint that a run goes on from, verified; None where it has written none yet.

    To begin anew instead would strike out what the run has done.

    Args:
        run: the run's folder.
        written: True where it is known that a checkpoint was written.

    Raises:
        CheckpointError: one was written, and none is whole.
    """
    root = run / "checkpoints"
    found = latest(root)
    if found is not None:
        return found
    if next(steps(root), None) is not None:
        return open_checkpoint(root)  # has the words for it
    if written or pointed(root):
        raise CheckpointError(
            "the run has written checkpoints, and none of them is here", given=str(root),
            mend="restore one from a backup; to train from the beginning, start a run of another name",
        )  # fmt: skip
    return None


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


def trained_config(path: str, overrides: Sequence[str]) -> Config:
    """The configuration that a run or checkpoint was trained with, with its weights as `model.name`.

    Args:
        path: a run folder, a checkpoint folder, or a TOML file (taken as it is).
        overrides: `section.key=value` settings on top.

    Raises:
        CheckpointError: there is no whole checkpoint, or it lies in no run.
        ConfigError: a setting is wrong.
    """
    if os.path.isdir(path):
        found = open_checkpoint(Path(path)).path
        # By its own name first, since a run's `checkpoints` may be a link to a larger disk.
        places = [Path(os.path.abspath(found)), found.resolve()]
        stored = [place.parent.parent / "config.toml" for place in places]
        config = next((file for file in stored if file.is_file()), None)
        if config is None:
            raise CheckpointError(
                "this checkpoint lies in no run, so its configuration is not known", given=str(places[0]),
                mend="give it as RUN/checkpoints/step-*, with the run's config.toml in RUN",
            )  # fmt: skip
        return load_config(config).with_overrides([f"model.name={json.dumps(str(places[0]))}", *overrides])
    if not os.path.exists(path):
        raise CheckpointError(
            "there is no such folder or file", given=path,
            mend="give a run's folder, one checkpoint, or a TOML file whose model.name says which model",
        )  # fmt: skip
    return load_config(path, overrides)


def check_not_a_path(name: str) -> None:
    """Refuse a model's name that looks like a path and is none: a mistyped run is nobody's to download.

    Raises:
        CheckpointError: there is nothing at this path.
    """
    beside = os.path.isdir(os.path.dirname(name))
    looks = name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1 or beside
    if (looks or name.endswith(".toml")) and not os.path.exists(name):
        raise CheckpointError(
            "there is no such folder", given=name,
            mend="give the folder of a run, one checkpoint, or a model's name (smollm2, or ORG/NAME at "
            "Hugging Face)",
        )  # fmt: skip


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
