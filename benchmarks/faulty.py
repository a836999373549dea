"""An environment that misbehaves in the tasks it is told to: `echo`, with faults."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace

from stateset_ray.environments.echo import Echo
from stateset_ray.types import Message, Split, Step, Task

__all__ = ["Faulty"]


class Faulty(Echo):
    """Echo, but for the train tasks of `faults`.

    Args:
        seconds: that every answer takes.
        faults: index of a train task -> what goes wrong in its conversations: "raise", "hang" (they wait for
            ever) or "block" (the whole process does, the first time).
        marks: a folder in which a process notes that it has blocked.
    """

    def __init__(
        self, seconds: float = 0.0, faults: Mapping[str, str] | None = None, marks: str = ""
    ) -> None:
        super().__init__()
        self._seconds, self._faults, self._marks = seconds, dict(faults or {}), marks

    def task(self, split: Split, index: int) -> Task:
        task = super().task(split, index)
        fault = self._faults.get(str(index)) if split == "train" else None
        return replace(task, data={**task.data, "fault": fault}) if fault else task

    async def reset(self, task: Task, seed: int) -> Step:
        self._task = task
        return await super().reset(task, seed)

    async def step(self, message: Message) -> Step:
        await asyncio.sleep(self._seconds)
        match self._task.data.get("fault"):
            case "raise":
                raise RuntimeError("broken on purpose")
            case "hang":
                await asyncio.Event().wait()
            case "block" if self._first():
                threading.Event().wait()
        return await super().step(message)

    def _first(self) -> bool:
        try:
            with open(f"{self._marks}/{self._task.id}", "x"):
                return True
        except FileExistsError:
            return False
