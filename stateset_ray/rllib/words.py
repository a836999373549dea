"""RLlib's words for our settings, and what to say of those that mean nothing here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback

from stateset_ray.config import Config
from stateset_ray.errors import ConfigError

__all__ = ["ATTRIBUTE_OF", "CALLED", "KEPT", "KEY_OF", "SECTIONS", "check_callbacks", "leaves_of", "refuse"]

KEY_OF: Mapping[str, str] = {
    "env": "environment.path",
    "env_config": "environment.options",
    "num_env_runners": "rollout.workers",
    "num_envs_per_env_runner": "rollout.concurrency",
    "num_cpus_per_env_runner": "cluster.worker_cpus",
    "num_gpus_per_env_runner": "cluster.worker_gpus",
    "num_learners": "learner.ranks",
    "num_cpus_per_learner": "cluster.learner_cpus",
    "num_gpus_per_learner": "cluster.learner_gpus",
    "lr": "learner.learning_rate",
    "grad_clip": "learner.max_grad_norm",
    "evaluation_interval": "train.evaluate_every",
    "evaluation_duration": "evaluate.tasks",
    "seed": "run.seed",
    "placement_strategy": "cluster.strategy",
}
"""RLlib's property -> our key. A setting of both is held under RLlib's name, whichever way it was given."""

ATTRIBUTE_OF: Mapping[str, str] = {key: name for name, key in KEY_OF.items()}

SECTIONS: tuple[str, ...] = tuple(name for name in Config.model_fields if name != "environment")
"""Our sections, which are properties of a GRPOConfig too. The environment is `env` and `env_config`."""

CALLED = (
    "on_algorithm_init", "on_train_result", "on_evaluate_start", "on_evaluate_end", "on_checkpoint_loaded",
    "on_episode_end", "on_sample_end",
)  # fmt: skip
"""Callbacks that are called."""

KEPT: frozenset[str] = frozenset(
    {
        *KEY_OF,
        *SECTIONS,
        "callbacks_class",
        *(f"callbacks_{name}" for name in CALLED),
        "evaluation_config",
        "min_time_s_per_iteration",
        "min_train_timesteps_per_iteration",
        "min_sample_timesteps_per_iteration",
        "stats_cls_lookup",
        "log_level",
        "log_sys_usage",
        "num_cpus_for_main_process",
        "custom_resources_for_main_process",
        "env_spec",
        "import_paths",
    }
)
"""Properties that act."""

_METHODS = (
    "api_stack", "callbacks", "checkpointing", "debugging", "env_runners", "environment", "evaluation",
    "experimental", "fault_tolerance", "framework", "learners", "multi_agent", "offline_data",
    "python_environment", "reporting", "resources", "rl_module", "training",
)  # fmt: skip

_INSTEAD: Mapping[str, str] = {
    "action_space": "actions are text",
    "batch_mode": "whole conversations are played",
    "custom_resources_per_env_runner": "set num_cpus_per_env_runner or num_gpus_per_env_runner",
    "evaluation_num_env_runners": "the same workers evaluate: set num_env_runners",
    "evaluation_parallel_to_training": "the same workers evaluate, between two steps",
    "explore": "set training(rollout={'temperature': ...})",
    "gamma": "set training(grpo={'credit': 'return_to_go', 'gamma': ...})",
    "grad_clip_by": "gradients are clipped by their global norm",
    "minibatch_size": "set training(learner={'micro_batch_tokens': ...})",
    "model_config": "set training(model={...})",
    "num_epochs": "set training(train={'updates_per_step': ...})",
    "num_gpus": "set num_gpus_per_learner or num_gpus_per_env_runner",
    "num_sgd_iter": "set training(train={'updates_per_step': ...})",
    "observation_space": "observations are text",
    "restart_failed_env_runners": "workers are always restarted",
    "rollout_fragment_length": "whole conversations are played",
    "sample_timeout_s": "set training(rollout={'conversation_timeout': ...})",
    "train_batch_size": "set training(train={'tasks_per_step': ...}, grpo={'group_size': ...})",
    "train_batch_size_per_learner": "set training(train={'tasks_per_step': ...}, grpo={'group_size': ...})",
}
"""What to do instead of a setting that many bring along."""


def refuse(method: str, names: Iterable[str], known: Iterable[str] = ()) -> None:
    """Raise the ConfigError that names settings which mean nothing here, if there are any.

    Args:
        method: that they were given to; empty for properties.
        names: of the settings.
        known: further names that mean something, to find the nearest.
    """
    lines = []
    of_rllib = {name for m in _METHODS for name in _parameters(m)} | vars(AlgorithmConfig()).keys()
    for name in sorted(names):
        if name in of_rllib:
            hint = _INSTEAD.get(name.removeprefix("_"))
            lines.append(f"{name} of RLlib has no meaning here" + (f": {hint}" if hint else ""))
        else:
            near = difflib.get_close_matches(name, sorted({*KEPT, *known}), n=1)
            lines.append(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if lines:
        place = f"GRPOConfig.{method}(): " if method else "GRPOConfig: "
        raise ConfigError(place + "; ".join(lines), mend="docs/rllib.md lists what can be set")


def _parameters(method: str) -> list[str]:
    return list(inspect.signature(getattr(AlgorithmConfig, method)).parameters)[1:]


def leaves_of(section: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what was given for a section; values may be search spaces of Ray Tune.

    Raises:
        ConfigError: a key is unknown; the message names the nearest.
    """
    yield from _leaves(Config.model_fields[section].annotation, values, section)


def _leaves(model: Any, values: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} is a section: give a mapping of its settings", given=values)
    for name, value in values.items():
        if name not in model.model_fields:
            near = difflib.get_close_matches(str(name), list(model.model_fields), n=1)
            hint = f"; did you mean {f'{place}.{near[0]}'!r}?" if near else ""
            raise ConfigError(f"unknown key '{place}.{name}'{hint}", given=value)
        inner = model.model_fields[name].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and not _searched(value):
            yield from _leaves(inner, value, f"{place}.{name}")
        else:
            yield f"{place}.{name}", value


def _searched(value: Any) -> bool:
    """Whether this is a search space of Ray Tune, and no mapping of settings."""
    return not isinstance(value, Mapping) or value.keys() == {"grid_search"}


def check_callbacks(classes: Iterable[type]) -> None:
    """Refuse callbacks that nobody would call, by name.

    Raises:
        ConfigError: a class overrides one.
    """
    hooks = [name for name in vars(RLlibCallback) if name.startswith("on_") and name not in CALLED]
    for cls in classes:
        never = [n for n in hooks if getattr(cls, n, None) not in (None, getattr(RLlibCallback, n))]
        if never:
            raise ConfigError(
                f"{cls.__name__} has callbacks that are never called here: {', '.join(never)}",
                mend=f"conversations are played in other processes; called are {', '.join(CALLED)}",
            )
