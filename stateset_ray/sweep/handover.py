"""What Tune holds of a trial's checkpoint, and how one trial takes over from another.

A trial's checkpoints are those of its run, in `trials/<trial>/checkpoints` on storage that all nodes share:
learner ranks write them side by side, wherever they sit. What Tune saves, copies and hands on is a pointer
of a few bytes. A checkpoint that another trial takes over is linked into that one's own folder at once, so
that the giver may go on and remove it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from stateset_ray import checkpoint
from stateset_ray.errors import CheckpointError
from stateset_ray.manifest import MANIFEST

__all__ = ["Pointer", "hand_over", "take_up"]

_FILE = "pointer.json"
_INHERITED = "inherited"
_ALL = 1_000_000


@dataclass(frozen=True)
class Pointer:
    """A checkpoint of a sweep, wherever the sweep's folder lies.

    Attributes:
        trial: whose it is.
        step: after so many of its steps.
    """

    trial: str
    step: int

    def write(self, folder: str | Path) -> None:
        """Write it into a folder that Tune keeps."""
        (Path(folder) / _FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Pointer:
        """The pointer in a folder that Tune has kept.

        Raises:
            CheckpointError: there is none.
        """
        try:
            return cls(**json.loads((Path(folder) / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"this is no checkpoint of a trial: {error}", given=str(folder)) from error

    def lies_in(self, root: Path) -> Path:
        """Its place among checkpoints of one trial."""
        return root / f"step-{self.step:08d}"


def hand_over(trials: Path, pointer: Pointer, taker: str) -> None:
    """Link a trial's checkpoint into the folder of another one, before the giver can remove it.

    The last two that a trial was handed stay: what is old would hold the disk's room for ever.

    Args:
        trials: the folder of all trials.

    Raises:
        CheckpointError: it is not whole.
    """
    _link(pointer.lies_in(trials / pointer.trial / "checkpoints"), trials / taker / _INHERITED, keep=2)


def take_up(trials: Path, pointer: Pointer, trial: str) -> None:
    """Make a checkpoint the newest of a trial's own: one of its earlier ones, or what it was handed.

    Raises:
        CheckpointError: it is not whole.
    """
    folder = trials / trial
    where = "checkpoints" if pointer.trial == trial else _INHERITED
    # What is old there is removed by the run that goes on.
    _link(pointer.lies_in(folder / where), folder / "checkpoints", keep=_ALL)


def _link(source: Path, root: Path, *, keep: int) -> None:
    """Commit what a checkpoint holds under another root, without copies where links are possible."""
    found = checkpoint.verify(source)
    checkpoint.save(root, found.step, partial(_link_files, source), meta=found.meta, keep=keep)


def _link_files(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_dir():
            (target / name).mkdir()
        elif name != Path(MANIFEST):
            try:
                os.link(path, target / name)
            except OSError:  # another file system, or one without links
                shutil.copy2(path, target / name)
