"""DeepSpeed for one rank: the only file that knows it, with `deepspeed_universal` beside it.

Choices, each for a reason found in DeepSpeed's source (0.19):

* `managed_gradient_accumulation: false`: the caller owns the accumulation boundary, `backward` any number
  of times, then `step`. With the managed counter, ZeRO 1 and 2 keep the last micro-batch only when the
  number of micro-batches differs from the configured one; here it differs from step to step.
* Gradients are averaged over ranks (summing is refused with ZeRO 3), while our losses are divided by a
  global denominator: `backward` multiplies by the number of ranks, so that what is applied is the sum.
* A client `torch.optim.AdamW`: DeepSpeed's own compiles an extension on first use.
* The shared-memory all-reduce of its CPU backend is switched off: it compiles at start, even for one rank,
  and a process killed during that build blocks every later one for ever.
* Stage 0 reports no gradient norm, and applies gradients that are not finite: clipping and that check are
  ours there, in a hook of the optimizer's, which sees the gradients when they are reduced.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stateset_ray.config import LearnerConfig
from stateset_ray.errors import CheckpointError, ConfigError, LearnerError
from stateset_ray.learner.deepspeed_universal import converted
from stateset_ray.learner.frozen import load_frozen, save_frozen
from stateset_ray.learner.gradients import clip
from stateset_ray.learner.layout import Layout, digest
from stateset_ray.learner.policy_engine import PolicyEngine
from stateset_ray.learner.policy_model import PolicyModel, TokenScores
from stateset_ray.learner.protocol import StepResult
from stateset_ray.models import Hardware

__all__ = ["DeepSpeedEngine"]

_REDUCE_BUCKET = 16_000_000
"""Elements that ZeRO 1 and 2 copy together and reduce at once (its default, 5e8, is 2 GB in float32)."""


class DeepSpeedEngine(PolicyEngine):
    """One rank's share of model, gradients and optimizer; see `learner.engine.build_engine`.

    Raises:
        ConfigError: what shall be trained does not exist in this model.
        LearnerError: the ranks do not find each other within `learner.timeout`.
        ModelError: this model does something between its last layer and its logits that is not known.
    """

    def __init__(
        self,
        model: Any,
        config: LearnerConfig,
        hardware: Hardware,
        rank: int,
        world: int,
        master: tuple[str, int],
    ) -> None:
        if config.zero_stage == 0 and hardware.dtype == torch.bfloat16:
            raise ConfigError(
                "learner.zero_stage = 0 with model.dtype = 'bfloat16' takes a wrong first step in DeepSpeed",
                mend="set zero_stage = 1, also with one rank",
            )
        super().__init__(PolicyModel(model, config), rank, world)
        self._config = config
        self._hardware = hardware
        dtype = str(hardware.dtype).removeprefix("torch.")
        self.layout = Layout("deepspeed", config.zero_stage, dtype, digest(self._policy.describe()), world)
        deepspeed = _start_deepspeed(hardware, rank, world, master, config.timeout)
        if config.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_modules(self._policy, [TokenScores])
        optimizer = torch.optim.AdamW(
            self._policy.trained(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        with redirect_stdout(sys.stderr):  # its bfloat16 optimizer prints
            self._engine, *_ = deepspeed.initialize(
                model=self._policy,
                optimizer=optimizer,
                config=_deepspeed_config(config, hardware.dtype, self._policy),
                dist_init_required=False,
            )
        self._run = self._engine
        self._gathered = deepspeed.zero.GatheredParameters if config.zero_stage == 3 else None
        self._own_step: StepResult | None = None
        if config.zero_stage == 0:
            optimizer.register_step_pre_hook(self._clip)
        self._pristine = True

    def backward(self, loss: torch.Tensor) -> None:
        """See `LearnerEngine.backward`."""
        self._pristine = False
        self._engine.backward(loss * self.world)

    def step(self, learning_rate: float) -> StepResult:
        """See `LearnerEngine.step`."""
        self._pristine = False
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if self._own_step is not None:
            return self._own_step
        norm = self._engine.get_global_grad_norm()
        return StepResult(float("nan") if norm is None else float(norm), self._engine.was_step_applied())

    def hyperparameters(self) -> dict[str, Any]:
        """See `LearnerEngine.hyperparameters`."""
        optimizer = self._engine.optimizer
        group = optimizer.param_groups[0]
        acting = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        own = self._config.zero_stage == 0  # DeepSpeed clips in the other stages
        return acting | {"max_grad_norm": self._config.max_grad_norm if own else optimizer.clip_grad}

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before an optimizer step of stage 0: the gradients are those of the whole step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._own_step = clip(parameters, self._config.max_grad_norm)

    def _gather(self, parameters: list[nn.Parameter], changed: bool) -> AbstractContextManager[Any]:
        divided = [p for p in parameters if hasattr(p, "ds_id")]
        if self._gathered is None or not divided:
            return nullcontext()
        context: AbstractContextManager[Any] = self._gathered(divided, modifier_rank=0 if changed else None)
        return context

    def save(self, folder: str | Path, tag: str) -> None:
        """See `LearnerEngine.save`; each rank writes its own share."""
        self._pristine = False
        target = Path(folder) / tag
        try:
            self._engine.save_checkpoint(
                str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True
            )
            save_frozen(self._policy, self._gather, target, write=self.rank == 0)
            if self.rank == 0:
                self.layout.write(target)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the engine state cannot be written: {error}", given=str(target)
            ) from error
        torch.distributed.barrier()

    def load(self, folder: str | Path, tag: str) -> None:
        """See `LearnerEngine.load`; a state of another number of ranks is converted first."""
        target = Path(folder) / tag
        saved = self._check_loadable(target)
        if saved.ranks == self.world or self._config.zero_stage == 0:
            self._read(target)
        else:
            limit = 0.9 * self._config.timeout  # sooner than those give up who wait for it
            with converted(target, self.rank, (saved.ranks, self.world), limit) as universal:
                self._engine._config.load_universal_checkpoint = True
                try:
                    self._read(universal)
                finally:
                    self._engine._config.load_universal_checkpoint = False
        try:
            load_frozen(self._policy, self._gather, target)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(f"the frozen weights cannot be read: {error}", given=str(target)) from error
        for group in self._engine.optimizer.param_groups:
            group["betas"] = tuple(self._config.betas)
            group["weight_decay"] = self._config.weight_decay
        if self._config.zero_stage > 0:
            self._engine.optimizer.clip_grad = self._config.max_grad_norm
        self._pristine = False

    def _read(self, target: Path) -> None:
        try:
            with redirect_stdout(sys.stderr):
                # Not strict: frozen weights are not in there.
                path, _ = self._engine.load_checkpoint(
                    str(target.parent), tag=target.name, load_module_strict=False
                )
        except Exception as error:  # DeepSpeed raises bare assertions and pickling errors here
            raise CheckpointError(f"the engine state cannot be read: {error}", given=str(target)) from error
        if path is None:
            raise CheckpointError("DeepSpeed found no state here", given=str(target))

    def _check_loadable(self, target: Path) -> Layout:
        if not self._pristine:
            raise CheckpointError("state can only be loaded into a new engine", mend="build a new learner")
        saved = self.layout.check(target)
        # Where a rank's share is missing, DeepSpeed goes on without optimizer state and only warns.
        if self._config.zero_stage > 0:
            shares = len(list(target.glob("*_optim_states.pt")))
            if shares != saved.ranks:
                raise CheckpointError(
                    f"the engine state holds {shares} of {saved.ranks} ranks' shares", given=str(target)
                )
        return saved

    def destroy(self) -> None:
        """See `LearnerEngine.destroy`."""
        import deepspeed.comm.comm as comm

        self._engine.destroy()
        del self._engine, self._run, self._policy
        gc.collect()
        if torch.distributed.is_initialized():
            comm.destroy_process_group()
            comm.cdb = None  # else the next engine of this process would find a dead backend


def _deepspeed_config(config: LearnerConfig, dtype: torch.dtype, policy: PolicyModel) -> dict[str, Any]:
    mixed = dtype == torch.bfloat16
    stage = config.zero_stage
    bucket = _REDUCE_BUCKET
    if stage == 3 and policy.tied:
        # The gradient of a leaf goes into a bucket as soon as the leaf's own backward is done. Where its
        # weight is the embedding's too, more is added later: the bucket must not be reduced before the end.
        bucket = max(bucket, sum(p.numel() for p in policy.trained()))
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": _REDUCE_BUCKET,
        # Without managed accumulation DeepSpeed overlaps with partitioned gradients only.
        "overlap_comm": stage == 3,
        # Norms and biases stay whole: gathering them costs more than it saves (transformers' own value).
        "stage3_param_persistence_threshold": 10 * policy.hidden_size,
    }
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": mixed, "check_grad_overflow": True},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if mixed else {}),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _start_deepspeed(
    hardware: Hardware, rank: int, world: int, master: tuple[str, int], timeout: float
) -> Any:
    """Import DeepSpeed and join the process group, in the order in which both must happen."""
    host, port = master
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",  # each rank is a process of its own that sees its own device as the first
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
    backend: Literal["gloo", "nccl"] = "nccl" if hardware.device == "cuda" else "gloo"
    if backend == "gloo":
        # On a node with GPUs, DeepSpeed would take one although this rank was given none.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise LearnerError(
            f"rank {rank} of {world} could not join the process group: {error}",
            given=f"{host}:{port}",
            mend="check that every rank runs and that its node reaches this host and port",
        ) from error
    return deepspeed
