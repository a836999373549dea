"""Groups that are collected together, and their books."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stateset_ray.actors.jobs import Counts, GroupReport

__all__ = ["Collected", "Flight", "GroupHandle"]


@dataclass(frozen=True)
class GroupHandle:
    """A finished group: its report here, its payload in the object store."""

    report: GroupReport
    payload: Any


@dataclass
class Collected:
    """What one flight brought.

    Attributes:
        groups: in the order of the jobs; groups that were given up are missing.
        counts: `dispatched` and `aborted` are final; the caller accounts for the groups.
        restarts: workers that died since something was last collected.
    """

    groups: list[GroupHandle]
    counts: Counts
    restarts: int


class Flight:
    """Groups that are collected together, and their books.

    Attributes:
        order: job id -> place, of everything that was dispatched.
        unfinished: ids of jobs that have not ended yet.
    """

    def __init__(self) -> None:
        self.order: dict[str, int] = {}
        self.unfinished: set[str] = set()
        self.groups: list[GroupHandle] = []
        self.counts = Counts()

    def add(self, name: str) -> None:
        """A group of this name belongs to it, after those that do already."""
        self.order[name] = max(self.order.values(), default=-1) + 1
        self.unfinished.add(name)

    def collected(self, restarts: int = 0) -> Collected:
        """What has come so far."""
        groups = sorted(self.groups, key=lambda handle: self.order[handle.report.job.id])
        return Collected(groups, self.counts, restarts)

    def abandoned(self, reason: str) -> Counts:
        """The books of a flight that nobody will collect: everything in it was played in vain."""
        lost = self.counts.dispatched - self.counts.aborted.total()
        aborted = self.counts.aborted.copy()
        if lost:
            aborted[reason] += lost
        return Counts(dispatched=self.counts.dispatched, aborted=aborted)
