"""A run's folder in shared storage: object stores, network file systems, whatever fsspec reaches.

    <mirror>/<run name>/
      config.toml  metrics.jsonl  trajectories.jsonl  summary.json     each replaced whole
      checkpoints/step-00000012/...                                    as in the run's own folder

An object store has no rename, so a checkpoint becomes one in another way than on a disk
(`stateset_ray.checkpoint`): its files are sent first, and their manifest last. The manifest is the commit
mark. Readers consider only what has one, and compare every byte that they fetch with its hashes, so that an
upload that was cut short, or whose bytes were changed on the way, is passed over for the one before it. What
is removed loses its manifest first.

There is no lock: one run writes to one address. Who waits: a caller for the storage, as long as its client
does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from stateset_ray import checkpoint
from stateset_ray.errors import CheckpointError, ConfigError
from stateset_ray.manifest import MANIFEST, STEP_FOLDER, peek

__all__ = ["Storage"]

_CHECKPOINTS = "checkpoints"
_PAUSES = (1.0, 5.0)  # seconds before the second and the third attempt
_PATIENCE = 120.0  # seconds after which what failed is not tried again
# By itself s3fs waits 60 s for each of up to 25 attempts of its own at an address that never answers.
_S3 = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 20, "retries": {"max_attempts": 2}}}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Storage:
    """A folder at an address that fsspec understands.

    Args:
        address: `s3://bucket/prefix`, `gs://...`, `memory://...`, or a path on storage that is mounted.
        pauses: seconds before each further attempt at what failed.

    Raises:
        ConfigError: there is no such kind of storage, or its package is not installed.

    Example:
        >>> Storage("memory://runs/demo").whole()
        []
    """

    def __init__(self, address: str, pauses: Sequence[float] = _PAUSES) -> None:
        self.address = address.rstrip("/")
        self._pauses = pauses
        self._fs, self._root, self._on_disk = _open(self.address)

    # -- single files --------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether there is a file of this name.

        Raises:
            CheckpointError: the storage does not answer.
        """
        return bool(self._try(f"look for {name}", lambda: self._fs.exists(self._at(name))))

    def put(self, file: Path, name: str) -> None:
        """Send a file; whoever reads `name` sees the old content or the new one, never a part.

        Raises:
            CheckpointError: it could not be sent.
        """
        self._try(f"send {name}", lambda: self._send(file, name))

    def get(self, name: str, file: Path) -> bool:
        """Fetch a file to `file`, which is replaced whole; False where there is none.

        Raises:
            CheckpointError: it could not be fetched.
        """
        beside = file.with_name(f"{file.name}.tmp-{uuid.uuid4().hex}")
        try:
            if not self._try(f"fetch {name}", lambda: self._receive(name, beside)):
                return False
            beside.replace(file)
            return True
        finally:
            beside.unlink(missing_ok=True)

    # -- checkpoints ---------------------------------------------------------------------------------

    def whole(self) -> list[tuple[int, str]]:
        """(step, name) of every checkpoint that has a manifest, newest first; contents are not looked at.

        Raises:
            CheckpointError: the storage does not answer.
        """
        found = self._try("list the checkpoints", self._steps)
        return sorted(((step, name) for step, name, whole in found if whole), reverse=True)

    def upload(
        self, folder: Path, *, keep: int, spare: Iterable[str] = (),
        go_on: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Send a checkpoint, its manifest last, then remove old ones.

        One that is there already, byte for byte, is not sent again.

        Args:
            folder: a checkpoint's folder on the disk, which nobody changes meanwhile.
            keep: how many to keep at or below its step.
            spare: names of checkpoints that stay besides.
            go_on: called before each change; what it raises ends the upload there.

        Raises:
            CheckpointError: it could not be sent; those that were whole before still are.
        """
        step, target = peek(folder).step, f"{_CHECKPOINTS}/{folder.name}"
        sizes = {name: entry["size"] for name, entry in _entries(folder).items()}
        with tempfile.TemporaryDirectory() as scratch:
            there = Path(scratch) / MANIFEST
            same = self.get(f"{target}/{MANIFEST}", there) and (
                there.read_bytes() == (folder / MANIFEST).read_bytes()
            )
        if not same:
            go_on()
            self._try(f"clear {target}", lambda: self._discard(target))
            for name, size in sizes.items():
                go_on()
                self._transfer(folder / name, f"{target}/{name}", size)
            go_on()
            self.put(folder / MANIFEST, f"{target}/{MANIFEST}")
        go_on()
        try:
            self._retain(step, keep, set(spare))
        except Exception as error:  # what was sent is whole; the next upload tries again
            _logger.warning("old checkpoints in %s cannot be removed: %s", self.address, error)

    def take_back(self, step: int) -> None:
        """Remove every checkpoint above a step: what a run has left behind by going back to it.

        Raises:
            CheckpointError: the storage does not answer.
        """
        for above, name, _ in self._try("list the checkpoints", self._steps):
            if above > step:
                self._try(f"remove {name}", lambda n=name: self._discard(f"{_CHECKPOINTS}/{n}"))  # type: ignore[misc]

    def fetch(self, root: Path, *, above: int = -1, keep: int) -> Path | None:
        """Bring the newest checkpoint that is whole to the last byte into a run's `checkpoints` folder.

        Each that is passed over is named in a warning.

        Args:
            root: the `checkpoints` folder; made if missing.
            above: only steps above this one.
            keep: see `checkpoint.commit`.

        Returns:
            Its folder; None where there is none.

        Raises:
            CheckpointError: the storage does not answer, or the disk refuses.
        """
        for step, name in self.whole():
            if step <= above:
                return None
            fault, found = self._bring(step, name, root, keep)
            if found is not None:
                return found
            _logger.warning("a checkpoint was passed over: %s/%s: %s", self.address, name, fault)
        return None

    # -- inside --------------------------------------------------------------------------------------

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _bring(self, step: int, name: str, root: Path, keep: int) -> tuple[str, Path | None]:
        """(what is wrong, None), or ("", the checkpoint's folder)."""
        with tempfile.TemporaryDirectory() as scratch:
            pattern = Path(scratch) / name
            pattern.mkdir()
            if not self.get(f"{_CHECKPOINTS}/{name}/{MANIFEST}", pattern / MANIFEST):
                return "its manifest was removed", None
            try:
                meta, entries = peek(pattern).meta, _entries(pattern)
            except CheckpointError as error:
                return error.problem, None
            manifest = (pattern / MANIFEST).read_bytes()
        if wild := [path for path in entries if not _inside(path)]:
            return f"its manifest names {wild[0]!r}, which lies outside of it", None
        temporary = checkpoint.begin(root, step)
        try:
            for path, entry in entries.items():
                file = temporary / path
                file.parent.mkdir(parents=True, exist_ok=True)
                if not self.get(f"{_CHECKPOINTS}/{name}/{path}", file):
                    return f"{path} is missing", None
                if _sha256(file) != entry["sha256"]:
                    return f"the content of {path} has changed", None
            found = checkpoint.commit(temporary, meta=meta, keep=keep)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {name} cannot be brought here: {error}", given=str(root),
                mend="make room on this disk, or set run.dir elsewhere",
            ) from error  # fmt: skip
        finally:
            checkpoint.abort(temporary)  # harmless after the commit
        if (found / MANIFEST).read_bytes() != manifest:
            raise CheckpointError(
                f"the checkpoint {name} is not the one that was sent", given=str(found),
                mend="this is a bug of stateset_ray: please report it",
            )  # fmt: skip
        return "", found

    def _steps(self) -> list[tuple[int, str, bool]]:
        """(step, name, whether it has a manifest) of every checkpoint, in no order."""
        self._fs.invalidate_cache()  # clients remember listings, and others write here too
        try:
            paths = self._fs.ls(self._at(_CHECKPOINTS), detail=False)
        except FileNotFoundError:
            return []
        names = [str(path).rstrip("/").rpartition("/")[2] for path in paths]
        matches = [match for name in names if (match := STEP_FOLDER.fullmatch(name)) and not match[2]]
        return [
            (int(m[1]), m[0], bool(self._fs.exists(self._at(f"{_CHECKPOINTS}/{m[0]}/{MANIFEST}"))))
            for m in matches
        ]

    def _retain(self, step: int, keep: int, spare: set[str]) -> None:
        """Keep the newest at or below `step`; what has no manifest there was cut short and goes too."""
        below = sorted((s for s in self._steps() if s[0] <= step), reverse=True)
        kept = {name for _, name, whole in [s for s in below if s[2]][:keep]} | spare
        for _, name, _ in below:
            if name not in kept:
                self._discard(f"{_CHECKPOINTS}/{name}")

    def _discard(self, target: str) -> None:
        with suppress(FileNotFoundError):  # the mark first: from here on no reader considers it
            self._fs.rm_file(self._at(f"{target}/{MANIFEST}"))
        with suppress(FileNotFoundError):
            self._fs.rm(self._at(target), recursive=True)

    def _transfer(self, file: Path, name: str, size: int) -> None:
        self.put(file, name)
        arrived = self._try(f"look at {name}", lambda: self._fs.size(self._at(name)))
        if arrived != size:
            raise CheckpointError(
                f"{arrived} of {size} bytes of {name} have arrived", given=self.address,
                mend="check the storage; the checkpoint on this machine's disk is whole",
            )  # fmt: skip

    def _send(self, file: Path, name: str) -> None:
        target = self._at(name)
        if not self._on_disk:
            self._fs.put_file(str(file), target)  # object stores show an object when all of it is there
            return
        beside = Path(f"{target}.tmp-{uuid.uuid4().hex}")
        beside.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("rb") as source, beside.open("wb") as sink:
                shutil.copyfileobj(source, sink, 4 << 20)
                sink.flush()
                os.fsync(sink.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)

    def _receive(self, name: str, file: Path) -> bool:
        try:
            self._fs.get_file(self._at(name), str(file))
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in _DISK:
                raise CheckpointError(
                    f"{name} cannot be brought here: {error.strerror}", given=str(file.parent),
                    mend="make room on this disk, or set run.dir elsewhere",
                ) from error  # fmt: skip
            raise
        return True

    def _try(self, what: str, action: Callable[[], _T]) -> _T:
        """Do it, again if it fails. Clients raise errors of their own, so any may be one of the network's."""
        started = time.monotonic()
        for pause in (*self._pauses, None):
            try:
                return action()
            except CheckpointError:  # of this machine's disk, which no waiting mends
                raise
            except Exception as error:
                late = time.monotonic() - started > _PATIENCE
                if pause is None or late or isinstance(error, PermissionError):
                    reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
                    # Some clients say no more than where nothing was found.
                    reason = f"not found: {reason}" if isinstance(error, FileNotFoundError) else reason
                    raise CheckpointError(
                        f"the storage did not {what}: {reason}", given=self.address,
                        mend="check that it exists, can be reached, and that this machine may write there",
                    ) from error  # fmt: skip
                time.sleep(pause)
        raise AssertionError("unreachable")


def _open(address: str) -> tuple[Any, str, bool]:
    """The file system behind an address, the path in it, and whether it is one of this machine's."""
    kind = address.partition("://")[0] if "://" in address else "file"
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        bounded = kind in ("s3", "s3a") and not conf.get(kind)  # FSSPEC_S3 says it otherwise
        system, root = url_to_fs(address, **(_S3 if bounded else {}))
    except ImportError as error:
        package = _PACKAGES.get(kind, "fsspec")
        raise ConfigError(
            f"storage of the kind {kind!r} needs a package that is not installed: {package}",
            given=address, mend=f"pip install 'stateset-ray[storage]' {package}",
        ) from error  # fmt: skip
    except Exception as error:
        raise ConfigError(
            f"this is no address of a storage: {error}", given=address,
            mend="give s3://bucket/prefix, gs://bucket/prefix or an absolute path",
        ) from error  # fmt: skip
    return system, str(root).rstrip("/"), isinstance(system, LocalFileSystem)


def _entries(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
