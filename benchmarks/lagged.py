"""The circle of `train` in one process, in which who plays is exactly so many steps behind who learns.

`train_async` lets rollouts run ahead by as much as the machine's timing makes of it; here the lag is what is
studied, so it is the same in every step, and nothing depends on time. All else is what a run does: the
rollout and its engine, `report_on`, `policy_batch`, `plan` and `Learner.update`.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from stateset_ray.actors.credit import policy_batch, supervised_batch
from stateset_ray.actors.flight import Collected, GroupHandle
from stateset_ray.actors.jobs import Counts, GroupJob, report_on
from stateset_ray.actors.learner_rank import UpdateBatch
from stateset_ray.config import Config
from stateset_ray.environments.base import build_environment
from stateset_ray.learner.batch import Item, MiniBatch, plan
from stateset_ray.learner.learner import Learner, LossKind
from stateset_ray.models import Hardware, generation_stop_ids, load_model, load_tokenizer
from stateset_ray.policies.base import Policy
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.policies.weights import decode
from stateset_ray.rollout import rollout
from stateset_ray.types import TrajectoryGroup, derive_seed

__all__ = ["Lagged", "Weights"]

Weights = Mapping[str, torch.Tensor]


class Lagged:
    """A learner and an engine whose weights are `lag` steps old; a context, because both hold a process's.

    Args:
        config: of the run; one rank, on the CPU in float32.
        lag: steps. Before step `lag` the engine plays with the weights that the run began with.
    """

    def __init__(self, config: Config, lag: int) -> None:
        self.config = config
        self._hardware = Hardware("cpu", torch.float32, max(1, config.model.threads))
        self.learner = Learner(config, 0, 1, ("127.0.0.1", 0), self._hardware)
        name, limits = config.model.name, config.rollout
        self._renderer = Renderer(load_tokenizer(name), generation_stop_ids(name))
        self._engine = TransformersEngine(
            load_model(name, self._hardware), self._renderer.stop_ids,
            slots=limits.slots, max_context=limits.max_context, hardware=self._hardware,
        )  # fmt: skip
        self._lag = lag
        self._held: deque[Weights] = deque(maxlen=lag + 1)
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._engine.close())
        self._loop.close()
        self.learner.close()

    def weights(self) -> Weights:
        """A copy of the learner's weights."""
        return {name: decode(array) for name, array in self.learner.export_weights().items()}

    def warm_start(self) -> None:
        """The supervised steps of `train.warm_start`."""
        warm = self.config.train.warm_start
        for step in range(warm.steps):
            jobs = self._jobs("warm", step, warm.dialogues, 1, expert=True)
            self._learn(supervised_batch(self._play(jobs)).updates, step, "supervised")

    def step(self, step: int) -> dict[str, Any]:
        """Play with the weights of `lag` steps ago, learn with those of now; what it came to.

        Returns:
            `reward` on average, `infos` of the environment, and the learner's means where there was
            something to learn.
        """
        self._held.append(self.weights())
        self._loop.run_until_complete(self._engine.load_weights(step, self._held[0]))
        size, tasks = self.config.grpo.group_size, self.config.train.tasks_per_step
        collected = self._play(self._jobs("train", step, tasks, size))
        rewards = [r for handle in collected.groups for r in handle.report.rewards if r is not None]
        infos = [info for handle in collected.groups for info in handle.report.infos]
        batch = policy_batch(collected, self.config)
        update = self._learn(batch.updates, step, "policy") if batch.updates else {}
        return {"reward": statistics.fmean(rewards), "infos": infos, "update": update}

    def evaluate(self, tasks: int) -> list[Any]:
        """The groups of one conversation each on held-out tasks, played with the learner's weights of now."""
        self._loop.run_until_complete(self._engine.load_weights(0, self.weights()))
        return [handle.report for handle in self._play(self._jobs("heldout", 0, tasks, 1)).groups]

    def _jobs(self, split: str, step: int, tasks: int, size: int, *, expert: bool = False) -> list[GroupJob]:
        section = self.config.environment
        environment = build_environment(section.path, section.options)
        heat = self.config.rollout.temperature
        return [
            GroupJob(
                f"{split}/{step}/{index}",
                environment.task("heldout" if split == "heldout" else "train", index),
                derive_seed(self.config.run.seed, split, index), size, heat, expert=expert,
            )
            for index in range(step * tasks, (step + 1) * tasks)
        ]  # fmt: skip

    def _play(self, jobs: Sequence[GroupJob]) -> Collected:
        return self._loop.run_until_complete(self._all(jobs))

    async def _all(self, jobs: Sequence[GroupJob]) -> Collected:
        groups = await asyncio.gather(*[self._group(job) for job in jobs])
        handles = [GroupHandle(*report_on(job, group)) for job, group in zip(jobs, groups, strict=True)]
        return Collected(handles, Counts(dispatched=sum(job.size for job in jobs)), 0)

    async def _group(self, job: GroupJob) -> TrajectoryGroup:
        played = await asyncio.gather(*[self._one(job, sample) for sample in range(job.size)])
        return TrajectoryGroup(job.task, tuple(played))

    async def _one(self, job: GroupJob, sample: int) -> Any:
        section = self.config.environment
        environment = build_environment(section.path, section.options)
        policy: Policy = self._engine
        if job.expert:
            policy = ScriptedPolicy(self._renderer, lambda _: environment.expert())
        return await rollout(
            environment, job.task, policy, self._renderer, self.config.rollout,
            id=f"{job.id}/{sample}", seed=job.seed, sample=sample, temperature=job.temperature,
        )  # fmt: skip

    def _learn(self, updates: Sequence[UpdateBatch], step: int, loss: LossKind) -> dict[str, float]:
        minibatches = []
        for update in updates:
            items = [Item(ref.size.tokens, ref.group, ref.prefix) for ref in update.samples]
            [mine] = plan(items, 1, self.config.learner.micro_batch_tokens)
            rows = [
                ref.payload.samples[ref.size.trajectory][ref.size.row].credited(ref.advantages, ref.weight)
                for ref in update.samples
            ]
            groups = [ref.group if ref.prefix else ("alone", i) for i, ref in enumerate(update.samples)]
            minibatches.append(
                MiniBatch(
                    [[rows[i] for i in mb] for mb in mine], [[groups[i] for i in mb] for mb in mine],
                    update.denominator,
                )
            )  # fmt: skip
        return self.learner.update(minibatches, step, loss)
