"""Where a policy comes from: a run whose checkpoints are followed, one checkpoint, or a model's name.

What a run is held at, and its canary, are said by `release`. No model is loaded here; every byte of a
checkpoint is compared with its manifest before anybody reads a weight.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stateset_ray.checkpoint import CANARY, open_checkpoint
from stateset_ray.config import Config, load_config
from stateset_ray.errors import CheckpointError
from stateset_ray.manifest import MANIFEST, verify
from stateset_ray.serving.release import STEP, answering, pin, pinned, tried

__all__ = ["Candidate", "Source", "pin", "pinned"]

_SHORT = 32  # characters of a label's name


@dataclass(frozen=True)
class Candidate:
    """Weights that could answer.

    Attributes:
        model: what `load_model` takes: a folder or a name.
        label: names the version, in every answer.
        step: of the checkpoint, -1 for a model that none of our runs has trained.
        stamp: differs where the same folder was written again.
        whole: True if its bytes were just compared with its manifest.
    """

    model: str
    label: str
    step: int
    stamp: int = 0
    whole: bool = False


class Source:
    """What `ServeSettings.source` names.

    Raises:
        CheckpointError: it is a folder, and neither a run nor a checkpoint nor a model.
    """

    def __init__(self, source: str) -> None:
        path = Path(source)
        self.run: Path | None = None
        self._folder: Path | None = None
        self._name = source
        if (path / "checkpoints").is_dir():
            self.run = path.absolute()
        elif path.name == "checkpoints" and path.is_dir():
            self.run = path.absolute().parent
        elif (path / MANIFEST).is_file():
            self._folder = path.absolute()
        elif path.is_dir() and not (path / "config.json").is_file():
            raise CheckpointError(
                "this folder is neither a run nor a checkpoint nor a model", given=source,
                mend="give a run's folder, one checkpoint, or a model in the Hugging Face layout",
            )  # fmt: skip

    def first(self) -> Candidate:
        """What to begin with: the pinned checkpoint, or else the newest that is whole.

        Raises:
            CheckpointError: there is none.
        """
        if self.run is not None:
            name = pinned(self.run)
            place = self.run / "checkpoints" / name if name else self.run
            return _candidate(open_checkpoint(place).path, whole=True)
        if self._folder is not None:
            return _candidate(verify(self._folder).path, whole=True)
        return Candidate(self._name, f"model-{_plain(Path(self._name).name)}", -1)

    def candidates(self) -> Iterator[Candidate]:
        """What to begin with, the best first: a run's newest checkpoint, then older ones, all unverified.

        A pinned run has one candidate only.

        Raises:
            CheckpointError: there is none.
        """
        wanted = self.wanted()
        if self.run is None or wanted is None or pinned(self.run):
            yield self.first()
            return
        yield wanted
        root = self.run / "checkpoints"
        steps = {int(p.name[5:]): p for p in root.iterdir() if STEP.fullmatch(p.name)}
        steps.pop(wanted.step, None)
        # Steps above the newest are left where a run was taken back to an earlier one.
        for step in sorted(steps, key=lambda step: (step > wanted.step, -step)):
            with suppress(OSError):  # it was removed since
                yield _candidate(steps[step])

    def wanted(self) -> Candidate | None:
        """What should answer now, unverified; None where nothing is said."""
        if self.run is None:
            return None
        try:
            return self._named(answering(self.run))
        except OSError:
            return None  # it is being replaced, or was removed since

    def is_held(self) -> bool:
        """Whether somebody holds the run at one checkpoint.

        Raises:
            CheckpointError: the pin is damaged.
        """
        return self.run is not None and pinned(self.run) is not None

    def canary(self) -> tuple[Candidate, float] | None:
        """What should answer a share of the conversations instead, unverified, and the share.

        Raises:
            CheckpointError: what says so is damaged, or the checkpoint is gone.
        """
        found = tried(self.run) if self.run is not None else None
        if self.run is None or found is None or found[0] == answering(self.run):
            return None
        try:
            candidate = self._named(found[0])
        except OSError as error:
            raise CheckpointError("the canary's checkpoint is gone", given=found[0]) from error
        return (candidate, found[1]) if candidate else None

    def canary_started(self) -> int:
        """When somebody last said which canary is tried, as the file system has it; 0 for never."""
        try:
            return (self.run / CANARY).stat().st_mtime_ns if self.run is not None else 0
        except OSError:
            return 0

    def _named(self, name: str) -> Candidate | None:
        if self.run is None or not STEP.fullmatch(name):
            return None
        return _candidate(self.run / "checkpoints" / name)

    def config(self) -> Config:
        """The configuration that it was trained with; the defaults for a model that is no run's."""
        run = self.run or (self._folder.parent.parent if self._folder else None)
        if run is not None and (run / "config.toml").is_file():
            return load_config(run / "config.toml")
        return Config()


def _candidate(folder: Path, *, whole: bool = False) -> Candidate:
    manifest = folder / MANIFEST
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:8]
    step = int(folder.name.removeprefix("step-").partition(".")[0]) if STEP.match(folder.name) else 0
    label = f"{_plain(folder.name)}-{digest}"
    return Candidate(str(folder), label, step, manifest.stat().st_mtime_ns, whole)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_SHORT] or "model"
