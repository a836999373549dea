"""The checkpoint folder: written beside, fsynced, hashed, then renamed.

    checkpoints/
      latest                    name of the checkpoint that was committed last
      step-00000012/            one checkpoint: any files, and
        manifest.json           format, step, meta, and size and SHA-256 of every file
      step-00000013.tmp-<hex>/  being written, or left by a crash: no reader looks at it
      step-00000012.old-<hex>/  moved aside while the same step is saved again
      .lock .writer             one writer at a time, and who it is

Readers (`stateset_ray.committed`) take no lock and trust nothing without a complete, matching manifest
(`stateset_ray.manifest`).
Whatever instant a writer dies at, what was committed before it is still found whole.

Who waits: a writer for the writer before it, at most `timeout` seconds; what unblocks it is that one's
`commit`, `abort` or death.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from filelock import Timeout as LockTimeout

from stateset_ray.committed import POINTER, latest, open_checkpoint, pointed, steps
from stateset_ray.errors import CheckpointError, StatesetError
from stateset_ray.manifest import (
    MANIFEST,
    STEP_FOLDER,
    Checkpoint,
    encode,
    failpoint,
    peek,
    replace_whole,
    seal,
    sync_folder,
    verify,
)

__all__ = [
    "BEFORE", "CANARY", "PIN", "Checkpoint", "abort", "begin", "commit", "latest", "open_checkpoint", "peek",
    "pointed", "save", "served", "verify",
]  # fmt: skip

PIN = "serve-pin"
"""A file beside `checkpoints/`: names the checkpoint that an endpoint is held at; no training removes it."""
CANARY = "serve-canary"
"""A file beside it: the checkpoint that answers a share of the conversations; kept in the same way."""
BEFORE = "serve-before"
"""A file beside it: the checkpoints that an endpoint can be taken back to; kept in the same way."""
_STALE = re.compile(r".+\.tmp-[0-9a-f]{32}")
_logger = logging.getLogger(__name__)
_writers: dict[Path, FileLock] = {}  # the lock that goes with each folder between `begin` and `commit`


def save(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    meta: Mapping[str, Any],
    keep: int,
    timeout: float = 600.0,
) -> Path:
    """`begin`, `write(folder)`, `commit`: all or nothing.

    Args:
        root: the `checkpoints` folder of a run; made if missing.
        step: a step that already exists is replaced, and stays readable until its successor is whole.
        write: fills the folder it is given; other processes may do the work, on storage they share.
        meta: anything JSON can hold; it comes back as `Checkpoint.meta`.
        keep: how many checkpoints to keep at or below `step`; newer ones are never touched.
        timeout: seconds to wait for another writer of the same root.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be saved; the earlier checkpoints are whole. A StatesetError of
            `write` comes through unchanged.
    """
    encode(step, meta, {})  # complain about a bad meta or keep before minutes of writing, not after
    _check_keep(keep)
    temporary = begin(root, step, timeout=timeout)
    try:
        write(temporary)
    except BaseException as error:
        abort(temporary)
        if isinstance(error, StatesetError) or not isinstance(error, Exception):
            raise
        raise _failure(f"checkpoint of step {step} was not written", temporary.parent, error) from error
    return commit(temporary, meta=meta, keep=keep)


def begin(root: Path, step: int, *, timeout: float = 600.0) -> Path:
    """Take the writer lock, clear what crashes left behind, and make the folder to write into.

    The lock is held until `commit` or `abort`, or until this process ends.

    Args:
        root: the `checkpoints` folder of a run; made if missing.
        step: 0 or more.
        timeout: seconds to wait for another writer.

    Raises:
        CheckpointError: another writer held the lock all that time, or the folder cannot be made.
    """
    if step < 0:
        raise CheckpointError("a checkpoint's step must be 0 or more", given=step)
    root = Path(root).absolute()
    temporary = root / f"step-{step:08d}.tmp-{uuid.uuid4().hex}"
    lock = FileLock(root / ".lock", timeout=timeout, thread_local=False)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        (root / ".writer").write_text(f"process {os.getpid()} on {socket.gethostname()}, saving step {step}")
        _clean(root)
        temporary.mkdir()
        sync_folder(root)
        failpoint("temporary_made")
    except LockTimeout as error:
        raise CheckpointError(
            f"the checkpoint of step {step} waited {timeout:g} s for another writer: {_holder(root)}",
            given=str(root),
            mend="let it finish or end it; two runs must not share a folder (set run.name)",
        ) from error
    except BaseException as error:
        if lock.is_locked:
            _remove(temporary)
            lock.release()
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise _failure(f"checkpoint of step {step} was not begun", root, error) from error
    _writers[temporary] = lock
    return temporary


def commit(temporary: Path, *, meta: Mapping[str, Any], keep: int) -> Path:
    """Turn the folder that `begin` made, now filled, into a checkpoint; ends the writer lock either way.

    Args:
        temporary: what `begin` returned, in the same process.
        meta: anything JSON can hold.
        keep: how many checkpoints to keep at or below this step.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be made durable; `temporary` is gone and earlier checkpoints are
            whole. (Where only the pointer could not be replaced, the new one is whole too, and is
            replaced when its step is saved again.)
    """
    temporary = Path(temporary)
    if temporary not in _writers:
        raise CheckpointError(
            "this folder is not being written by this process",
            given=str(temporary),
            mend="commit once, with the folder that begin() returned here",
        )
    root, step = temporary.parent, int(temporary.name.removeprefix("step-").partition(".")[0])
    try:
        _check_keep(keep)
        seal(temporary, step, meta)
        final = root / f"step-{step:08d}"
        _publish(temporary, final)
        _point(root, final.name)
        _retain(root, step, keep)
        return final
    except OSError as error:
        raise _failure(f"checkpoint of step {step} was not completed", root, error) from error
    finally:
        abort(temporary)  # after a success nothing is left to remove, and only the lock ends


def abort(temporary: Path) -> None:
    """Remove the folder that `begin` made and end the writer lock; harmless after `commit` or twice."""
    lock = _writers.pop(Path(temporary), None)
    if lock is not None:
        _remove(temporary)
        lock.release()


def _clean(root: Path) -> None:
    """Remove what crashed writers left; only ever called under the lock, so nobody writes there."""
    for entry in list(root.iterdir()):
        match = STEP_FOLDER.fullmatch(entry.name)
        if match and match[2]:
            final = root / f"step-{match[1]}"
            if final.exists():
                _remove(entry)
            else:  # died between the two renames: the one moved aside is the only one
                entry.rename(final)
        elif _STALE.fullmatch(entry.name):
            _remove(entry)


def _publish(temporary: Path, final: Path) -> None:
    aside = final.with_name(f"{final.name}.old-{uuid.uuid4().hex}")
    try:
        if final.exists():  # no system call swaps two folders portably; `.old-` ones are readable too
            final.rename(aside)
            failpoint("old_moved_aside")
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync_folder(final.parent)
    failpoint("directory_renamed")
    _remove(aside)


def _point(root: Path, name: str) -> None:
    replace_whole(root / POINTER, name.encode() + b"\n")
    failpoint("pointer_replaced")


def _retain(root: Path, step: int, keep: int) -> None:
    """Delete all but the `keep` newest at or below `step`; the one just committed is the first of these."""
    whole = [f for f in steps(root) if f[0] <= step and not f[1].suffix and (f[1] / MANIFEST).is_file()]
    kept = served(root.parent)
    for _, folder in sorted(whole, reverse=True)[keep:]:
        if folder.name in kept:  # an endpoint answers with it, or may have to again
            continue
        try:
            doomed = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
            folder.rename(doomed)  # at once, so that no reader finds half of it
            failpoint("retention_deleted")
            _remove(doomed)
        except OSError as error:  # the new checkpoint is whole; the next save will hear of a full disk
            _logger.warning("the old checkpoint %s cannot be removed: %s", folder, error)


def served(run: Path) -> set[str]:
    """Checkpoints that the files of an endpoint name: the first word of each line.

    The endpoint may replace or remove these files meanwhile: what cannot be read names nothing.

    Args:
        run: the run's folder.
    """
    names: set[str] = set()
    for name in (PIN, CANARY, BEFORE):
        with suppress(OSError):
            lines = (run / name).read_text(encoding="utf-8", errors="replace").splitlines()
            names |= {line.split()[0] for line in lines if line.strip()}
    return names


def _remove(path: Path) -> None:
    # Network file systems keep files that a reader has open; what is left now the next writer removes.
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _check_keep(keep: int) -> None:
    if keep < 1:
        raise CheckpointError("at least one checkpoint must be kept", given=keep)


def _failure(what: str, root: Path, error: BaseException) -> CheckpointError:
    mends = {
        errno.ENOSPC: "make room on this disk, or lower train.keep_checkpoints",
        errno.EDQUOT: "make room within this quota, or lower train.keep_checkpoints",
        errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
        errno.EROFS: "the file system is read-only: mount it writable, or set run.dir elsewhere",
        errno.EACCES: "give this user the right to write there, or set run.dir elsewhere",
        errno.EIO: "the disk or network storage fails: check it before going on",
    }
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):  # libraries wrap what the disk said
        cause = cause.__cause__ or cause.__context__
    code = cause.errno if isinstance(cause, OSError) else None
    reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    room = ""
    with suppress(OSError):
        usage = shutil.disk_usage(root)
        room = f" ({usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB free there)"
    return CheckpointError(
        f"the {what}: {reason}{room}",
        given=str(root),
        mend=mends.get(code or 0, "mend the cause and save again; earlier checkpoints are untouched"),
    )


def _holder(root: Path) -> str:
    try:
        return (root / ".writer").read_text(encoding="utf-8", errors="replace")[:200] or "unknown"
    except OSError:
        return "unknown"
