"""What the tests of this folder train on: environments that rollout workers can import, and a small config.

The folder is put on `sys.path` by conftest.py, so that this module has one name here and in every worker.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil

from stateset_ray.config import Config, load_config
from stateset_ray.environments.echo import Echo
from stateset_ray.types import Message, Split, Step, Task

__all__ = ["Constant", "EveryOther", "Playground", "gone", "on_fifo", "slowed", "small"]

_SMALL = (
    "model.name=tiny",
    "model.threads=1",
    'environment.path="stateset_ray.environments.echo:Echo"',
    "rollout.max_turns=2",
    "rollout.max_turn_tokens=4",
    "rollout.max_context=96",
    "rollout.concurrency=16",
    'rollout.on_cut_reply="close"',
    "grpo.group_size=4",
    "learner.learning_rate=1e-3",
    "learner.timeout=120",
    "cluster.wait_seconds=150",
    "train.steps=2",
    "train.tasks_per_step=2",
    "evaluate.tasks=0",
)


def small(folder: Path, *overrides: str) -> Config:
    """A run of seconds in `folder`: 8 conversations a step, one worker, one learner rank."""
    return load_config(None, [f'run.dir="{folder}"', *_SMALL, *overrides])


def slowed(seconds: float) -> float:
    """What takes so long where a core is free for it takes so long with as many others as run here now."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def gone(pids: list[int], seconds: float = 30) -> bool:
    """Whether all these processes end in time."""
    there = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return not psutil.wait_procs(there, timeout=seconds)[1]


@contextmanager
def on_fifo(path: Path, do: Any) -> Iterator[None]:
    """Call `do(text)` in a thread as soon as somebody writes into a named pipe at `path`."""
    os.mkfifo(path)

    def listen() -> None:
        if text := path.read_text():  # waits for a writer, and for it to close
            do(text)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield
    finally:
        if thread.is_alive():  # nobody wrote: be the writer who says nothing
            with path.open("w"):
                pass
        thread.join()


class Constant(Echo):
    """Every reply earns the same, so there is nothing to learn."""

    async def step(self, message: Message) -> Step:
        return replace(await super().step(message), reward=0.25)


class EveryOther(Echo):
    """Every reply earns the same in every other task, by its index."""

    async def reset(self, task: Task, seed: int) -> Step:
        self._dull = int(task.id.rpartition("-")[2]) % 2 == 0
        return await super().reset(task, seed)

    async def step(self, message: Message) -> Step:
        step = await super().step(message)
        return replace(step, reward=0.25) if self._dull else step


class Playground(Echo):
    """Misbehaves in the tasks that `plan` names, and in all conversations of their groups but `spare`.

    `plan` is read where tasks are made, which is the test's own process; a task carries its fault along.
    """

    plan: ClassVar[dict[int, dict[str, Any]]] = {}
    _played: ClassVar[Counter[str]] = Counter()

    def task(self, split: Split, index: int) -> Task:
        task = super().task(split, index)
        return replace(task, data=self.plan.get(index, {})) if split == "train" else task

    async def reset(self, task: Task, seed: int) -> Step:
        self._data = task.data
        self._played[task.id] += 1
        if self._played[task.id] <= task.data.get("spare", 0):
            self._data = {}
        if self._data.get("fault") == "exit":
            os._exit(1)
        return await super().reset(task, seed)

    async def step(self, message: Message) -> Any:
        match self._data.get("fault"):
            case "raise":
                raise RuntimeError("broken on purpose")
            case "hang":
                await asyncio.Event().wait()
            case "garbage":
                return "not a Step"
            case "knock":  # at the first reply, and then go on
                if self._first():
                    Path(self._data["fifo"]).write_text(str(os.getpid()))
            case "slow":  # the latency of a tool, say
                await asyncio.sleep(self._data["seconds"])
            case "gate":  # until a file is there
                while not os.path.exists(self._data["file"]):
                    await asyncio.sleep(0.05)
            case "nan":
                return Step(reward=float("nan"), terminated=True)
            case "freeze":  # with all conversations of this process, until it is killed
                if self._first():
                    Path(self._data["fifo"]).write_text(str(os.getpid()))
                    threading.Event().wait()
            case "wait":
                if self._first():
                    Path(self._data["fifo"]).write_text(str(os.getpid()))
                await asyncio.Event().wait()
        return await super().step(message)

    def _first(self) -> bool:
        """Whether nobody was here before, in any process."""
        try:
            os.mkdir(f"{self._data['fifo']}.taken")
        except FileExistsError:
            return False
        return True
