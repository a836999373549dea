"""Storage that fails when it is told to, for what sends checkpoints there."""

from __future__ import annotations

import time
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

__all__ = ["Failing"]


class Failing(MemoryFileSystem):
    """Storage whose writes fail from a certain one on, as often as it is told."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012  # as in the class above
    pseudo_dirs = [""]  # noqa: RUF012
    good = 10**9  # writes that succeed before those that fail
    bad = 0  # writes that fail
    slow = 0.0  # seconds of each write
    sent: list[str] = []  # noqa: RUF012

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        cls = type(self)
        time.sleep(cls.slow)
        if cls.good == 0 and cls.bad:
            cls.bad -= 1
            raise OSError("the network is gone")
        cls.good -= 1
        cls.sent.append(rpath)
        super().put_file(lpath, rpath, **options)

    @classmethod
    def fail(cls, *, after: int = 10**9, times: int = 0, slow: float = 0.0) -> None:
        """Let so many writes succeed, then so many fail; then all succeed again."""
        cls.good, cls.bad, cls.slow, cls.sent = after, times, slow, []
        fsspec.register_implementation(cls.protocol, cls, clobber=True)
