"""What a sweep may vary, and what its parts cannot do together: refused with the reason, before it begins."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from stateset_ray.config import Config
from stateset_ray.errors import ConfigError
from stateset_ray.settings import unknown_key
from stateset_ray.sweep.sections import SweepConfig
from stateset_ray.sweep.space import Dimension, problem

__all__ = ["HELDOUT", "check_dimension", "check_together", "is_setting", "metric_of"]

HELDOUT = "heldout_reward"
"""The metric that each trial reports of its newest evaluation on held-out tasks."""
_REWARD = "reward_mean"

_NOT_VARIED = {
    "cluster": "where actors sit is not a hyper-parameter",
    "evaluate": "trials that sit different exams cannot be compared",
    "run.dir": "every trial gets a folder of its own in the sweep's",
    "run.mirror": "trials are not sent to shared storage",
    "run.name": "every trial is named by the sweep",
    "rollout.max_workers": "a sweep's trials keep to the room that they were given",
    "train.checkpoint_every": "it changes nothing that is learned",
    "train.evaluate_every": "it changes nothing that is learned",
    "train.keep_checkpoints": "it changes nothing that is learned",
    "train.steps": "trials of different lengths cannot be compared; let a scheduler end them",
}  # fmt: skip


def check_dimension(config: Config, sweep: SweepConfig, dimension: Dimension) -> None:
    """Refuse a dimension whose key does not exist or must not vary, or whose values cannot be."""
    for key in (dimension.key, *dimension.when):
        _check_key(key)
    for refused, reason in _NOT_VARIED.items():
        if dimension.key == refused or dimension.key.startswith(f"{refused}."):
            raise ConfigError(f"{dimension.key} cannot be swept over: {reason}", given=dimension.describe())
    if sweep.scheduler == "pbt" and (reason := _pinned(config, dimension)):
        raise ConfigError(
            f"{dimension.key} cannot be perturbed: {reason}",
            given='sweep.scheduler = "pbt"',
            mend="fix it with --set, or choose another scheduler",
        )
    ends = [problem(config, {dimension.key: value}) for value in dimension.values]
    by_itself = [e for e in ends if e is not None and f"{dimension.key}: " in e.problem]
    options = dimension.kind in ("choice", "grid")
    if by_itself and (options or len(by_itself) == len(ends)):
        raise by_itself[0]


def _check_key(key: str) -> None:
    """Refuse a key that the configuration does not have; below a mapping (options, say) every key goes."""
    if is_setting(key):
        return
    model: Any = Config
    for part in key.split("."):
        if part not in model.model_fields:
            raise ConfigError(f"the search space is wrong: {unknown_key(Config, key)}")
        model = model.model_fields[part].annotation
        if not hasattr(model, "model_fields"):
            raise ConfigError(f"the search space is wrong: {key} is a part of a setting", given=part)
    raise ConfigError(
        f"{key} is a section, not a setting", given=key, mend=f"name one of {', '.join(model.model_fields)}"
    )


def is_setting(key: str) -> bool:
    """Whether this is a value of the configuration, not a section, nor unknown."""
    model: Any = Config
    *sections, name = key.split(".")
    for part in sections:
        field = model.model_fields.get(part)
        if field is None:
            return False
        if "Mapping" in str(field.annotation):
            return True
        model = field.annotation
        if not hasattr(model, "model_fields"):
            return False
    return name in model.model_fields and not hasattr(model.model_fields[name].annotation, "model_fields")


_PERTURBED = {
    "grpo": {
        "advantage", "credit", "gamma", "outcome_weight", "truncated", "overlong_share", "overlong_penalty",
        "refills", "loss", "ratio", "trust", "clip_low", "clip_high", "dual_clip", "sapo_tau_positive",
        "sapo_tau_negative", "log_ratio_penalty", "aggregation", "correction", "correction_level",
        "correction_low", "correction_high", "kl_coef", "kl_estimator", "kl_in", "entropy_coef", "preset",
        "group_size", "reward_weights",
    },
    "learner": {
        "learning_rate", "betas", "weight_decay", "max_grad_norm", "schedule", "warmup_steps",
    },
    "rollout": {"temperature", "max_turns", "max_turn_tokens", "max_sampled_tokens", "on_cut_reply"},
    "train": {"tasks_per_step", "updates_per_step", "oversample"},
}  # fmt: skip
"""What acts anew when a run goes on from a checkpoint, whatever was in force when that was written."""

_PINS = {
    "model": "a checkpoint holds weights of this model",
    "environment": "a checkpoint holds a place among the tasks of this environment",
    "learner": "a checkpoint holds optimizer states of this layout, and a trial the room of its ranks",
    "rollout": "a trial keeps the room and the limits that it began with",
    "train": "what it decides has happened when a checkpoint is taken over, or is asked once in a run",
    "publish": "how weights travel changes nothing that is learned",
    "run": "a checkpoint holds a place in the random numbers of this seed",
    "grpo": "a checkpoint holds the reference as it is",
}


def _pinned(config: Config, dimension: Dimension) -> str:
    """Why a checkpoint that is taken over would not let this setting change; empty if it would."""
    section, _, name = dimension.key.partition(".")
    if name.partition(".")[0] not in _PERTURBED.get(section, ()):
        return _PINS[section]
    if dimension.key == "grpo.kl_coef":
        if config.grpo.kl_target:
            return "with grpo.kl_target it is steered from step to step, and a checkpoint holds where it is"
        if dimension.values[0] <= 0 and dimension.kind not in ("choice", "grid"):
            return "a checkpoint without a reference (grpo.kl_coef = 0) gives none to go on with"
        if dimension.kind in ("choice", "grid") and 0 in dimension.values:
            return "a checkpoint without a reference (grpo.kl_coef = 0) gives none to go on with"
        if dimension.when:
            return "with `when` it would be 0 in some trials, whose checkpoints hold no reference"
    return ""


def check_together(config: Config, sweep: SweepConfig, dimensions: list[Dimension]) -> None:
    """Refuse what the parts of a sweep cannot do together."""
    names = [dimension.name for dimension in dimensions]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given twice: as a section and as a dotted key", given=names)
    if config.rollout.max_workers > config.rollout.workers:
        raise ConfigError(
            f"rollout.max_workers = {config.rollout.max_workers} would take the room of other trials",
            given=config.rollout.workers, mend="set it to 0 for a sweep (--set rollout.max_workers=0)",
        )  # fmt: skip
    if sweep.searcher == "optuna" and find_spec("optuna") is None:
        raise ConfigError(
            "sweep.searcher = 'optuna' needs Optuna, which is not installed", given=sweep.searcher,
            mend="pip install 'stateset-ray[sweep]', or set searcher = 'random'",
        )  # fmt: skip
    if sweep.searcher != "random":
        if sweep.scheduler == "pbt":
            raise ConfigError(
                "population-based training chooses its values itself, beside no searcher",
                given=sweep.searcher, mend='set sweep.searcher = "random", or another scheduler',
            )  # fmt: skip
        if any(dimension.kind == "grid" for dimension in dimensions):
            raise ConfigError(
                "a grid is tried in full, which no searcher does", given=sweep.searcher,
                mend="use choice instead of grid, or searcher = 'random'",
            )  # fmt: skip
    if sweep.scheduler == "pbt":
        points = math.prod(len(d.values) for d in dimensions if d.kind == "grid")
        if points * sweep.samples < 2:
            raise ConfigError(
                "a population needs at least 2 trials", given=sweep.samples, mend="raise samples"
            )
        if sweep.pbt.interval >= config.train.steps:
            raise ConfigError(
                f"sweep.pbt.interval = {sweep.pbt.interval} leaves no comparison within train.steps = "
                f"{config.train.steps}", mend="lower the one or raise the other",
            )  # fmt: skip
    if sweep.scheduler == "asha" and sweep.asha.grace >= config.train.steps:
        raise ConfigError(
            f"sweep.asha.grace = {sweep.asha.grace} lets every trial take all of train.steps = "
            f"{config.train.steps}", mend="lower the one or raise the other",
        )  # fmt: skip


def metric_of(config: Config, sweep: SweepConfig) -> str:
    """What is compared, and whether it is known by then."""
    compared = {"asha": sweep.asha.grace, "pbt": sweep.pbt.interval}.get(sweep.scheduler)
    every = config.train.evaluate_every
    known = config.evaluate.tasks > 0 and (compared is None or bool(every and compared % every == 0))
    if sweep.metric == HELDOUT and not known:
        raise ConfigError(
            "sweep.metric = 'heldout_reward' is not known when trials are compared",
            given=f"evaluate.tasks = {config.evaluate.tasks}, train.evaluate_every = {every}",
            mend=f"set evaluate.tasks above 0 and train.evaluate_every to {compared or 'what you like'}",
        )
    return sweep.metric or (HELDOUT if known else _REWARD)
