"""How a person or a cluster ends a run: by a signal, at a safe point first, then at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["stopping"]


@contextmanager
def stopping(stop: threading.Event, emit: Callable[..., None]) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run at the next safe point, the second at once.

    Args:
        stop: is set by the first; where it is set already, a signal ends the run at once.
        emit: told the event "stopping".
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        emit("stopping", signal=signal.Signals(number).name)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
