"""What each version of a replica has answered: counted by version here, and by role in the metrics.

A version is stable (it answers everybody whom no canary answers) or a canary. Metrics have the role only,
which is a closed set; who needs the version's name asks `GET /admin/weights`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stateset_ray.serving.events import Ask, Began, Event, Refused
from stateset_ray.serving.held_policy import HeldPolicy
from stateset_ray.serving.meters import Meters

__all__ = ["Role", "Tallies"]

Role = Literal["stable", "canary"]
_KEPT = 8  # versions whose tallies are kept


@dataclass
class _Tally:
    """Of one version: requests by how they ended, tokens sampled, seconds from asked to ended."""

    answered: int = 0
    refused: int = 0
    """By what no replica can answer: a conversation too long."""
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0


@dataclass
class Tallies:
    """Counts the answers of a replica's versions.

    Args:
        meters: where they are counted as well, by role.
    """

    meters: Meters
    _known: OrderedDict[str, _Tally] = field(default_factory=OrderedDict)

    def body(self) -> dict[str, dict[str, Any]]:
        """By version, the latest last."""
        return {label: asdict(tally) for label, tally in self._known.items()}

    async def counted(self, held: HeldPolicy, role: Role, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """The answer of one version, counted."""
        tally = self._of(held.candidate.label)
        started, ended = time.monotonic(), "cancelled"
        try:
            async with aclosing(held.answer(ask)) as answer:
                async for events in answer:
                    if isinstance(events[0], Began):
                        seconds = time.monotonic() - started
                        tally.first_token_seconds += seconds
                        self.meters.observe("version_ttft", seconds, role=role)
                    elif isinstance(events[0], Refused):
                        ended = "refused"
                    yield events
            ended = "refused" if ended == "refused" else "answered"
        except Exception:
            ended = "failed"
            raise
        finally:
            self._end(held, role, tally, ended, time.monotonic() - started)

    def _end(self, held: HeldPolicy, role: Role, tally: _Tally, ended: str, seconds: float) -> None:
        # What was sampled since this was last asked, by whichever of the answers that run side by side.
        tokens, read = held.uncounted()
        setattr(tally, ended, getattr(tally, ended) + 1)
        tally.tokens += tokens
        tally.seconds += seconds
        self.meters.add("version_requests", 1, role=role, outcome=ended)
        self.meters.observe("version_seconds", seconds, role=role)
        self.meters.add("version_tokens", tokens, role=role)
        self.meters.add("sampled_tokens", tokens)
        self.meters.add("read_tokens", read)

    def _of(self, label: str) -> _Tally:
        tally = self._known.setdefault(label, _Tally())
        self._known.move_to_end(label)
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return tally
