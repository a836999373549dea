"""A rollout worker without a model: it starts in a second, and each group does what its task's data says."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stateset_ray.actors.jobs import GroupJob, GroupPayload, GroupReport, report_on
from stateset_ray.actors.rollout_worker import RolloutWorker
from stateset_ray.errors import ModelError
from stateset_ray.types import Message, StopReason, Trajectory, TrajectoryGroup, Turn

__all__ = ["ScriptedWorker"]


class ScriptedWorker(RolloutWorker):
    """Plays by `task.data`: {"fail": n} times at first, {"dies": fifo}, {"raises": text}, {"bug": text}.

    {"blocks": mark} and {"stops": mark} silence the process, {"halts": mark} between payload and report, and
    {"waits": mark} only the group, for ever; all only where the file `mark` is not there yet. {"gate": fifo}
    waits for something written there.
    """

    _renderer = SimpleNamespace(rewrites_history=False)

    def _set_up(self) -> None:
        self._inference = _NoWeights()  # type: ignore[assignment]
        self._failed: Counter[str] = Counter()

    async def play(
        self, version: int, weights: Mapping[str, Any], jobs: Sequence[GroupJob]
    ) -> AsyncIterator[GroupReport | GroupPayload]:
        async for item in super().play(version, weights, jobs):
            yield item
            if isinstance(item, GroupPayload) and "halts" in item.group.task.data:
                await asyncio.sleep(1)  # it is sent meanwhile
                await _hang({"stops": item.group.task.data["halts"]})

    async def _group(self, job: GroupJob) -> tuple[GroupReport, GroupPayload]:
        data = job.task.data
        if "raises" in data:
            raise ModelError(data["raises"])
        if "bug" in data:
            raise ValueError(data["bug"])
        await _hang(data)
        if "gate" in data:
            await asyncio.to_thread(Path(data["gate"]).read_text)
        broken = self._failed[job.id] < data.get("fail", 0)
        self._failed[job.id] += broken
        reason = StopReason.INFRASTRUCTURE_ERROR if broken else StopReason.COMPLETED
        said, turn = (Message("user", "Go."),), Turn((1, 2), (3,), (-0.5,), 0, reward=0.5)
        report, payload = report_on(
            job,
            TrajectoryGroup(
                job.task,
                tuple(
                    Trajectory(f"{job.id}/{i}/{job.attempt}", job.task, i, said, (turn,), reason)
                    for i in range(job.size)
                ),
            ),
        )
        if "dies" in data and not os.path.exists(data["dies"] + ".done"):
            sent: list[str] = []
            report.infos[0]["half"] = _Half(data["dies"], sent, "report")
            return report, _Half(data["dies"], sent, "payload")  # type: ignore[return-value]
        return report, payload


async def _hang(data: Mapping[str, str]) -> None:
    for how in {"blocks", "stops", "waits"} & data.keys():
        try:
            Path(data[how]).touch(exist_ok=False)
        except FileExistsError:
            return
        if how == "blocks":
            threading.Event().wait()
        if how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        await asyncio.Event().wait()


class _NoWeights:
    """Holds every version."""

    async def hold(self, *_: Any) -> None:
        pass


class _Half:
    """Half of what a group sends, its report's or its payload's: whichever goes second kills the worker."""

    def __init__(self, fifo: str, sent: list[str], name: str) -> None:
        self.fifo, self.sent, self.name = fifo, sent, name

    def __reduce__(self) -> Any:
        if self.sent:
            if self.sent == ["report"]:
                Path(self.fifo).read_text()  # until the controller has opened the report
            Path(self.fifo + ".done").touch()
            os._exit(1)
        self.sent.append(self.name)
        return (Path.write_text, (Path(self.fifo), "seen")) if self.name == "report" else (str, ())
