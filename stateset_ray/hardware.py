"""The hardware that a model runs on: the one place that decides device, dtype and threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from stateset_ray.config import ModelConfig
from stateset_ray.errors import ConfigError

__all__ = ["Hardware", "choose_hardware"]


@dataclass(frozen=True)
class Hardware:
    """Where and how a model computes.

    Float32 on CPUs (bfloat16 without special instructions is some 77 times slower there), bfloat16 on
    GPUs, unless the configuration says otherwise.
    """

    device: str
    dtype: torch.dtype
    threads: int

    def apply(self) -> None:
        """Set this process's torch threads."""
        torch.set_num_threads(self.threads)

    def give_back(self) -> None:
        """Let other processes have the GPU memory that torch holds in reserve; on a CPU there is none."""
        if self.device != "cpu":
            torch.cuda.empty_cache()


def choose_hardware(config: ModelConfig, gpus: float, peers: int = 1) -> Hardware:
    """Decide device, dtype and threads of one actor.

    Args:
        config: the `[model]` section.
        gpus: GPUs that Ray gave this actor.
        peers: actors of the same role that compute at the same time and share the machine's cores.

    Raises:
        ConfigError: a GPU was demanded and there is none.
    """
    wanted = config.device
    device = ("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device asks for a GPU, and torch sees none",
            given=wanted,
            mend="set model.device='auto', or cluster.learner_gpus and worker_gpus on a machine with GPUs",
        )
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    auto = torch.bfloat16 if device == "cuda" else torch.float32
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // max(1, peers))
    return Hardware(device, dtypes.get(config.dtype, auto), threads)
