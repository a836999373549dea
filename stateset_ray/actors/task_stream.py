"""The order in which train tasks are played, so that a resumed run goes on with the very next one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from stateset_ray.actors.jobs import GroupJob, distinct
from stateset_ray.config import Config
from stateset_ray.environments.base import Environment
from stateset_ray.types import derive_seed

__all__ = ["TaskStream"]


class TaskStream:
    """Train tasks by index: first those of the warm start, then those of the steps, one after the other.

    A job depends on configuration, step and position only. Several steps may be under way; what each has
    drawn is remembered until it is finished, so that it can be drawn again.
    """

    def __init__(self, config: Config, environment: Environment) -> None:
        self._config = config
        self._environment = environment
        self._dialogues = config.train.warm_start.dialogues
        self._first = config.train.warm_start.steps * self._dialogues
        self._next = self._first
        self._drawn: dict[
            int, dict[str, int]
        ] = {}  # of every step, what the jobs are whose index it has drawn
        self._again: dict[int, list[int]] = {}
        self._redrawn: set[str] = set()  # jobs of tasks that were drawn before
        self._spare: list[int] = []  # drawn once, and not needed when their step was played again

    def expert(self, step: int) -> list[GroupJob]:
        """The dialogues of one warm-start step, each once, for the environment's expert."""
        first = step * self._dialogues
        return self._jobs(f"warm-{step}", range(first, first + self._dialogues), 1, (), expert=True)

    def begin(self, step: int) -> None:
        """Begin a step: what it has drawn before, without being finished, is drawn again."""
        self._again[step] = [*self._drawn.pop(step, {}).values(), *self._again.get(step, [])]

    def draw(self, step: int, count: int) -> list[GroupJob]:
        """The next groups of a step."""
        again = self._again.get(step, [])
        indices, self._again[step] = again[:count], again[count:]
        spare = count - len(indices)
        indices, self._spare = indices + self._spare[:spare], self._spare[spare:]
        fresh = count - len(indices)
        indices += range(self._next, self._next + fresh)
        self._next += fresh
        drawn = self._drawn.setdefault(step, {})
        jobs = self._jobs(str(step), indices, self._config.grpo.group_size, drawn)
        drawn |= {job.id: index for job, index in zip(jobs, indices, strict=True)}
        self._redrawn = {name for name in self._redrawn if name in drawn}
        self._redrawn |= {job.id for job in jobs[: count - spare]}
        return jobs

    def redrawn(self, name: str) -> bool:
        """Whether the task of a job was drawn before, and is played again."""
        return name in self._redrawn

    def defer(self, step: int, names: Collection[str], *, playing: bool) -> None:
        """Leave jobs of a step to the next one.

        Args:
            playing: whether they go on, or are to be drawn again.
        """
        deferred = {name: self._drawn[step].pop(name) for name in list(self._drawn[step]) if name in names}
        following = step + 1
        if playing:
            self._drawn[following] = self._drawn.get(following, {}) | deferred
        else:
            self._again[following] = [*deferred.values(), *self._again.get(following, [])]

    def finish(self, step: int) -> None:
        """End a step: what it has drawn is played."""
        self._drawn.pop(step, None)
        self._spare += self._again.pop(step, [])

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to know: the next task, and what was drawn and not played."""
        steps = self._drawn.keys() | self._again.keys()
        drawn = {
            str(s): [*self._drawn.get(s, {}).values(), *self._again.get(s, [])] for s in sorted(steps)
        }  # fmt: skip
        return {
            "next_task": self._next,
            "spare": list(self._spare),
            "drawn": {step: indices for step, indices in drawn.items() if indices},
        }

    def rewind(self, state: Mapping[str, Any] | None) -> None:
        """Go back to where a checkpoint was; None: to the first step."""
        self._next = self._first if state is None else int(state["next_task"])
        self._spare = [] if state is None else [int(i) for i in state.get("spare", [])]
        self._drawn = {}
        drawn = {} if state is None else state.get("drawn", {})
        self._again = {int(step): [int(i) for i in indices] for step, indices in drawn.items()}

    def _jobs(
        self, step: str, indices: Iterable[int], size: int, taken: Collection[str], *, expert: bool = False
    ) -> list[GroupJob]:
        """Jobs of a step, which has those that are `taken` already."""
        jobs: dict[str, GroupJob] = {}
        names = set(taken)
        for index in indices:
            task = self._environment.task("train", index)
            name, parts = distinct(f"{self._config.run.name}/{step}/", task, index, names)
            names.add(name)
            seed = derive_seed(self._config.run.seed, step, *parts)
            jobs[name] = GroupJob(name, task, seed, size, self._config.rollout.temperature, expert=expert)
        return list(jobs.values())
