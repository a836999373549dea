"""Where a run's checkpoints go: into its folder and, with `run.mirror`, into shared storage as well.

A checkpoint is saved on the disk first; a thread sends it on while the run trains (`stateset_ray.storage`).

Who waits: the next save, and the end of the run, for the thread, at most `learner.timeout` seconds; what
unblocks it is the storage. An upload that failed or took longer is given up with a warning, since the
checkpoint after it replaces it. Only when the last one is missing at the end does the run fail.
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

    def save(self, step: int, write: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
        """Save a checkpoint of `step`; see `checkpoint.save`. What was saved before is sent by then.

        Raises:
            CheckpointError: it could not be saved on the disk.
        """
        self._settle(step)  # retention may remove what is being sent
        started = time.monotonic()
        path = checkpoint.save(self._folder / "checkpoints", step, write, meta=meta, keep=self._keep)
        self._emit("checkpoint", path=str(path), seconds=time.monotonic() - started)
        if self._mirror is not None:
            self._missing = path
            self._upload = self._start(self._mirror, path)
        return path

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last upload, try once more if it failed, and send what the run has written since.

        Raises:
            CheckpointError: the newest checkpoint is not in the mirror, and nothing worse ended the run.
        """
        self._settle(None)
        if self._mirror is None:
            return
        last = self._start(self._mirror, self._missing)
        fault = last.wait(self._limit)
        if not fault:
            return
        if error is None or isinstance(error, KeyboardInterrupt):
            raise CheckpointError(
                f"what the run ended with is not in its mirror: {fault}", given=self._mirror.address,
                mend=f"mend the storage and resume the run, or copy {self._folder} there",
            )  # fmt: skip
        self._warn(None, fault)

    def _start(self, mirror: Storage, path: Path | None) -> _Upload:
        return _Upload(mirror, self._folder, path, self._keep)

    def _settle(self, step: int | None) -> None:
        """Wait for the upload under way and tell how it ended."""
        if self._upload is None or self._mirror is None:
            return
        fault = self._upload.wait(self._limit)
        if fault:
            self._warn(step, fault)
        else:
            self._missing = None
            seconds = self._upload.seconds
            self._emit("mirrored", address=self._mirror.address, name=self._upload.name, seconds=seconds)
        self._upload = None

    def _warn(self, step: int | None, fault: str) -> None:
        mend = "check the storage; the checkpoints on this machine's disk are whole"
        self._emit("warning", step=step, name="not_mirrored", text=fault, mend=mend, fatal=False)


def _served(folder: Path) -> list[str]:
    """Checkpoints that an endpoint of the run is held at; the first word of each line in its files."""
    lines: list[str] = []
    for file in folder.glob(f"{checkpoint.PIN.partition('-')[0]}-*"):
        lines += file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


class _Upload:
    """One checkpoint and the run's files, as they are now, on their way in a thread."""

    def __init__(self, mirror: Storage, folder: Path, path: Path | None, keep: int) -> None:
        self.name = path.name if path is not None else ""
        self.seconds = 0.0
        self._fault = ""
        self._mirror = mirror
        self._path = path
        self._keep = keep
        self._scratch = tempfile.TemporaryDirectory(prefix="stateset-mirror-")
        copied = Path(self._scratch.name)
        # The run goes on writing: copies hold whole lines, and at least those of the checkpoint's steps.
        self._beside = [copied / name for name in _BESIDE if (folder / name).is_file()]
        for file in self._beside:
            shutil.copyfile(folder / file.name, file)
        self._spare = _served(folder)
        # A daemon, so that a storage that never answers does not keep the process.
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def wait(self, limit: float) -> str:
        """What went wrong, within so many seconds; empty if nothing."""
        self._thread.join(limit)
        if self._thread.is_alive():
            return f"sending {self.name or 'the files'} to {self._mirror.address} took more than {limit:g} s"
        return self._fault

    def _run(self) -> None:
        started = time.monotonic()
        try:
            for file in self._beside:
                self._mirror.put(file, file.name)
            if self._path is not None:
                self._mirror.upload(self._path, keep=self._keep, spare=self._spare)
        except Exception as error:  # whatever it is, the run must hear of it rather than lose its checkpoints
            self._fault = f"{self.name or 'the files'}: {error}".partition("\n")[0]
        finally:
            self.seconds = time.monotonic() - started
            self._scratch.cleanup()
