"""What a run writes as it goes: `metrics.jsonl`, `trajectories.jsonl` and, at its end, `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stateset_ray.actors.jobs import GroupPayload
from stateset_ray.actors.remote import get
from stateset_ray.errors import RunError
from stateset_ray.manifest import replace_whole
from stateset_ray.metrics import JsonLines

__all__ = ["Journal"]


class Journal:
    """The journal of one run.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._trajectories = JsonLines(folder / "trajectories.jsonl")

    def step(self, record: Mapping[str, Any]) -> None:
        """Note what a step has come to (`actors.record`)."""
        self._metrics.append(record)

    def conversations(self, step: int, payloads: Sequence[Any], timeout: float) -> None:
        """Note the first conversation of each group: the same one in every run.

        Args:
            payloads: references to the groups' payloads.
            timeout: seconds to wait for them.
        """
        fetched: list[GroupPayload] = get(payloads, timeout=timeout, waiting_for="conversations to log")
        for payload in fetched:
            text = payload.group.trajectories[0].to_json()
            self._trajectories.append({"step": step, "trajectory": json.loads(text)})

    def rewind(self, step: int) -> None:
        """Strike out what was noted of this step and of later ones: they will be played again."""
        self._metrics.rewind(step)
        self._trajectories.rewind(step)

    def summary(self, facts: Mapping[str, Any]) -> None:
        """Write `summary.json`.

        Raises:
            RunError: it cannot be written.
        """
        target = self._folder / "summary.json"
        try:
            replace_whole(target, json.dumps(facts, indent=2).encode() + b"\n")
        except OSError as error:
            raise RunError(
                f"summary.json cannot be written: {error}", given=str(target),
                mend="make room there, or let this user write there; the checkpoints of the run are whole",
            ) from error  # fmt: skip
