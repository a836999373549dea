"""Threads for calls that block: there is always a free one.

A call that hangs keeps its thread for good. In a pool with a limit, as many such calls as it has threads
would hold up every call that comes after them; here another thread is started whenever none is free.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["THREADS", "Threads"]

_T = TypeVar("_T")
_Work = tuple[Future[Any], Callable[[], Any]]


class Threads(ThreadPoolExecutor):
    """An executor without a limit, also for asyncio as its default one: who calls it limits how much he asks.

    Its threads are daemons and are never joined, so that one that hangs does not keep the process.
    """

    def __init__(self) -> None:
        super().__init__(1)  # asyncio asks for this class; what it would do with threads is replaced
        self._free: list[_Thread] = []
        os.register_at_fork(after_in_child=self._free.clear)  # a child has none of its parent's threads

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Call it in a thread that has nothing to do, or in a new one."""
        future: Future[_T] = Future()
        try:
            thread = self._free.pop()
        except IndexError:
            thread = _Thread(self._free)
            thread.start()
        thread.work.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: what has not ended may never do so."""


class _Thread(threading.Thread):
    """Does what it is given, and is among the free ones meanwhile."""

    def __init__(self, free: list[_Thread]) -> None:
        super().__init__(name="environment", daemon=True)
        self.work: SimpleQueue[_Work] = SimpleQueue()
        self._free = free

    def run(self) -> None:
        while True:
            self._do(*self.work.get())

    def _do(self, future: Future[Any], work: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            self._free.append(self)
            return
        # Free before the result is known: who waits for it may have the next call at once.
        try:
            result = work()
        except BaseException as error:
            self._free.append(self)
            future.set_exception(error)
        else:
            self._free.append(self)
            future.set_result(result)


THREADS = Threads()
"""Of this process."""
