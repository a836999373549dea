"""Where the ranks of a test meet, each a process of its own."""

from __future__ import annotations

import socket
import time
from itertools import count
from pathlib import Path

__all__ = ["Meetings"]


class Meetings:
    """A port for each group of ranks, one after the other: on the last group's, a quick rank would meet the
    store that is going away.

    Args:
        folder: that all ranks share.
        name: of what is played, where several plays share it.
    """

    def __init__(self, folder: Path, name: str, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._groups = (folder / f"port-{name}-{world}-{number}" for number in count())

    def master(self) -> tuple[str, int]:
        """Where the next group meets: chosen when it is needed and not long before, or others may take it."""
        path = next(self._groups)
        if self._world == 1:
            return "127.0.0.1", 0
        if self._rank == 0:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            path.with_suffix(".new").write_text(str(port))
            path.with_suffix(".new").rename(path)
            return "127.0.0.1", port
        deadline = time.monotonic() + 120
        while not path.exists():
            assert time.monotonic() < deadline, "rank 0 did not say where to meet"
            time.sleep(0.01)
        return "127.0.0.1", int(path.read_text())
