"""Which versions were refused, and whether for good: files that are wrong stay so, a full memory does not."""

from __future__ import annotations

import time
from collections.abc import Callable

from stateset_ray.errors import InfrastructureFault, StatesetError
from stateset_ray.serving.source import Candidate

__all__ = ["Verdicts", "may_pass"]

_FIRST = 30.0  # seconds until it is tried again; twice as many after each further failure
_LONGEST = 600.0


class Verdicts:
    """What came of versions that could not be taken over.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[tuple[str, int], float | None] = {}  # None: for good
        self._waits: dict[tuple[str, int], float] = {}

    def note(self, candidate: Candidate, error: BaseException) -> None:
        """Refuse a version for what it raised, if that may pass only for a while."""
        key = candidate.label, candidate.stamp
        if not may_pass(error):
            self._until[key] = None
            return
        wait = self._waits.get(key, _FIRST)
        self._until[key], self._waits[key] = self._clock() + wait, min(2 * wait, _LONGEST)

    def stands(self, candidate: Candidate) -> bool:
        """Whether a version is not to be tried, or not yet."""
        until = self._until.get((candidate.label, candidate.stamp), 0.0)
        return until is None or self._clock() < until


def may_pass(error: BaseException) -> bool:
    """Whether the same files may do better later: the machine was at fault, or what nobody foresaw.

    Example:
        >>> may_pass(MemoryError()), may_pass(StatesetError("no such model"))
        (True, False)
    """
    cause: BaseException | None = error
    while cause is not None:
        # torch's own, for a device, is a RuntimeError; nothing of torch is loaded here.
        if isinstance(cause, OSError | MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return isinstance(error, InfrastructureFault) or not isinstance(error, StatesetError)
