"""THE OUTER LOOP. Read this first.

    environments -> rollout -> grpo -> learner -> weights -> (back to rollout)

Each step plays every task `group_size` times on the rollout workers, compares the conversations of a
task with each other, takes an optimizer step on every learner rank, and publishes the new weights. If a
rank dies, all ranks are built anew and the loop goes on from the last checkpoint.
Who waits for whom: everything here is in turn. The controller waits for the workers, then for the
learners; `train_async` is the same loop with rollouts running ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

from stateset_ray.actors.credit import policy_batch, supervised_batch
from stateset_ray.actors.run import OnEvent, Run, open_run
from stateset_ray.config import Config
from stateset_ray.errors import ConfigError, LearnerLost, RunError

__all__ = ["Clock", "TrainStep", "advance", "prepare", "train", "train_step", "warm_start"]

TrainStep = Callable[[Run, int], Mapping[str, float]]
"""One turn of the circle: collect, learn, publish."""


def train(
    config: Config, *, resume: bool = False, on_event: OnEvent = lambda _: None,
    take_step: TrainStep | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a policy from a configuration; returns what `summary.json` holds.

    Args:
        config: the whole configuration.
        resume: continue the run of that name from its newest whole checkpoint, exactly.
        on_event: called with each event ("step", "evaluation", "checkpoint", ...).
        take_step: instead of `train_step`.

    Raises:
        StatesetError: what went wrong; the last checkpoint is whole.
        KeyboardInterrupt: it was told to stop, and has saved.
    """
    if config.train.max_staleness and take_step is None:
        raise ConfigError(
            "`train` takes its steps in turn and lets no rollout run ahead",
            given=f"train.max_staleness = {config.train.max_staleness}",
            mend="call stateset_ray.train_async.train_async, or set it to 0",
        )
    with open_run(config, resume=resume, on_event=on_event) as run:
        try:
            while True:
                try:
                    return _to_the_end(run, take_step or train_step)
                except LearnerLost as error:
                    run.recover(error)  # back to the last checkpoint, or raises the error again
        except KeyboardInterrupt:
            path = run.save_if_new()
            run.emit("interrupted", step=run.step, checkpoint=str(path) if path else None)
            raise


def _to_the_end(run: Run, take_step: TrainStep) -> dict[str, Any]:
    prepare(run)
    for step in run.steps():
        take_step(run, step)
    run.evaluate("after")
    return run.finish()


def advance(
    run: Run, take_step: TrainStep, before: Callable[[Run], None] | None = None
) -> Mapping[str, float]:
    """Take a run one step further, for drivers that hold the loop themselves (a trial of a sweep, say).

    What comes before the first step is done, and the loss of a learner rank is recovered from, as in `train`.

    Args:
        before: instead of `prepare`.

    Raises:
        StatesetError: what went wrong; the last checkpoint is whole.
    """
    wanted = run.step + 1
    while True:
        try:
            (before or prepare)(run)
            update: Mapping[str, float] = {}
            while run.step < wanted:
                update = take_step(run, run.step)
            return update
        except LearnerLost as error:
            run.recover(error)


def train_step(run: Run, step: int) -> Mapping[str, float]:
    """One turn of the circle; `train`, sweeps and other drivers all take this step."""
    clock = Clock()
    with clock.phase("rollout"):
        collected = run.collect(step)
    with clock.phase("credit"):
        batch = policy_batch(collected, run.config)
    with clock.phase("learner"):
        update = run.update(batch, step)
    with clock.phase("publish"):
        if update:
            run.publish(run.version + int(update["applied"]))
    run.after(collected, batch, update, clock.seconds)
    return update


def prepare(run: Run) -> None:
    """What comes before GRPO: evaluate, warm-start, evaluate again; what a resumed run has done stays."""
    if run.step:
        run.evaluate_if_due()
        return
    wanted = run.config.train.warm_start.steps
    if wanted and not run.results.get("warm_started"):
        run.evaluate("untrained")
        warm_start(run)
    if "heldout_before" not in run.results:
        run.evaluate("before")
        if wanted:
            run.save()


def warm_start(run: Run) -> None:
    """Take the supervised steps of `train.warm_start` and publish, unless the run has them behind it."""
    wanted = run.config.train.warm_start.steps
    if run.step or not wanted or run.results.get("warm_started"):
        return
    for step in range(wanted):
        _supervised_step(run, step)
    run.publish(run.version)
    if run.config.grpo.kl_coef:
        run.learners.refresh_reference()  # a KL holds GRPO to what it began with
    run.results["warm_started"] = wanted


def _supervised_step(run: Run, step: int) -> None:
    """Learn from dialogues of the environment's own expert, through the same learner and mask."""
    started = time.monotonic()
    collected = run.collect_expert(step)
    batch = supervised_batch(collected)
    if not batch.updates:
        errors = [error for handle in collected.groups for error in handle.report.errors]
        raise RunError(
            "not one expert dialogue could be finished, so there is nothing to warm-start from",
            given=errors[:1],
            mend="mend the environment's expert(), or set train.warm_start.steps=0",
        )
    update = run.update(batch, step, "supervised")
    run.version += int(update["applied"])
    steps, took = run.config.train.warm_start.steps, time.monotonic() - started
    run.emit("warm_start", step=step, steps=steps, loss=update["loss"], seconds=took)


class Clock:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Any:
        """Note how long the block takes."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
