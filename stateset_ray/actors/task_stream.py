"""The order in which train tasks are played, so that a resumed run goes on with the very next one."""

from __future__ import annotations

from stateset_ray.actors.jobs import GroupJob
from stateset_ray.config import Config
from stateset_ray.environments.base import Environment
from stateset_ray.types import derive_seed

__all__ = ["TaskStream"]


class TaskStream:
    """Train tasks by index: first those of the warm start, then those of the steps, one after the other.

    A job depends on configuration, step and position only.

    Attributes:
        position: index of the first task that no finished step has drawn.
    """

    def __init__(self, config: Config, environment: Environment) -> None:
        self._config = config
        self._environment = environment
        self._dialogues = config.train.warm_start.dialogues
        self._first = config.train.warm_start.steps * self._dialogues
        self.position = self._drawn = self._first

    def expert(self, step: int) -> list[GroupJob]:
        """The dialogues of one warm-start step, each once, for the environment's expert."""
        first = step * self._dialogues
        return [self._job(f"warm-{step}", i, 1, expert=True) for i in range(first, first + self._dialogues)]

    def begin(self) -> None:
        """Begin a step: what an unfinished one has drawn is drawn again."""
        self._drawn = self.position

    def draw(self, step: int, count: int) -> list[GroupJob]:
        """The next groups of a step."""
        first, self._drawn = self._drawn, self._drawn + count
        return [self._job(str(step), i, self._config.grpo.group_size) for i in range(first, self._drawn)]

    def finish(self) -> None:
        """End a step: what it has drawn is played."""
        self.position = self._drawn

    def rewind(self, position: int | None) -> None:
        """Go back to where a checkpoint was; None: to the first step."""
        self.position = self._drawn = self._first if position is None else position

    def _job(self, step: str, index: int, size: int, *, expert: bool = False) -> GroupJob:
        task = self._environment.task("train", index)
        seed = derive_seed(self._config.run.seed, step, task.id)
        name = f"{self._config.run.name}/{step}/{task.id}"
        return GroupJob(name, task, seed, size, self._config.rollout.temperature, expert=expert)
