"""A run: everything that is open while training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stateset_ray import checkpoint
from stateset_ray.actors.credit import Batch
from stateset_ray.actors.evaluation import Evaluation, evaluate_heldout
from stateset_ray.actors.flight import Collected
from stateset_ray.actors.gauges import exported
from stateset_ray.actors.journal import Journal
from stateset_ray.actors.learner_group import LearnerGroup, learner_group
from stateset_ray.actors.lookahead import Lookahead
from stateset_ray.actors.mirror import Keeper, mirror_of
from stateset_ray.actors.placement import cluster, place
from stateset_ray.actors.publishing.folder import check_run_folder, check_shared, root_of
from stateset_ray.actors.record import step_record
from stateset_ray.actors.rollout_pool import RolloutPool, rollout_pool
from stateset_ray.actors.run_folder import discard_empty, open_folder
from stateset_ray.actors.stopping import stopping
from stateset_ray.actors.task_stream import TaskStream
from stateset_ray.actors.time_sharing import fall_asleep
from stateset_ray.committed import newest
from stateset_ray.config import Config
from stateset_ray.environments.base import Environment, build_environment, check_expert
from stateset_ray.errors import CheckpointError, LearnerLost, RunError
from stateset_ray.grpo.diagnosis import Problem, diagnose
from stateset_ray.grpo.divergence import next_kl_coef
from stateset_ray.learner.learner import LossKind
from stateset_ray.metrics import MemoryMeter, versions
from stateset_ray.models import check_fits, check_reference, check_targets, load_tokenizer, local_folder
from stateset_ray.policies.renderer import Renderer

__all__ = ["OnEvent", "Run", "open_run"]

OnEvent = Callable[[Mapping[str, Any]], None]

_EMPTY_STEPS = 10  # steps in a row without any gradient after which the run stops


class Run:
    """What the outer loop holds; made by `open_run`.

    Attributes:
        step: optimizer steps of GRPO done.
        keeper: saves checkpoints.
        version: of the policy; rises by one with every applied optimizer step, warm start included.
        kl_coef: weight of the KL to the reference, where it is steered to `grpo.kl_target`.
        results: what `summary.json` and checkpoints carry (held-out rewards and so on).
        rewinds: how often a checkpoint of elsewhere took the place of what the run had done.
        between: whether the learner's weights are those of the steps done: False from the start of an update
            until its step is counted, and from the end of the ranks until new ones have loaded theirs.
        watch: called with what each step has played and learned from, while that can still be fetched.
    """

    def __init__(
        self, config: Config, folder: Path, environment: Environment, pool: RolloutPool,
        learners: LearnerGroup, meter: MemoryMeter, on_event: OnEvent,
    ) -> None:  # fmt: skip
        self.config = config
        self.folder = folder
        self.pool = pool
        self.learners = learners
        self.keeper = Keeper(config, folder, self.emit, mirror_of(config.run))
        self.step = 0
        self.version = 0
        self.kl_coef = config.grpo.kl_coef
        self.results: dict[str, Any] = {}
        self.rewinds = 0
        self.between = True
        self.watch: Callable[[Collected, Batch], None] = lambda collected, batch: None
        self._environment = environment
        self._meter = meter
        self._journal = Journal(folder)
        self._on_event = on_event
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._saved: int | None = None
        self._empty = 0
        self._tasks = TaskStream(config, environment)
        self._ahead = Lookahead(config, pool, self._tasks, learners.secure)

    # -- the loop's view ---------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are left; ends the run when it was told to stop."""
        while self.step < self.config.train.steps:
            if self._stop.is_set():
                raise KeyboardInterrupt
            yield self.step

    def collect(self, step: int, staleness: int = 0) -> Collected:
        """The groups of a step, played with the published weights or those of at most `staleness` steps ago.

        Groups of equal rewards are replaced by further tasks, in up to `grpo.refills` rounds; what was
        replaced is in the result too, for the books. Groups of later steps are begun as staleness allows.
        """
        collected = self._ahead.take(step, staleness, self._stop.is_set)
        versions = [v for g in collected.groups for v in g.report.oldest if v is not None]
        bound = self.version - staleness * self.config.train.updates_per_step
        if versions and min(versions) < bound:
            raise RunError(
                f"a conversation was played with weights that are older than {staleness} steps",
                given=f"version {min(versions)}, at least {bound} was to be expected",
                mend="this is a bug of stateset_ray: please report it with the run folder",
            )
        return collected

    def run_ahead(self, step: int, staleness: int) -> None:
        """Begin to play what may be played while `step` is the next to be learned from."""
        self._ahead.admit(step, staleness)

    def collect_expert(self, step: int) -> Collected:
        """Play the dialogues of one warm-start step with the environment's expert."""
        return self.pool.collect(self._tasks.expert(step), self._stop.is_set)

    def update(
        self, batch: Batch, step: int, loss: LossKind = "policy", staleness: int = 0
    ) -> dict[str, float]:
        """Learn from a batch; {} where nothing in it has a gradient. Rollouts of later steps go on."""
        if not batch.updates:
            return {}
        self.between = loss != "policy"
        if self.config.rollout.sleep:
            fall_asleep(self.pool.receivers, self.config.rollout.turn_timeout, self.pool.beat)
        return self._ahead.meanwhile(
            step, staleness, lambda: self.learners.update(batch.updates, step, loss, self.kl_coef)
        )

    def publish(self, version: int) -> None:
        """Make the learners' weights the ones that every worker answers with, from its next turn on."""
        self.pool.weights = None  # the object store need not hold the old version beside the new one
        self.pool.weights = self.learners.publish(version, self.learners.restarts + self.rewinds)
        if self.config.publish.transport == "collective":
            self.pool.announce()  # a broadcast is for all at once
        self.version = version

    def evaluate(self, name: str) -> Evaluation | None:
        """Evaluate the published weights on held-out tasks, and note the result as `heldout_<name>`."""
        if not self.config.evaluate.tasks:
            return None
        started = time.monotonic()
        result = evaluate_heldout(self.pool, self._environment, self.config, self._stop.is_set)
        self._note_evaluation(name, result, time.monotonic() - started)
        return result

    def evaluate_if_due(self) -> None:
        """Evaluate every `train.evaluate_every` steps, once."""
        every, name = self.config.train.evaluate_every, f"step_{self.step}"
        if every and self.step and self.step % every == 0 and f"heldout_{name}" not in self.results:
            self.evaluate(name)

    def after(
        self, collected: Collected, batch: Batch, update: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        """Close a step: metrics, warnings, sampled conversations, evaluation, checkpoint."""
        learned_with = self.version - int(update.get("applied", 0))
        playing = sum(seconds.values()) if self.config.train.max_staleness else seconds["rollout"]
        record = step_record(
            self.step, self.version, learned_with, collected, batch, update, seconds, playing=playing
        )
        if self.config.grpo.kl_coef:
            record["kl_coef"] = self.kl_coef
        problems = diagnose(record, self.config)
        record["warnings"] = [problem.name for problem in problems]
        self._journal.step(record)
        logged = [handle.payload for handle in collected.groups[: self.config.run.log_trajectories]]
        self._journal.conversations(self.step, logged, self.config.cluster.wait_seconds)
        self.watch(collected, batch)
        for problem in problems:
            self.emit("warning", step=self.step, **problem.as_dict())
        self._ahead.finish(self.step)
        self.step += 1
        self.between = True
        if self.config.grpo.kl_target and "kl_reference" in update:
            self.kl_coef = next_kl_coef(self.kl_coef, update["kl_reference"], self.config.grpo.kl_target)
        self._stop_if_hopeless(batch, problems)
        left = self.config.train.steps - self.step
        took = sum(seconds.values())
        self.emit("step", **record, steps=self.config.train.steps, seconds_left=left * took)
        if left:
            self.evaluate_if_due()
        if self.step % self.config.train.checkpoint_every == 0 and left:
            self.save()

    def _stop_if_hopeless(self, batch: Batch, problems: Sequence[Problem]) -> None:
        self._empty = 0 if batch.updates else self._empty + 1
        if self._empty >= _EMPTY_STEPS:
            raise RunError(
                f"{_EMPTY_STEPS} steps in a row gave no gradient: in every group all rewards are equal",
                given=batch.facts,
                mend="make the task easier or harder, raise grpo.group_size, or warm-start first",
            )
        for problem in problems:
            if problem.fatal:
                raise RunError(problem.text, given=problem.name, mend=problem.mend)

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far.

        Raises:
            CheckpointError: it cannot be written, or the learner's weights are not those of these steps.
        """
        if not self.between:
            raise CheckpointError(
                "a step or a recovery was cut short: the learner's weights are of no step to be saved",
                given=f"step {self.step}",
                mend="go on from the newest checkpoint",
            )
        meta = {
            "run": self.config.run.name,
            "version": self.version,
            "results": self.results,
            "seconds": self._elapsed(),
            **self._tasks.state(),
            "kl_coef": self.kl_coef,
            "ranks": self.config.learner.ranks,
        }
        path = self.keeper.save(self.step, self.learners.save, meta)
        self._saved = self.step
        return path

    def save_if_new(self) -> Path | None:
        """Save unless nothing changed since the last save, or a step was cut short; the newest checkpoint."""
        if self.between and self._saved != self.step and (self.step or self.results.get("warm_started")):
            return self.save()
        found = checkpoint.latest(self.folder / "checkpoints")
        return found.path if found else None

    def recover(self, error: LearnerLost) -> None:
        """Build the learner ranks anew and go back to the newest checkpoint; the rollout workers stay.

        Raises:
            LearnerLost: this one, once `learner.restarts` are used up.
            CheckpointError: no checkpoint of the run is whole any more.
        """
        started, found = time.monotonic(), False
        self.between = False  # interrupted meanwhile, the run saves nothing: these weights are gone
        while not found:
            if self.learners.restarts >= self.config.learner.restarts:
                raise error
            self.emit("learner_lost", step=self.step, error=error.problem)
            try:
                self.learners.rebuild()
                self.restore()
                self.publish(self.version)
                found = True
            except LearnerLost as again:  # of one that was just built
                error = again
        self.emit("learner_rebuilt", step=self.step, seconds=time.monotonic() - started)

    def restore(self) -> None:
        """Continue from the newest whole checkpoint; from the start if none was written yet.

        Raises:
            CheckpointError: some were written, and none is whole; what the run has noted stays.
        """
        found = newest(self.folder, written=self._saved is not None)
        step, version, results, kl_coef = 0, 0, {}, self.config.grpo.kl_coef
        self.between = False  # interrupted meanwhile, the run saves nothing
        self._ahead.clear()
        self._tasks.rewind(found.meta if found else None)
        ranks = [self.config.learner.ranks] * 2
        if found is not None:
            self.learners.load(found.path)
            ranks[0] = int(found.meta.get("ranks", ranks[1]))
            step, version, results = found.step, int(found.meta["version"]), dict(found.meta["results"])
            if self.config.grpo.kl_target:  # else it is what the configuration says, whatever it was then
                kl_coef = float(found.meta.get("kl_coef", kl_coef))
            if self._saved is None:  # another process has spent this time
                self._seconds_before = float(found.meta["seconds"])
        self.step, self.version, self.results, self.kl_coef = step, version, results, kl_coef
        self._saved = step if found is not None else None
        self._empty, self.between = 0, True
        self._journal.rewind(step)
        where = str(found.path) if found else None
        self.emit("resumed", step=step, checkpoint=where, ranks_then=ranks[0], ranks=ranks[1])

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
        self._journal.summary(summary)
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
            {"role": m.role, "content": m.content} for m in result.conversation
        ]
        self.emit("evaluation", name=name, seconds=seconds, **result.as_dict())


@contextmanager
def open_run(
    config: Config, *, resume: bool = False, on_event: OnEvent = lambda _: None, signals: bool = True
) -> Iterator[Run]:
    """Open everything a run needs, in the order in which errors are cheapest, and close it again.

    Args:
        resume: continue the run of this name instead of starting a new one. A new run whose name is
            taken gets a number.
        signals: end at a safe point on Ctrl-C or SIGTERM; False leaves them to who drives the run.

    Raises:
        StatesetError: what is wrong, and how to mend it.
    """
    environment = build_environment(config.environment.path, config.environment.options)
    if config.train.warm_start.steps:
        check_expert(environment)
    check_fits(config)
    check_reference(config)
    check_targets(config)
    Renderer(load_tokenizer(config.model.name))  # a chat template it refuses, every worker would refuse
    config, folder = open_folder(config, resume=resume)
    opened = {"folder": str(folder), "model": config.model.name, "objective": config.grpo.summary()}
    on_event({"event": "opened", **opened, "resume": resume})
    with ExitStack() as stack:
        start = stack.enter_context(ExitStack())
        if not (resume or config.run.mirror):  # there, the name stays taken
            start.callback(discard_empty, folder)
        local_folder(config.model.name)  # built once here, not by every actor at the same time
        meter = stack.enter_context(MemoryMeter())
        stack.enter_context(cluster(config, in_turn=not config.train.max_staleness))
        on_event = exported(config, on_event)
        placement = stack.enter_context(place(config))
        pool = stack.enter_context(rollout_pool(config, placement))
        learners = stack.enter_context(learner_group(config, placement))
        check_run_folder(learners, folder)
        if config.publish.transport == "folder":
            check_shared(learners, pool.receivers, root_of(config), config.cluster.wait_seconds)
        run = Run(config, folder, environment, pool, learners, meter, on_event)
        if signals:
            stack.enter_context(stopping(run._stop, run.emit))
        if resume:
            run.restore()
        run.publish(run.version)
        stack.enter_context(run.keeper)
        start.pop_all()  # it has begun: what there is of it stays
        yield run
