"""The outer loop with rollouts running ahead of it.

While the learner learns from one step's conversations, the workers play those of the next. A conversation
may therefore be learned from with weights that are newer than those that played it, by at most
`train.max_staleness` steps (`actors.lookahead` admits no more); weights change between the turns of a
conversation, and every turn knows its version. With `train.max_staleness = 0` this is `train`, bit for bit.
Who waits for whom: the controller waits for the groups of the step in hand, then for the learners, and
keeps the workers supplied throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stateset_ray.actors.credit import policy_batch
from stateset_ray.actors.run import OnEvent, Run
from stateset_ray.config import Config, corrected
from stateset_ray.train import Clock, train

__all__ = ["train_async", "train_async_step"]


def train_async(
    config: Config, *, resume: bool = False, on_event: OnEvent = lambda _: None
) -> dict[str, Any]:
    """Train like `train.train`, with rollouts up to `train.max_staleness` steps ahead.

    Raises:
        StatesetError, KeyboardInterrupt: see `train.train`.
    """
    return train(corrected(config), resume=resume, on_event=on_event, take_step=train_async_step)


def train_async_step(run: Run, step: int) -> Mapping[str, float]:
    """One turn of the circle, while the next ones have begun."""
    staleness = run.config.train.max_staleness
    clock = Clock()
    with clock.phase("rollout"):
        collected = run.collect(step, staleness)
    with clock.phase("credit"):
        batch = policy_batch(collected, run.config)
    with clock.phase("learner"):
        update = run.update(batch, step, staleness=staleness)
    with clock.phase("publish"):
        if update:
            run.publish(run.version + int(update["applied"]))
        if staleness:
            run.run_ahead(step + 1, staleness)
    run.after(collected, batch, update, clock.seconds)
    return update
