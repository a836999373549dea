"""A run: everything that is open while training."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stateset_ray import checkpoint
from stateset_ray.actors.credit import Batch
from stateset_ray.actors.evaluation import Evaluation, evaluate_heldout
from stateset_ray.actors.jobs import GroupJob, GroupPayload
from stateset_ray.actors.learner_group import LearnerGroup, learner_group
from stateset_ray.actors.placement import cluster, place
from stateset_ray.actors.remote import get
from stateset_ray.actors.rollout_pool import Collected, RolloutPool, rollout_pool
from stateset_ray.actors.run_folder import open_folder
from stateset_ray.config import Config
from stateset_ray.environments.base import Environment, build_environment, check_expert
from stateset_ray.errors import RunError
from stateset_ray.metrics import JsonLines, MemoryMeter, spread, versions
from stateset_ray.models import check_fits, load_tokenizer, local_folder
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import derive_seed

__all__ = ["OnEvent", "Run", "open_run"]

OnEvent = Callable[[Mapping[str, Any]], None]

_EMPTY_STEPS = 10  # steps in a row without any gradient after which the run stops


class Run:
    """What the outer loop holds; made by `open_run`.

    Attributes:
        step: optimizer steps of GRPO done.
        version: of the policy; rises by one with every applied optimizer step, warm start included.
        results: what `summary.json` and checkpoints carry (held-out rewards and so on).
    """

    def __init__(
        self, config: Config, folder: Path, environment: Environment, pool: RolloutPool,
        learners: LearnerGroup, meter: MemoryMeter, on_event: OnEvent,
    ) -> None:  # fmt: skip
        self.config = config
        self.folder = folder
        self.pool = pool
        self.learners = learners
        self.step = 0
        self.version = 0
        self.results: dict[str, Any] = {}
        self._environment = environment
        self._meter = meter
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._trajectories = JsonLines(folder / "trajectories.jsonl")
        self._on_event = on_event
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._saved: int | None = None
        self._empty = 0

    # -- the loop's view ---------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are left; ends the run when it was told to stop."""
        while self.step < self.config.train.steps:
            if self._stop.is_set():
                raise KeyboardInterrupt
            yield self.step

    def jobs(self, step: int) -> list[GroupJob]:
        """The groups of one step. A pure function of configuration and step, so that resuming is exact."""
        first = self._first_task(step)
        return [
            self._job(str(step), index, self.config.grpo.group_size)
            for index in range(first, first + self.config.train.tasks_per_step)
        ]

    def expert_jobs(self, step: int) -> list[GroupJob]:
        """The dialogues of one warm-start step, played by the environment's expert."""
        count = self.config.train.warm_start.dialogues
        return [
            self._job(f"warm-{step}", index, 1, expert=True)
            for index in range(step * count, (step + 1) * count)
        ]

    def _first_task(self, step: int) -> int:
        """Index of a step's first train task: the stream begins with those of the warm start."""
        train = self.config.train
        return train.warm_start.steps * train.warm_start.dialogues + step * train.tasks_per_step

    def _job(self, step: str, index: int, size: int, *, expert: bool = False) -> GroupJob:
        task = self._environment.task("train", index)
        seed = derive_seed(self.config.run.seed, step, task.id)
        name = f"{self.config.run.name}/{step}/{task.id}"
        return GroupJob(name, task, seed, size, self.config.rollout.temperature, expert=expert)

    def collect(self, jobs: list[GroupJob]) -> Collected:
        """Play groups with the published weights."""
        return self.pool.collect(jobs, self._stop.is_set)

    def publish(self, version: int) -> None:
        """Make the learners' weights the ones that every worker answers with, from its next turn on."""
        self.pool.weights = None  # the object store need not hold the old version beside the new one
        self.pool.weights = self.learners.publish(version)
        self.version = version

    def evaluate(self, name: str) -> None:
        """Evaluate the published weights on held-out tasks, and note the result as `heldout_<name>`."""
        if not self.config.evaluate.tasks:
            return
        started = time.monotonic()
        result = evaluate_heldout(self.pool, self._environment, self.config, self._stop.is_set)
        self._note_evaluation(name, result, time.monotonic() - started)

    def evaluate_if_due(self) -> None:
        """Evaluate every `train.evaluate_every` steps, once."""
        every, name = self.config.train.evaluate_every, f"step_{self.step}"
        if every and self.step and self.step % every == 0 and f"heldout_{name}" not in self.results:
            self.evaluate(name)

    def after(
        self, collected: Collected, batch: Batch, update: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        """Close a step: metrics, sampled conversations, evaluation, checkpoint."""
        record = self._record(collected, batch, update, seconds)
        self._metrics.append(record)
        self._log_trajectories(collected)
        self.step += 1
        self._empty = 0 if batch.samples else self._empty + 1
        if self._empty >= _EMPTY_STEPS:
            raise RunError(
                f"{_EMPTY_STEPS} steps in a row gave no gradient: in every group all rewards are equal",
                given=record["reward_mean"],
                mend="make the task easier or harder, raise grpo.group_size, or warm-start first",
            )
        left = self.config.train.steps - self.step
        took = sum(seconds.values())
        self.emit("step", **record, steps=self.config.train.steps, seconds_left=left * took)
        if left:
            self.evaluate_if_due()
        if self.step % self.config.train.checkpoint_every == 0 and left:
            self.save()

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far."""
        started = time.monotonic()
        meta = {
            "run": self.config.run.name,
            "version": self.version,
            "results": self.results,
            "seconds": self._elapsed(),
            "next_task": self._first_task(self.step),
        }
        root = self.folder / "checkpoints"
        keep = self.config.train.keep_checkpoints
        path = checkpoint.save(root, self.step, self.learners.save, meta=meta, keep=keep)
        self._saved = self.step
        self.emit("checkpoint", path=str(path), seconds=time.monotonic() - started)
        return path

    def save_if_new(self) -> Path | None:
        """Save unless nothing changed since the last save; the newest checkpoint's folder, if any."""
        if self._saved != self.step and (self.step or self.results.get("warm_started")):
            return self.save()
        found = checkpoint.latest(self.folder / "checkpoints")
        return found.path if found else None

    def restore(self) -> None:
        """Continue from the newest whole checkpoint; from the start if there is none."""
        found = checkpoint.latest(self.folder / "checkpoints")
        step = 0
        if found is not None:
            self.learners.load(found.path)
            self.step = self._saved = step = found.step
            self.version = int(found.meta["version"])
            self.results = dict(found.meta["results"])
            self._seconds_before = float(found.meta["seconds"])
        self._metrics.rewind(step)
        self._trajectories.rewind(step)
        self.emit("resumed", step=step, checkpoint=str(found.path) if found else None)

    def finish(self) -> dict[str, Any]:
        """Write the last checkpoint and `summary.json`; returns the summary."""
        path = self.save_if_new()
        summary = {
            "name": self.config.run.name,
            "model": self.config.model.name,
            "seed": self.config.run.seed,
            "steps": self.step,
            "policy_version": self.version,
            **self.results,
            "tasks": self.config.evaluate.tasks,
            "seconds": round(self._elapsed(), 1),
            "peak_rss_gib": round(self._meter.peak_bytes / 2**30, 2),
            "checkpoint": str(path),
            "versions": versions(),
        }
        target = self.folder / "summary.json"
        try:
            target.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"summary.json cannot be written: {error}", given=str(target)) from error
        self.emit("finished", **summary)
        return summary

    # -- inside ------------------------------------------------------------------------------------

    def emit(self, event: str, **facts: Any) -> None:
        """Tell whoever watches."""
        self._on_event({"event": event, **facts})

    def request_stop(self) -> None:
        """End the run at the next safe point, with a checkpoint."""
        self._stop.set()

    def _elapsed(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _note_evaluation(self, name: str, result: Evaluation, seconds: float) -> None:
        self.results[f"heldout_{name}"] = result.reward
        self.results.setdefault("conversations", {})[name] = [
            {"role": m.role, "content": m.content} for m in result.conversation.messages
        ]
        self.emit("evaluation", name=name, seconds=seconds, **result.as_dict())

    def _log_trajectories(self, collected: Collected) -> None:
        refs = [handle.payload for handle in collected.groups[: self.config.run.log_trajectories]]
        limit = self.config.cluster.wait_seconds
        payloads: list[GroupPayload] = get(refs, timeout=limit, waiting_for="conversations to log")
        for payload in payloads:
            # The first of each group: the same one in every run.
            text = payload.group.trajectories[0].to_json()
            self._trajectories.append({"step": self.step, "trajectory": json.loads(text)})

    def _record(
        self, collected: Collected, batch: Batch, update: Mapping[str, float], seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        reports = [handle.report for handle in collected.groups]
        rewards = spread([r for report in reports for r in report.rewards if r is not None])
        sampled = [n for report in reports for n in report.sampled]
        turns = [n for report in reports for n in report.turns]
        return {
            "step": self.step,
            "policy_version": self.version,
            "reward_mean": rewards["mean"],
            "reward_std": rewards["std"],
            **{k: update.get(k) for k in ("loss", "grad_norm", "learning_rate", "kl_mismatch")},
            "update": dict(update),
            "tokens_per_trajectory": spread([float(n) for n in sampled]),
            "turns_per_trajectory": spread([float(n) for n in turns]),
            "stop_reasons": dict(Counter(s for report in reports for s in report.stop_reasons)),
            "errors": [e for report in reports for e in report.errors][:5],
            "trajectories": batch.counts.as_dict(),
            "worker_restarts": collected.restarts,
            "rollout_tokens_per_second": sum(sampled) / max(seconds["rollout"], 1e-9),
            "learner_tokens_per_second": update.get("tokens", 0.0) / max(seconds["learner"], 1e-9),
            "seconds": dict(seconds),
        }


@contextmanager
def open_run(config: Config, *, resume: bool = False, on_event: OnEvent = lambda _: None) -> Iterator[Run]:
    """Open everything a run needs, in the order in which errors are cheapest, and close it again.

    Args:
        resume: continue the run of this name instead of starting a new one. A new run whose name is
            taken gets a number.

    Raises:
        StatesetError: what is wrong, and how to mend it.
    """
    environment = build_environment(config.environment.path, config.environment.options)
    if config.train.warm_start.steps:
        check_expert(environment)
    check_fits(config)
    Renderer(load_tokenizer(config.model.name))  # a chat template it refuses, every worker would refuse
    config, folder = open_folder(config, resume=resume)
    on_event({"event": "opened", "folder": str(folder), "model": config.model.name, "resume": resume})
    local_folder(config.model.name)  # built once here, not by every actor at the same time
    with ExitStack() as stack:
        meter = stack.enter_context(MemoryMeter())
        stack.enter_context(cluster(config))
        placement = stack.enter_context(place(config))
        pool = stack.enter_context(rollout_pool(config, placement))
        learners = stack.enter_context(learner_group(config, placement))
        run = Run(config, folder, environment, pool, learners, meter, on_event)
        stack.enter_context(_stopping(run))
        if resume:
            run.restore()
        run.publish(run.version)
        yield run


@contextmanager
def _stopping(run: Run) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run at the next safe point, the second at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        if run._stop.is_set():
            raise KeyboardInterrupt
        run.request_stop()
        run.emit("stopping", signal=signal.Signals(number).name)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
