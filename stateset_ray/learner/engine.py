"""DeepSpeed for one rank: the only file that knows it.

Choices, each for a reason found in DeepSpeed's source (0.19):

* `managed_gradient_accumulation: false`: the caller owns the accumulation boundary, `backward` any number
  of times, then `step`. With the managed counter, ZeRO 1 and 2 keep the last micro-batch only when the
  number of micro-batches differs from the configured one; here it differs from step to step.
* Gradients are averaged over ranks (summing is refused with ZeRO 3), while our losses are divided by a
  global token count: `backward` multiplies by the number of ranks, so that what is applied is the sum.
* A client `torch.optim.AdamW`: DeepSpeed's own compiles an extension on first use.
* The shared-memory all-reduce of its CPU backend is switched off: it compiles at start, even for one rank,
  and a process killed during that build blocks every later one for ever.
* Stage 0 is not offered: with bfloat16 it takes a phantom optimizer step, and it reports no gradient norm.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from stateset_ray.config import LearnerConfig
from stateset_ray.errors import CheckpointError, LearnerError
from stateset_ray.learner.batch import PackedBatch
from stateset_ray.models import CausalRows, Hardware, state_tensors
from stateset_ray.policies.weights import encode

__all__ = ["DeepSpeedEngine", "StepResult", "ragged_logits"]

_REDUCE_BUCKET = 16_000_000
"""Elements that ZeRO 1 and 2 copy together and reduce at once (its default, 5e8, is 2 GB in float32)."""

_GATHER_BYTES = 1 << 30
"""How much of a ZeRO-3 model is whole at one time while it is exported."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: L2 norm of the step's whole gradient, before clipping.
        applied: False if a gradient was not finite; then no weight has changed.
    """

    grad_norm: float
    applied: bool


def ragged_logits(model: Any, packed: PackedBatch, device: str) -> torch.Tensor:
    """The logits [M, V] that predict the masked tokens of a packed batch; no others are computed."""
    output = model(
        input_ids=torch.from_numpy(packed.input_ids).to(device),
        position_ids=torch.from_numpy(packed.position_ids).to(device),
        rows=CausalRows(packed.lengths),
        use_cache=False,
        logits_to_keep=torch.from_numpy(packed.logit_indices).to(device),
    )
    logits: torch.Tensor = output.logits[0]
    return logits


class DeepSpeedEngine:
    """One rank's share of model, gradients and optimizer. Every method is called on ALL ranks.

    Args:
        model: a ragged causal language model (`models.load_model`); it belongs to the engine from now on.
        config: the `[learner]` section.
        hardware: where this rank computes; gloo on CPUs, NCCL on GPUs.
        rank: of `world` ranks.
        master: host and port of rank 0. Port 0 picks a free one where `world` is 1. Each group needs a
            port of its own: on a port used before, a quick rank may meet the store of the last group.

    Raises:
        LearnerError: the ranks do not find each other within `learner.timeout`.
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
        self.rank = rank
        self.world = world
        self._config = config
        self._hardware = hardware
        # ZeRO 3 empties the parameters, and tied ones can no longer be told apart: name them before.
        self._names = {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state_tensors(model).items()
        }
        _prepare_for_training(model, config.gradient_checkpointing)
        deepspeed = _start_deepspeed(hardware, rank, world, master, config.timeout)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        with redirect_stdout(sys.stderr):  # its bfloat16 optimizer prints
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=_deepspeed_config(config, hardware.dtype, model.config.hidden_size),
                dist_init_required=False,
            )
        self._gather = deepspeed.zero.GatheredParameters if config.zero_stage == 3 else None
        self._pristine = True

    def forward(self, packed: PackedBatch) -> torch.Tensor:
        """The logits [M, V] of a packed batch, with gradient."""
        return ragged_logits(self._engine, packed, self._hardware.device)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss; what `step` applies is the sum over calls and ranks."""
        self._pristine = False
        self._engine.backward(loss * self.world)

    def step(self, learning_rate: float) -> StepResult:
        """Clip the summed gradient to `learner.max_grad_norm`, apply it and clear it."""
        self._pristine = False
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepResult(float("nan") if norm is None else float(norm), self._engine.was_step_applied())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, in place."""
        torch.distributed.all_reduce(tensor)
        return tensor

    def export(self) -> dict[str, npt.NDArray[Any]]:
        """Weights by name, tied ones once (`models.state_tensors`), encoded as in `policies.weights`.

        Under ZeRO 3, buckets are gathered one after the other, so that no rank ever holds the whole model
        on its device.

        Returns:
            Copies in main memory on rank 0; {} on the others.
        """
        tensors = _tensors_by_name(self._engine.module, self._names)
        exported: dict[str, npt.NDArray[Any]] = {}
        with torch.no_grad():
            for bucket in self._buckets():
                parameters = [tensors[name] for name in bucket if hasattr(tensors[name], "ds_id")]
                with self._gather(parameters) if self._gather and parameters else nullcontext():
                    if self.rank == 0:
                        exported |= {name: encode(tensors[name]) for name in bucket}
        return exported

    def _buckets(self) -> Iterator[list[str]]:
        bucket: list[str] = []
        size = 0
        for name, (shape, dtype) in self._names.items():
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if bucket and size + nbytes > _GATHER_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += nbytes
        yield bucket

    def save(self, folder: str | Path, tag: str) -> None:
        """Write weights, optimizer and master weights to `folder/tag`; each rank writes its own share.

        `folder` must be visible to all ranks. Whoever owns the folder makes it durable and names it.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._pristine = False
        target = Path(folder) / tag
        try:
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
            if self.rank == 0:
                (target / "layout.json").write_text(json.dumps(self._layout()), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the engine state cannot be written: {error}", given=str(target)
            ) from error
        torch.distributed.barrier()

    def load(self, folder: str | Path, tag: str) -> None:
        """Continue from what `save` wrote; only as the first thing that a new engine does.

        The hyper-parameters of this engine's configuration win over those in the checkpoint.

        Raises:
            CheckpointError: it is missing, incomplete, of another layout or unreadable, or this engine
                has been used already.
        """
        target = Path(folder) / tag
        self._check_loadable(target)
        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        except Exception as error:  # DeepSpeed raises bare assertions and pickling errors here
            raise CheckpointError(f"the engine state cannot be read: {error}", given=str(target)) from error
        if path is None:
            raise CheckpointError("DeepSpeed found no state here", given=str(target))
        for group in self._engine.optimizer.param_groups:
            group["betas"] = tuple(self._config.betas)
            group["weight_decay"] = self._config.weight_decay
        self._pristine = False

    def _check_loadable(self, target: Path) -> None:
        if not self._pristine:
            raise CheckpointError("state can only be loaded into a new engine", mend="build a new learner")
        try:
            saved = json.loads((target / "layout.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                "there is no complete engine state here", given=str(target), mend="choose another checkpoint"
            ) from error
        if saved != self._layout():
            raise CheckpointError(
                f"the engine state was written by {saved}, this learner is {self._layout()}",
                given=str(target),
                mend="set learner.ranks, learner.zero_stage and model.dtype as they were, or start a new "
                "run with model.name = the checkpoint's model folder",
            )
        # Where a rank's share is missing, DeepSpeed goes on without optimizer state and only warns.
        shares = len(list(target.glob("*_optim_states.pt")))
        if shares != self.world:
            raise CheckpointError(
                f"the engine state holds {shares} of {self.world} ranks' shares", given=str(target)
            )

    def _layout(self) -> dict[str, Any]:
        dtype = str(self._hardware.dtype).removeprefix("torch.")
        return {"ranks": self.world, "zero_stage": self._config.zero_stage, "dtype": dtype}

    def destroy(self) -> None:
        """Free the model and leave the process group; the engine cannot be used afterwards."""
        import deepspeed.comm.comm as comm

        self._engine.destroy()
        del self._engine
        gc.collect()
        if torch.distributed.is_initialized():
            comm.destroy_process_group()
            comm.cdb = None  # else the next engine of this process would find a dead backend


def _tensors_by_name(model: Any, names: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    every = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {name: every[name] for name in names}


def _prepare_for_training(model: Any, checkpointing: bool) -> None:
    model.train()  # transformers checkpoints in training mode only
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()  # the policy that is trained must be the one that sampled
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def _deepspeed_config(config: LearnerConfig, dtype: torch.dtype, hidden: int) -> dict[str, Any]:
    mixed = dtype == torch.bfloat16
    zero = {
        "stage": config.zero_stage,
        "reduce_bucket_size": _REDUCE_BUCKET,
        "allgather_bucket_size": _REDUCE_BUCKET,
        # Without managed accumulation DeepSpeed overlaps with partitioned gradients only.
        "overlap_comm": config.zero_stage == 3,
        # Norms and biases stay whole: gathering them costs more than it saves (transformers' own value).
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
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
