"""How fast a step learns, from its number alone."""

from __future__ import annotations

import math
from typing import Literal

from stateset_ray.config import Config

__all__ = ["LossKind", "learning_rate"]

LossKind = Literal["policy", "supervised"]


def learning_rate(config: Config, step: int, loss: LossKind = "policy") -> float:
    """The learning rate of one step, from its number alone, so that a resumed run needs no scheduler.

    Policy steps warm up linearly over `learner.warmup_steps` (step 0 already moves), then stay, fall
    linearly or fall as a half cosine, to 0 after the last of `train.steps`. Supervised steps take
    `train.warm_start.learning_rate` throughout.

    Args:
        step: counted from 0 in each phase.

    Example:
        >>> learning_rate(Config(), step=3)
        1e-05
    """
    if loss == "supervised":
        return config.train.warm_start.learning_rate
    learner, total = config.learner, config.train.steps
    if step < learner.warmup_steps:
        return learner.learning_rate * (step + 1) / learner.warmup_steps
    if learner.schedule == "constant":
        return learner.learning_rate
    done = min(1.0, (step - learner.warmup_steps) / (total - learner.warmup_steps))
    left = 1 - done if learner.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return learner.learning_rate * left
