"""Evaluate a model or a checkpoint on held-out tasks, with rollout workers and no learner."""

from __future__ import annotations

from typing import Any

from stateset_ray.actors.evaluation import evaluate_heldout
from stateset_ray.actors.placement import cluster, place
from stateset_ray.actors.rollout_pool import rollout_pool
from stateset_ray.committed import trained_config
from stateset_ray.config import Config
from stateset_ray.environments.base import build_environment
from stateset_ray.errors import ConfigError
from stateset_ray.models import check_fits, local_folder

__all__ = ["evaluate", "trained_config"]


def evaluate(config: Config) -> dict[str, Any]:
    """Play `evaluate.tasks` held-out tasks with `model.name`; reward, failures, one conversation.

    Raises:
        StatesetError: what is wrong, and how to mend it.
    """
    if not config.evaluate.tasks:
        raise ConfigError("evaluate.tasks is 0: there is nothing to evaluate", mend="set it to 1 or more")
    environment = build_environment(config.environment.path, config.environment.options)
    check_fits(config)
    local_folder(config.model.name)
    with (
        cluster(config, in_turn=True),
        place(config, learners=False) as placement,
        rollout_pool(config, placement) as pool,
    ):
        result = evaluate_heldout(pool, environment, config, lambda: False)
    said = [{"role": m.role, "content": m.content} for m in result.conversation]
    return {**result.as_dict(), "rewards": result.rewards, "conversation": said}
