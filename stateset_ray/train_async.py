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
from stateset_ray.config import Config
from stateset_ray.train import Clock, train

__all__ = ["corrected", "train_async", "train_async_step"]


def train_async(
    config: Config, *, resume: bool = False, on_event: OnEvent = lambda _: None
) -> dict[str, Any]:
    """Train like `train.train`, with rollouts up to `train.max_staleness` steps ahead.

    Raises:
        StatesetError, KeyboardInterrupt: see `train.train`.
    """
    return train(corrected(config), resume=resume, on_event=on_event, take_step=train_async_step)


def corrected(config: Config) -> Config:
    """The configuration, with stale samples corrected for unless it says how.

    The trust region is then around the policy as the step begins, and each token is weighted by how much
    likelier that policy makes it than the one that sampled it, cut at `grpo.correction_high` (decoupled
    PPO, https://arxiv.org/abs/2110.00641, with truncated importance sampling). Clipping around a stale
    sampler would instead forbid what newer weights have already learned. An objective whose ratio is to the
    sampler because it says so, or because it must be (DPPO), is corrected by that ratio and stays.

    Example:
        >>> corrected(load_config(None, ["train.max_staleness=1"])).grpo.correction
        'tis'
    """
    objective = config.grpo
    said = objective.model_fields_set
    by_ratio = objective.loss == "dppo" or ("trust" in said and objective.trust == "sampler")
    if not config.train.max_staleness or "correction" in said or by_ratio:
        return config
    values = objective.model_dump() | {"trust": "proximal", "correction": "tis"}
    return config.model_copy(update={"grpo": type(objective)(**values)})


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
