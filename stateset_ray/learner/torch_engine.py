"""Plain PyTorch: every rank holds the whole model, gradients are summed. Short enough to be believed.

It is what the other engine is compared with, and the leanest engine for one rank: weights, gradients and
two moments, and nothing else that grows with the model. Weights in bfloat16 have master weights and
gradients in float32 beside them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from stateset_ray.config import LearnerConfig
from stateset_ray.errors import CheckpointError, LearnerError
from stateset_ray.learner.gradients import clip
from stateset_ray.learner.layout import Layout, digest
from stateset_ray.learner.policy_engine import PolicyEngine
from stateset_ray.learner.policy_model import PolicyModel
from stateset_ray.learner.protocol import StepResult
from stateset_ray.models import Hardware

__all__ = ["TorchEngine"]

_BUCKET = 16_000_000
"""Elements of gradients that are copied together and summed at once."""

_FILE = "state.pt"


class TorchEngine(PolicyEngine):
    """One rank; see `learner.engine.build_engine`.

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
        super().__init__(PolicyModel(model, config), rank, world)
        self._config = config
        dtype = str(hardware.dtype).removeprefix("torch.")
        self.layout = Layout("torch", 0, dtype, digest(self._policy.describe()), world)
        _join(hardware, rank, world, master, config.timeout)
        self._trained = self._policy.trained()
        # In float32 the master of a weight is the weight itself.
        self._masters = [_master(parameter) for parameter in self._trained]
        self._optimizer = torch.optim.AdamW(
            self._masters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._pristine = True

    def backward(self, loss: torch.Tensor) -> None:
        """See `LearnerEngine.backward`."""
        self._pristine = False
        loss.backward()

    def step(self, learning_rate: float) -> StepResult:
        """See `LearnerEngine.step`."""
        self._pristine = False
        self._sum_over_ranks()
        result = clip(self._masters, self._config.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if result.applied:
            self._optimizer.step()
            self._publish()
        self._optimizer.zero_grad(set_to_none=True)
        return result

    def hyperparameters(self) -> dict[str, Any]:
        """See `LearnerEngine.hyperparameters`."""
        group = self._optimizer.param_groups[0]
        acting = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        return acting | {"max_grad_norm": self._config.max_grad_norm}

    @torch.no_grad()
    def _sum_over_ranks(self) -> None:
        if self.world == 1:
            return
        for bucket in self._buckets():
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def _buckets(self) -> Iterator[list[torch.Tensor]]:
        bucket: list[torch.Tensor] = []
        for master in self._masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)  # another rank may have one
            if bucket and sum(g.numel() for g in bucket) + master.numel() > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(master.grad)
        yield bucket

    @torch.no_grad()
    def _publish(self) -> None:
        """Give every weight the value of its master."""
        for parameter, master in zip(self._trained, self._masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def save(self, folder: str | Path, tag: str) -> None:
        """See `LearnerEngine.save`; rank 0 writes, for all ranks are alike."""
        self._pristine = False
        target = Path(folder) / tag
        try:
            if self.rank == 0:
                target.mkdir(parents=True, exist_ok=True)
                state = {
                    "weights": self._policy.state_dict(),
                    "masters": [m for p, m in zip(self._trained, self._masters, strict=True) if p is not m],
                    "optimizer": self._optimizer.state_dict(),
                }
                torch.save(state, target / _FILE)
                self.layout.write(target)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the engine state cannot be written: {error}", given=str(target)
            ) from error
        torch.distributed.barrier()

    def load(self, folder: str | Path, tag: str) -> None:
        """See `LearnerEngine.load`."""
        target = Path(folder) / tag
        if not self._pristine:
            raise CheckpointError("state can only be loaded into a new engine", mend="build a new learner")
        self.layout.check(target)
        try:
            state = torch.load(target / _FILE, map_location="cpu", mmap=True, weights_only=True)
            self._policy.load_state_dict(state["weights"])
            self._optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(f"the engine state cannot be read: {error}", given=str(target)) from error
        with torch.no_grad():
            apart = [m for p, m in zip(self._trained, self._masters, strict=True) if p is not m]
            for master, saved in zip(apart, state["masters"], strict=True):
                master.copy_(saved)
        for moments in self._optimizer.state.values():
            for name, value in moments.items():
                moments[name] = value.clone()  # it lies in the file still, which may go away
        for group in self._optimizer.param_groups:
            group["betas"] = tuple(self._config.betas)
            group["weight_decay"] = self._config.weight_decay
        self._pristine = False

    def destroy(self) -> None:
        """See `LearnerEngine.destroy`."""
        del self._policy, self._run, self._optimizer, self._trained, self._masters
        gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.detach().float()

    @torch.no_grad()
    def move_gradient(parameter: torch.Tensor) -> None:
        # Summed in float32: many micro-batches would lose bits in bfloat16.
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        master.grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(move_gradient)
    return master


def _join(hardware: Hardware, rank: int, world: int, master: tuple[str, int], timeout: float) -> None:
    host, port = master
    try:
        torch.distributed.init_process_group(
            "nccl" if hardware.device == "cuda" else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise LearnerError(
            f"rank {rank} of {world} could not join the process group: {error}",
            given=f"{host}:{port}",
            mend="check that every rank runs and that its node reaches this host and port",
        ) from error
