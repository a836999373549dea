"""The manifest: what a checkpoint folder holds, to the byte, and how it is made durable.

`seal` fsyncs and hashes what writers left in a folder and puts `manifest.json` on top; `verify` compares
a folder with its manifest before anybody deserialises a byte. The order of things around it (lock, rename,
pointer, retention) is `stateset_ray.checkpoint`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stateset_ray.errors import CheckpointError

__all__ = [
    "FAILPOINTS",
    "MANIFEST",
    "STEP_FOLDER",
    "Checkpoint",
    "encode",
    "failpoint",
    "peek",
    "replace_whole",
    "seal",
    "sync_folder",
    "verify",
    "write_synced",
]

FAILPOINTS = (
    "temporary_made",
    "file_hashed",
    "file_synced",
    "manifest_written",
    "old_moved_aside",
    "directory_renamed",
    "pointer_replaced",
    "retention_deleted",
)
"""Where a test can make a writer fail, in order: `STATESET_RAY_FAILPOINT=name[:action]`, where the action is
`exit` (the default: die at once, as by SIGKILL, with status 86) or the name of an errno such as `ENOSPC`."""

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})(\.old-[0-9a-f]{32})?")
"""Folders that hold a whole checkpoint; `.old-` ones were moved aside while the same step was saved again."""

_FORMAT = 1
_CHUNK = 4 << 20  # bytes; large enough that hashing, which releases the GIL, outweighs the Python around it
_THREADS = 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was just compared with its manifest.

    Attributes:
        path: its folder.
        step: how many optimizer steps it holds.
        meta: what the writer noted, as JSON gives it back (tuples have become lists).

    Example:
        >>> Checkpoint(Path("runs/demo/checkpoints/step-00000012"), 12).path.name
        'step-00000012'
    """

    path: Path
    step: int
    meta: Mapping[str, Any] = field(default_factory=dict)


def verify(path: Path) -> Checkpoint:
    """Compare every file of one checkpoint with its manifest.

    Raises:
        CheckpointError: it has no manifest, or a file is missing, foreign or changed; the message names it.
    """
    path = Path(path)
    try:
        body = _read(path)
        recorded, present = body["files"], {f.relative_to(path).as_posix(): f for f in _files(path)}
        present.pop(MANIFEST, None)
        for name in sorted(recorded.keys() ^ present.keys()):
            fault = "is missing" if name in recorded else "is not in the manifest"
            raise _damaged(path, f"{name} {fault}")
        for name, file in present.items():  # all sizes first: a truncated file is found without reading any
            size, wanted = file.stat().st_size, recorded[name]["size"]
            if size != wanted:
                raise _damaged(path, f"{name} has {size} bytes instead of {wanted}")
        with ThreadPoolExecutor(_THREADS) as pool:
            for name, digest in zip(present, pool.map(_sha256, present.values()), strict=True):
                if digest != recorded[name]["sha256"]:
                    raise _damaged(path, f"the content of {name} has changed")
    except OSError as error:
        raise _damaged(path, f"{error.filename or path}: {error.strerror}") from error
    return Checkpoint(path, body["step"], body["meta"])


def peek(path: Path) -> Checkpoint:
    """What the manifest of a checkpoint says, its files not looked at.

    Raises:
        CheckpointError: it has no manifest, or one that was changed.
    """
    try:
        body = _read(Path(path))
    except OSError as error:
        raise _damaged(path, f"{error.filename or path}: {error.strerror}") from error
    return Checkpoint(Path(path), body["step"], body["meta"])


def seal(folder: Path, step: int, meta: Mapping[str, Any]) -> None:
    """Make everything below `folder` durable and write its manifest.

    Raises:
        CheckpointError: the folder holds nothing, or something that no manifest can vouch for.
        OSError: the disk refuses.
    """
    files = sorted(_files(folder))
    if not files:
        raise CheckpointError(
            f"nothing was written for the checkpoint of step {step}",
            given=str(folder),
            mend="run.dir must lie on storage that the learner's nodes share",
        )
    if folder / MANIFEST in files:
        raise CheckpointError(f"{MANIFEST} is a reserved name", given=str(folder))

    def entry(file: Path) -> dict[str, Any]:
        digest = _sha256(file)
        failpoint("file_hashed")
        _sync(file, os.O_RDONLY)
        failpoint("file_synced")
        return {"size": file.stat().st_size, "sha256": digest}

    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(entry, files))
    for directory in {parent for file in files for parent in file.parents if parent.is_relative_to(folder)}:
        sync_folder(directory)
    names = [file.relative_to(folder).as_posix() for file in files]
    write_synced(folder / MANIFEST, encode(step, meta, dict(zip(names, entries, strict=True))))
    sync_folder(folder)
    failpoint("manifest_written")


def encode(step: int, meta: Mapping[str, Any], files: Mapping[str, Any]) -> bytes:
    """The one byte string that is the manifest of these contents.

    Raises:
        CheckpointError: JSON cannot hold `meta`.
    """
    try:
        # Through JSON once, since integer keys become strings, which sort differently when read back.
        plain_meta = json.loads(json.dumps(dict(meta), allow_nan=False))
        body = {"format": _FORMAT, "step": step, "meta": plain_meta, "files": dict(files)}
        # A digest of the rest, so that a damaged step or meta does not pass for a good one.
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps({**body, "digest": digest}, sort_keys=True, indent=1).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the meta of step {step} cannot be written as JSON: {error}",
            mend="use finite numbers, strings, lists and dictionaries with string keys",
        ) from error


def failpoint(name: str) -> None:
    """Die or raise here if `STATESET_RAY_FAILPOINT` says so (see `FAILPOINTS`); otherwise do nothing.

    Raises:
        OSError: the one that was asked for.
        CheckpointError: the setting names no failpoint or no action.
    """
    setting = os.environ.get("STATESET_RAY_FAILPOINT")
    if not setting:
        return
    chosen, _, action = setting.partition(":")
    codes = {word: code for code, word in errno.errorcode.items()}
    if chosen not in FAILPOINTS or (action or "exit") not in codes.keys() | {"exit"}:
        raise CheckpointError(
            "there is no such failpoint or action", given=setting, mend=f"one of {', '.join(FAILPOINTS)}"
        )
    if chosen == name:
        if action in codes:
            raise OSError(codes[action], os.strerror(codes[action]))
        os._exit(86)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it (its name in the folder needs `sync_folder`)."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_whole(path: Path, content: bytes) -> None:
    """Write a file beside and rename it: whoever reads it sees the old content or the new one, never a part.

    Raises:
        OSError: the disk refuses; what was there is as it was.
    """
    beside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        write_synced(beside, content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in this folder."""
    _sync(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
        else:  # a link's target can change behind the manifest's back, or lie outside
            raise CheckpointError(
                "a checkpoint may hold plain files only, no links or devices", given=entry.path
            )


def _sha256(file: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise _damaged(path, f"it has no {MANIFEST}, so it was never completed") from error
    try:
        body: dict[str, Any] = json.loads(raw)
        version, step = body["format"], body["step"]
        if version == _FORMAT:
            if raw != encode(step, body["meta"], body["files"]) or not isinstance(step, int):
                raise ValueError
            [(entry["size"], entry["sha256"]) for entry in body["files"].values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        raise _damaged(path, f"{MANIFEST} is not as it was written") from error
    if version != _FORMAT:
        raise CheckpointError(
            f"the checkpoint {path.name} has format {version!r}; this version reads format {_FORMAT}",
            given=str(path),
            mend="use the version of stateset-ray that wrote it",
        )
    named = STEP_FOLDER.fullmatch(path.name)
    if named and int(named[1]) != step:
        raise _damaged(path, f"its {MANIFEST} is of step {step}")
    return body


def _damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path.name} is damaged: {fault}",
        given=str(path),
        mend="use an older checkpoint, or copy this one again",
    )
