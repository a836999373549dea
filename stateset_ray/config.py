"""The knobs: one page of frozen models, read from TOML and `--set section.key=value`.

Everything is checked here, before anything heavy loads. Every default is a value that works on a laptop.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import model_validator

from stateset_ray.errors import ConfigError
from stateset_ray.objective import ObjectiveConfig, beside_preset, beside_staleness
from stateset_ray.sections import (
    ClusterConfig,
    EnvironmentConfig,
    EvaluateConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    PublishConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TrainConfig,
    WarmStartConfig,
)
from stateset_ray.settings import apply_override, validated

__all__ = [
    "ClusterConfig",
    "Config",
    "EnvironmentConfig",
    "EvaluateConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PublishConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "WarmStartConfig",
    "corrected",
    "load_config",
]


class Config(Section):
    """The whole configuration of a run.

    Example:
        >>> Config().grpo.group_size
        8
    """

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: ObjectiveConfig = ObjectiveConfig()
    learner: LearnerConfig = LearnerConfig()
    train: TrainConfig = TrainConfig()
    publish: PublishConfig = PublishConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        rollout, learner = self.rollout, self.learner
        _check_learner(learner, self.model)
        if learner.attention == "flex" and (self.model.device == "cpu" or not self.cluster.learner_gpus):
            raise ValueError(
                "learner.attention = 'flex' has no backward pass on a CPU: set cluster.learner_gpus and "
                "leave model.device at 'auto', or set attention = 'sdpa'"
            )
        if learner.lora.rank and self.grpo.reference_every:
            raise ValueError(
                "grpo.reference_every cannot move the reference under learner.lora, where it is the model "
                "below the adapters: set one of them to 0"
            )
        if rollout.engine_kind == "vllm":
            _check_vllm(rollout.temperature, self.evaluate.temperature)
        if rollout.sleep and (self.train.max_staleness or rollout.engine_kind == "vllm"):
            raise ValueError(
                "rollout.sleep is for transformers engines that wait while the learner computes: set "
                "train.max_staleness = 0 and rollout.engine_kind = 'transformers', or sleep = false"
            )
        if rollout.engines and self.cluster.worker_gpus:
            raise ValueError(
                f"cluster.worker_gpus = {self.cluster.worker_gpus} would lie idle: with rollout.engines = "
                f"{rollout.engines} the workers have no model; set cluster.engine_gpus instead"
            )
        if self.cluster.engine_gpus and not rollout.engines:
            raise ValueError(
                f"cluster.engine_gpus = {self.cluster.engine_gpus} is for no one: set rollout.engines, or "
                "cluster.worker_gpus for the engines inside the workers"
            )
        if self.publish.transport == "collective" and not rollout.engines:
            raise ValueError(
                "publish.transport = 'collective' broadcasts to engines apart from the workers: set "
                "rollout.engines, or leave the transport at 'object_store'"
            )
        if self.publish.folder and self.publish.transport != "folder":
            raise ValueError(
                f"publish.folder = {self.publish.folder!r} is for no one: publish.transport is "
                f"{self.publish.transport!r}, not 'folder'"
            )
        if self.train.updates_per_step > self.train.tasks_per_step:
            raise ValueError(
                f"train.updates_per_step = {self.train.updates_per_step} needs at least as many groups: "
                f"train.tasks_per_step is {self.train.tasks_per_step}"
            )
        trajectories = self.train.tasks_per_step * self.grpo.group_size
        if trajectories % learner.ranks:
            raise ValueError(
                f"train.tasks_per_step * grpo.group_size = {trajectories} trajectories a step cannot be "
                f"divided among learner.ranks = {learner.ranks}: change one of the three"
            )
        if rollout.max_turn_tokens >= rollout.max_context:
            raise ValueError(
                f"rollout.max_turn_tokens = {rollout.max_turn_tokens} leaves no room for a prompt in "
                f"rollout.max_context = {rollout.max_context}: make it smaller"
            )
        if learner.micro_batch_tokens < rollout.max_context:
            raise ValueError(
                f"learner.micro_batch_tokens = {learner.micro_batch_tokens} cannot hold one conversation "
                f"of rollout.max_context = {rollout.max_context} tokens: make it at least that"
            )
        if rollout.turn_timeout > rollout.conversation_timeout:
            raise ValueError(
                f"rollout.turn_timeout = {rollout.turn_timeout} s is longer than "
                f"rollout.conversation_timeout = {rollout.conversation_timeout} s"
            )
        if learner.schedule != "constant" and learner.warmup_steps >= self.train.steps:
            raise ValueError(
                f"learner.warmup_steps = {learner.warmup_steps} leaves nothing of "
                f"train.steps = {self.train.steps} for the {learner.schedule} schedule"
            )
        return self

    def to_toml(self) -> str:
        """This configuration as TOML; `load_config` reads it back to an equal object."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def with_overrides(self, overrides: Iterable[str]) -> Config:
        """A copy with `section.key=value` settings applied and everything checked again.

        Raises:
            ConfigError: a setting is malformed, unknown or out of range.
        """
        return validated(Config, _overridden(self.model_dump(mode="json"), overrides), "--set")


def _overridden(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    settings = list(overrides)
    if any(setting.partition("=")[0].strip() == "grpo.preset" for setting in settings):
        tree = tree | {"grpo": beside_preset(tree.get("grpo", {}))}
    if any(setting.partition("=")[0].strip() == "train.max_staleness" for setting in settings):
        stale = bool(tree.get("train", {}).get("max_staleness", 0))
        tree = tree | {"grpo": beside_staleness(tree.get("grpo", {}), stale=stale)}
    for setting in settings:
        apply_override(tree, setting)
    return tree


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


def _check_learner(learner: LearnerConfig, model: ModelConfig) -> None:
    """Refuse what the learner's engines cannot do together."""
    zero, offload = learner.zero_stage, learner.offload
    for wrong, problem in (
        (
            zero == 0 and model.dtype == "bfloat16" and learner.engine == "deepspeed",
            "learner.zero_stage = 0 with model.dtype = 'bfloat16' takes a wrong first step in DeepSpeed: "
            "set zero_stage = 1, also with one rank",
        ),
        (
            offload != "none" and learner.engine == "torch",
            f"learner.offload = {offload!r} needs learner.engine = 'deepspeed'",
        ),
        (offload == "optimizer" and zero == 0, "learner.offload = 'optimizer' needs learner.zero_stage >= 1"),
        (offload == "all" and zero != 3, f"learner.offload = 'all' needs zero_stage = 3, not {zero}"),
        (
            learner.lora.rank > 0 and bool(learner.freeze),
            "learner.freeze beside learner.lora: with adapters everything else is frozen already",
        ),
    ):
        if wrong:
            raise ValueError(problem)


def _check_vllm(sampling: float, evaluation: float) -> None:
    """Refuse temperatures that vLLM would not sample at: below 0.01 it takes 0.01, without saying so."""
    for key, heat in (("rollout", sampling), ("evaluate", evaluation)):
        if heat and not 0.01 <= heat <= 2:
            raise ValueError(
                f"{key}.temperature = {heat} is outside of 0.01 to 2, where rollout.engine_kind = 'vllm' "
                "samples: change it, or set engine_kind = 'transformers'"
            )


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (or nothing) and apply `section.key=value` overrides on top.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value is wrong; the message names
            the key, the value given and the nearest key that exists.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            _refuse_pipe(Path(path))
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(
                f"the configuration file cannot be read: {error.strerror}",
                given=str(path),
                mend="give the path of a TOML file, for example examples/quickstart.toml",
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the configuration file is not valid TOML: {error}", given=str(path)
            ) from error
        if not tree and (Path(path).parent / "checkpoints").is_dir():
            raise ConfigError(
                "the configuration of this run is empty", given=str(path),
                mend="restore the file: without it, nobody knows what the run was trained with",
            )  # fmt: skip
    return validated(Config, _overridden(tree, overrides), str(path) if path else "--set")


def _refuse_pipe(path: Path) -> None:
    """A named pipe is read for ever where nobody writes; those of a shell lie in /dev."""
    if path.is_fifo() and not path.is_relative_to("/dev"):
        raise ConfigError(
            "the configuration cannot be read from a named pipe", given=str(path), mend="give a TOML file"
        )
