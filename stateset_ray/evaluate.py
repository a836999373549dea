"""Evaluate a model or a checkpoint on held-out tasks, with rollout workers and no learner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stateset_ray.actors.evaluation import evaluate_heldout
from stateset_ray.actors.placement import cluster, place
from stateset_ray.actors.rollout_pool import rollout_pool
from stateset_ray.checkpoint import open_checkpoint
from stateset_ray.config import Config, load_config
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


def trained_config(path: str, overrides: list[str]) -> Config:
    """The configuration that a run or checkpoint was trained with, with its weights as `model.name`.

    Args:
        path: a run folder, a checkpoint folder, or a TOML file (taken as it is).
        overrides: `section.key=value` settings on top.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: a setting is wrong.
    """
    if Path(path).is_file():
        return load_config(path, overrides)
    found = open_checkpoint(Path(path))
    config = load_config(found.path.parent.parent / "config.toml")
    return config.with_overrides([f"model.name={json.dumps(str(found.path.absolute()))}", *overrides])
