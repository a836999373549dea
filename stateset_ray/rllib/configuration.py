"""GRPOConfig: our configuration in RLlib's words."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.utils import force_list
from ray.tune.result import STDERR_FILE, STDOUT_FILE, TRIAL_INFO

from stateset_ray.actors.placement import import_paths
from stateset_ray.config import Config, corrected, load_config
from stateset_ray.errors import ConfigError
from stateset_ray.rllib.environment import environment_of, portable_spec
from stateset_ray.rllib.words import (
    ATTRIBUTE_OF,
    CALLED,
    KEPT,
    KEY_OF,
    SECTIONS,
    check_callbacks,
    leaves_of,
    refuse,
)
from stateset_ray.settings import leaves, validated

__all__ = ["NAMES", "GRPOConfig"]

NAMES = ("StatesetGRPO", "GRPO")
"""What Ray Tune knows the algorithm by."""

_OF_TUNE = (STDOUT_FILE, STDERR_FILE)
"""What Tune leaves in the configuration of a trial, for its own Trainable."""

_ENDLESS = 1_000_000
"""Steps of a run that nobody gave an end: RLlib's users and Tune decide when to stop."""


class GRPOConfig(AlgorithmConfig):
    """What GRPO is built from.

    RLlib's own settings, as far as they mean something here, and `training(section={...})` for every setting
    of ours. What means nothing is refused by name, whichever way it is given; values are checked when the
    algorithm is built, so that they may be search spaces of Ray Tune until then.

    Example:
        >>> config = (
        ...     GRPOConfig()
        ...     .environment("stateset_ray.environments.echo:Echo", env_config={"length": 2})
        ...     .env_runners(num_env_runners=2)
        ...     .training(lr=1e-4, model="tiny", grpo={"group_size": 4})
        ... )
        >>> config.settings().rollout.workers, config.settings().learner.learning_rate
        (2, 0.0001)
    """

    builds: ClassVar[Any] = None
    """The algorithm's class. The package sets it, since each of the two names the other."""

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or self.builds)
        for section in SECTIONS:
            setattr(self, section, {})
        defaults = Config()
        for key, value in leaves(defaults.model_dump(mode="json")):
            if name := ATTRIBUTE_OF.get(key):
                setattr(self, name, value)
        self.env: Any = None
        self.env_config: Any = {}
        self.env_spec = ("", "")
        self.import_paths = import_paths()  # of who writes this, for the process of a trial
        self.evaluation_interval: int | None = None
        self.create_local_env_runner = False  # no copy of the model in this process

    # -- from and to our configuration -------------------------------------------------------------

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """What a TOML file of ours says, with `section.key=value` overrides on top.

        Raises:
            ConfigError: as `stateset_ray.config.load_config` does.
        """
        loaded = load_config(path, overrides)
        self = cls()
        # What nobody set stays unset, so that what follows from it (`config.corrected`) still can.
        tree = loaded.model_dump(mode="json", exclude_unset=True)
        tree.pop("environment", None)
        self.environment(loaded.environment.path, env_config=loaded.environment.options)
        self.training(**tree)
        self.evaluation_interval = loaded.train.evaluate_every or None
        return self

    def settings(self) -> Config:
        """This configuration as ours, checked as a whole.

        Raises:
            ConfigError: every problem found, with its key, the value given and the nearest key.
        """
        sys.path += [path for path in self.import_paths if path not in sys.path]
        tree: dict[str, Any] = {section: copy.deepcopy(getattr(self, section)) for section in SECTIONS}
        for name, key in KEY_OF.items():
            _put(tree, key, getattr(self, name))
        id, spec = self.env_spec  # of another environment, if `env` was set past environment()
        path, options = environment_of(self.env, self.env_config, spec if id == self.env else "")
        tree["environment"] = {"path": path, "options": options}
        if self.num_cpus_per_learner == "auto":
            del tree["cluster"]["learner_cpus"]
        tree["run"]["seed"] = self.seed or 0
        tree["train"]["evaluate_every"] = 0  # evaluation_interval counts iterations, and RLlib evaluates
        if self.evaluation_config and not self.evaluation_config["explore"]:
            tree["evaluate"]["temperature"] = 0.0
        tree["train"].setdefault("steps", _ENDLESS)
        self._check_together(tree)
        return corrected(validated(Config, tree, "GRPOConfig"))

    def _check_together(self, tree: Mapping[str, Any]) -> None:
        for name in ("num_env_runners", "num_learners"):
            if getattr(self, name) == 0:
                raise ConfigError(
                    f"{name} = 0 would put the model into this process, where nothing could restart it",
                    given=0,
                    mend=f"set {name}=1 or more",
                )
        if self.grad_clip is None:
            raise ConfigError("grad_clip = None: gradients are always clipped", mend="set a large norm, 1e9")
        every = self.evaluation_interval
        if every is not None and (not isinstance(every, int) or every < 0):
            raise ConfigError("evaluation_interval counts iterations", given=every, mend="1, 2, ... or None")
        if every and not self.evaluation_duration:
            raise ConfigError(
                "evaluation_interval is set, but evaluation_duration = 0 leaves nothing to play"
            )
        if tree["learner"].get("schedule", "constant") != "constant" and tree["train"]["steps"] == _ENDLESS:
            raise ConfigError(
                f"the {tree['learner']['schedule']} schedule needs an end",
                mend="set training(train={'steps': ...})",
            )

    def validate(self) -> None:
        """Refuse what means nothing here, then check the rest as a whole.

        Raises:
            ConfigError: with the names.
        """
        mine, defaults = self.to_dict(), type(self)().to_dict()
        acts = {"class", "callbacks", *_OF_TUNE, *KEPT}  # RLlib leaves "class" among the properties of a copy
        others = {name: value for name, value in mine.items() if name not in acts}
        refuse("", [n for n, value in others.items() if not _same(value, defaults.get(n, NotProvided))])
        check_callbacks(force_list(self.callbacks_class))
        self._check_evaluation(self.evaluation_config)
        self.settings()

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> Self:
        """Take over properties by name, as Ray Tune does; sections of ours are merged.

        Raises:
            ConfigError: a property is unknown, or means nothing here.
        """
        defaults = type(self)().to_dict()
        refused = []
        for name, value in config_dict.items():
            key = self._translate_special_keys(name, warn_deprecated=False)
            if key in SECTIONS:
                self.training(**{key: value})
            elif key in KEPT or key in _OF_TUNE:
                setattr(self, key, value)
            elif key != TRIAL_INFO and not (name in defaults and _same(value, defaults[name])):
                refused.append(name)
        refuse("", refused)
        return self

    # -- RLlib's methods ---------------------------------------------------------------------------

    def environment(self, env: Any = NotProvided, *, env_config: Any = NotProvided, **other: Any) -> Self:
        refuse("environment", other)
        if isinstance(env_config, Mapping) and env_config.keys() != {"grid_search"}:
            env_config = {**self.env_config, **env_config}
        if spec := portable_spec(env):  # for processes in which nobody registers it, a trial's for instance
            self.env_spec = (env, spec)
        return self._take(env=env, env_config=env_config)

    def env_runners(
        self, *, num_env_runners: Any = NotProvided, num_envs_per_env_runner: Any = NotProvided,
        num_cpus_per_env_runner: Any = NotProvided, num_gpus_per_env_runner: Any = NotProvided, **other: Any,
    ) -> Self:  # fmt: skip
        refuse("env_runners", other)
        return self._take(
            num_env_runners=num_env_runners, num_envs_per_env_runner=num_envs_per_env_runner,
            num_cpus_per_env_runner=num_cpus_per_env_runner, num_gpus_per_env_runner=num_gpus_per_env_runner,
        )  # fmt: skip

    def learners(
        self, *, num_learners: Any = NotProvided, num_cpus_per_learner: Any = NotProvided,
        num_gpus_per_learner: Any = NotProvided, **other: Any,
    ) -> Self:  # fmt: skip
        refuse("learners", other)
        return self._take(
            num_learners=num_learners, num_cpus_per_learner=num_cpus_per_learner,
            num_gpus_per_learner=num_gpus_per_learner,
        )  # fmt: skip

    def training(self, *, lr: Any = NotProvided, grad_clip: Any = NotProvided, **sections: Any) -> Self:
        """Set learning rate and clipping, and settings of ours by section: `grpo={"group_size": 4}`.

        `model="tiny"` is short for `model={"name": "tiny"}`. Sections are merged with what was set before.

        Raises:
            ConfigError: a name is unknown (the nearest is named), or means nothing here.
        """
        refuse("training", sections.keys() - set(SECTIONS), ["lr", "grad_clip"])
        if isinstance(sections.get("model"), str):
            sections["model"] = {"name": sections["model"]}
        for section, values in sections.items():
            for key, value in leaves_of(section, values):
                if key == "train.evaluate_every":
                    value = value or None
                if name := ATTRIBUTE_OF.get(key):
                    setattr(self, name, value)
                else:
                    merged = {section: copy.deepcopy(getattr(self, section))}
                    _put(merged, key, value)
                    setattr(self, section, merged[section])
        return self._take(lr=lr, grad_clip=grad_clip)

    def evaluation(
        self, *, evaluation_interval: Any = NotProvided, evaluation_duration: Any = NotProvided,
        evaluation_duration_unit: str = "episodes", evaluation_config: Any = NotProvided, **other: Any,
    ) -> Self:  # fmt: skip
        """Evaluate every so many iterations on so many held-out tasks; `{"explore": False}` is greedy.

        Raises:
            ConfigError: a setting is unknown, or means nothing here.
        """
        if evaluation_duration_unit != "episodes":
            raise ConfigError(
                "an evaluation lasts so many episodes: conversations with held-out tasks",
                given=evaluation_duration_unit,
                mend="leave evaluation_duration_unit at 'episodes'",
            )
        refuse("evaluation", other)
        if evaluation_config is not NotProvided:
            self._check_evaluation(evaluation_config)
        return self._take(
            evaluation_interval=evaluation_interval, evaluation_duration=evaluation_duration,
            evaluation_config=evaluation_config,
        )  # fmt: skip

    def _check_evaluation(self, evaluation_config: Any) -> None:
        if evaluation_config and (
            not isinstance(evaluation_config, Mapping) or evaluation_config.keys() != {"explore"}
        ):
            raise ConfigError(
                "an evaluation differs from a rollout in its temperature and tasks only",
                given=evaluation_config,
                mend="give evaluation_config={'explore': False} for greedy replies, and the rest by "
                "training(evaluate={...})",
            )

    def callbacks(self, callbacks_class: Any = NotProvided, **functions: Any) -> Self:
        """Classes of callbacks, or functions by name; those that would never be called are refused.

        Raises:
            ConfigError: with their names.
        """
        refuse("callbacks", functions.keys() - set(CALLED), CALLED)
        if callbacks_class is not NotProvided:
            check_callbacks(force_list(callbacks_class))
        named = {f"callbacks_{name}": function for name, function in functions.items()}
        return self._take(callbacks_class=callbacks_class, **named)

    def resources(
        self, *, num_cpus_for_main_process: Any = NotProvided, placement_strategy: Any = NotProvided,
        custom_resources_for_main_process: Any = NotProvided, **other: Any,
    ) -> Self:  # fmt: skip
        refuse("resources", other)
        return self._take(
            num_cpus_for_main_process=num_cpus_for_main_process, placement_strategy=placement_strategy,
            custom_resources_for_main_process=custom_resources_for_main_process,
        )  # fmt: skip

    def reporting(
        self, *, min_time_s_per_iteration: Any = NotProvided,
        min_train_timesteps_per_iteration: Any = NotProvided,
        min_sample_timesteps_per_iteration: Any = NotProvided, custom_stats_cls_lookup: Any = NotProvided,
        **other: Any,
    ) -> Self:  # fmt: skip
        refuse("reporting", other)
        return self._take(
            min_time_s_per_iteration=min_time_s_per_iteration, stats_cls_lookup=custom_stats_cls_lookup,
            min_train_timesteps_per_iteration=min_train_timesteps_per_iteration,
            min_sample_timesteps_per_iteration=min_sample_timesteps_per_iteration,
        )  # fmt: skip

    def debugging(
        self, *, seed: Any = NotProvided, log_level: Any = NotProvided, log_sys_usage: Any = NotProvided,
        **other: Any,
    ) -> Self:  # fmt: skip
        refuse("debugging", other)
        return self._take(seed=seed, log_level=log_level, log_sys_usage=log_sys_usage)

    def framework(self, framework: Any = "torch", **other: Any) -> Self:
        refuse(
            "framework", other if framework in ("torch", NotProvided) else {"framework": framework, **other}
        )
        return self

    def api_stack(self, **enabled: Any) -> Self:
        refuse("api_stack", [name for name, value in enabled.items() if value is not True])
        return self

    def _take(self, **values: Any) -> Self:
        for name, value in values.items():
            if value is not NotProvided:
                setattr(self, name, value)
        return self


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[leaf] = value


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # arrays and the like: not what was there
        return False


def _refusing(method: str) -> Any:
    def refusing(self: GRPOConfig, **given: Any) -> GRPOConfig:
        refuse(method, given)
        return self

    refusing.__name__ = method
    return refusing


for _method in (
    "checkpointing", "experimental", "fault_tolerance", "multi_agent", "offline_data", "python_environment",
    "rl_module",
):  # fmt: skip
    setattr(GRPOConfig, _method, _refusing(_method))
