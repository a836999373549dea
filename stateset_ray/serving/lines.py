"""Lines that are appended to a file whole, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["append_line"]


def append_line(file: Path, line: bytes) -> None:
    """Append one line; the file is made if missing, for its owner only.

    Opened for each line: no descriptor is held, and a file that was taken away is made again.

    Args:
        line: without its end.

    Raises:
        OSError: it cannot be written; nothing of it stays, unless another has written behind it meanwhile.
    """
    body = line + b"\n"
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        written = os.write(handle, body)
        if written == len(body):
            return
        # The disk is full. What is left of a line would spoil the next one, too.
        end = os.lseek(handle, 0, os.SEEK_CUR)
        if os.fstat(handle).st_size == end:
            os.ftruncate(handle, end - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    finally:
        os.close(handle)
