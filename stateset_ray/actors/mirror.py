"""Where a run's checkpoints go: into its folder and, with `run.mirror`, into shared storage as well.

A checkpoint is saved on the disk first; a thread sends it on while the run trains (`stateset_ray.storage`).

Who waits: the next save, and the end of the run, for the thread, at most `learner.timeout` seconds; what
unblocks it is the storage. An upload that failed or took longer is given up with a warning, since the
checkpoint after it replaces it. One that took longer changes nothing more once the storage answers, and
until then no other is begun, so that none overtakes it. Only when the last one is missing at the end does
the run fail.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from stateset_ray import checkpoint
from stateset_ray.config import Config, RunConfig
from stateset_ray.errors import CheckpointError
from stateset_ray.manifest import peek
from stateset_ray.storage import Storage

__all__ = ["Keeper", "bring", "claim", "mirror_of"]

_BESIDE = ("config.toml", "metrics.jsonl", "trajectories.jsonl", "summary.json")


def mirror_of(run: RunConfig) -> Storage | None:
    """The run's folder in shared storage; None where there is no `run.mirror`.

    Raises:
        ConfigError: there is no such kind of storage here.
    """
    return Storage(f"{run.mirror.rstrip('/')}/{run.name}") if run.mirror else None


def claim(run: RunConfig) -> None:
    """Put the run's configuration into its mirror: the name is taken, and the storage can be written to.

    Raises:
        CheckpointError: it cannot.
    """
    if mirror := mirror_of(run):
        mirror.put(run.folder / "config.toml", "config.toml")


def bring(config: Config) -> None:
    """Bring a run's folder from its mirror, if there is none here or the mirror has a newer checkpoint.

    Raises:
        CheckpointError: the storage does not answer, or the disk refuses.
    """
    mirror, folder = mirror_of(config.run), config.run.folder
    if mirror is None:
        return
    root = folder / "checkpoints"
    here = checkpoint.latest(root)
    newer = [name for step, name in mirror.whole() if here is None or step > here.step]
    begun = (folder / "config.toml").is_file()
    if begun and not newer:
        return
    if not (begun or mirror.has("config.toml")):
        return
    root.mkdir(parents=True, exist_ok=True)
    for (
        name
    ) in _BESIDE:  # before the checkpoint: they have at least its steps, and a resumed run rewinds them
        if name != "config.toml" or not begun:
            mirror.get(name, folder / name)
    keep = config.train.keep_checkpoints
    mirror.fetch(root, above=-1 if here is None else here.step, keep=keep)


class Keeper:
    """Saves a run's checkpoints and, in a `with` block, sends them to the run's mirror.

    Args:
        config: of the run, under the name that it really has.
        folder: of the run.
        emit: called with the name and the facts of an event.
        mirror: see `mirror_of`.
    """

    def __init__(
        self, config: Config, folder: Path, emit: Callable[..., None], mirror: Storage | None
    ) -> None:
        self._keep = config.train.keep_checkpoints
        self._limit = config.learner.timeout
        self._folder = folder
        self._emit = emit
        self._mirror = mirror
        self._upload: _Upload | None = None
        self._missing: Path | None = None  # the newest checkpoint, where it is not in the mirror
        self._behind = False  # whether the mirror may have checkpoints that the run has gone back from

    def save(self, step: int, write: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
        """Save a checkpoint of `step`; see `checkpoint.save`. What was saved before is sent by then.

        Raises:
            CheckpointError: it could not be saved on the disk.
        """
        free = self._settle(step)  # retention may remove what is being sent
        started = time.monotonic()
        path = checkpoint.save(self._folder / "checkpoints", step, write, meta=meta, keep=self._keep)
        self._emit("checkpoint", path=str(path), seconds=time.monotonic() - started)
        if self._mirror is not None:
            self._missing = path
            if free:
                self._upload = self._start(self._mirror, path)
        return path

    def adopted(self, path: Path) -> None:
        """A checkpoint of elsewhere is the newest one now: send it, and remove those above it there."""
        if self._mirror is None:
            return
        free = self._settle(peek(path).step)
        self._missing, self._behind = path, True
        if free:
            self._upload = self._start(self._mirror, path)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last upload, try once more if it failed, and send what the run has written since.

        Raises:
            CheckpointError: the newest checkpoint is not in the mirror, and nothing worse ended the run.
        """
        free = self._settle(None)
        if self._mirror is None:
            return
        upload = self._upload
        if free or upload is None or upload.ended(self._limit):
            upload = self._start(self._mirror, self._missing)
        fault = upload.wait(self._limit)
        if not fault:
            return
        if error is None or isinstance(error, KeyboardInterrupt):
            raise CheckpointError(
                f"what the run ended with is not in its mirror: {fault}", given=self._mirror.address,
                mend=f"mend the storage and resume the run, or copy {self._folder} there",
            )  # fmt: skip
        self._warn(None, fault)

    def _start(self, mirror: Storage, path: Path | None) -> _Upload:
        return _Upload(mirror, self._folder, path, self._keep, behind=self._behind)

    def _settle(self, step: int | None) -> bool:
        """Wait for the upload under way and tell how it ended; False where it has not, and is given up."""
        upload = self._upload
        if upload is None or self._mirror is None:
            return True
        fault = upload.wait(self._limit)
        if fault:
            self._warn(step, fault)
            if not upload.ended():
                return False
        else:
            if self._missing is not None and self._missing.name == upload.name:
                self._missing, self._behind = None, False
            seconds = upload.seconds
            self._emit("mirrored", address=self._mirror.address, name=upload.name, seconds=seconds)
        self._upload = None
        return True

    def _warn(self, step: int | None, fault: str) -> None:
        mend = "check the storage; the checkpoints on this machine's disk are whole"
        self._emit("warning", step=step, name="not_mirrored", text=fault, mend=mend, fatal=False)


class _Upload:
    """One checkpoint and the run's files, as they are now, on their way in a thread."""

    def __init__(self, mirror: Storage, folder: Path, path: Path | None, keep: int, *, behind: bool) -> None:
        self.name = path.name if path is not None else ""
        self.seconds = 0.0
        self._fault = ""
        self._mirror = mirror
        self._path = path
        self._keep = keep
        self._behind = behind
        self._given_up = threading.Event()
        # A daemon, so that a storage that never answers does not keep the process.
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        try:
            self._prepare(folder)
        except OSError as error:  # no room for the copies, say: a fault of the upload, not of the run
            self._fault = f"{self.name or 'the files'}: {error}"
        else:
            self._thread.start()

    def _prepare(self, folder: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="stateset-mirror-")
        copied = Path(self._scratch.name)
        # The run goes on writing: copies hold whole lines, and at least those of the checkpoint's steps.
        self._beside = [copied / name for name in _BESIDE if (folder / name).is_file()]
        for file in self._beside:
            shutil.copyfile(folder / file.name, file)
        self._spare = checkpoint.served(folder)

    def wait(self, limit: float) -> str:
        """What went wrong, within so many seconds; empty if nothing. What takes longer is given up."""
        if not self.ended(0.0 if self._given_up.is_set() else limit):
            self._given_up.set()
            return f"sending {self.name or 'the files'} to {self._mirror.address} took more than {limit:g} s"
        return self._fault

    def ended(self, limit: float = 0.0) -> bool:
        """Whether it has ended, one way or the other, within so many seconds."""
        if self._thread.is_alive():
            self._thread.join(limit)
        return not self._thread.is_alive()

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise CheckpointError("it took too long and was given up")

    def _run(self) -> None:
        started = time.monotonic()
        try:
            for file in self._beside:
                self._go_on()
                self._mirror.put(file, file.name)
            if self._path is not None:
                self._mirror.upload(self._path, keep=self._keep, spare=self._spare, go_on=self._go_on)
                if self._behind:
                    self._mirror.take_back(peek(self._path).step)
        except Exception as error:  # whatever it is, the run must hear of it rather than lose its checkpoints
            self._fault = f"{self.name or 'the files'}: {error}".partition("\n")[0]
        finally:
            self.seconds = time.monotonic() - started
            self._scratch.cleanup()
