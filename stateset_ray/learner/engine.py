"""Which engine trains: DeepSpeed, or plain PyTorch. What an engine is: `learner.protocol`."""

from __future__ import annotations

from typing import Any

from stateset_ray.config import LearnerConfig
from stateset_ray.learner.protocol import LearnerEngine, Scores, StepResult
from stateset_ray.models import Hardware

__all__ = ["LearnerEngine", "Scores", "StepResult", "build_engine"]


def build_engine(
    model: Any,
    config: LearnerConfig,
    hardware: Hardware,
    rank: int,
    world: int,
    master: tuple[str, int],
) -> LearnerEngine:
    """The engine that `learner.engine` names.

    Args:
        model: a ragged causal language model (`models.load_model`); it belongs to the engine from now on.
        config: the `[learner]` section.
        hardware: where this rank computes; gloo on CPUs, NCCL on GPUs.
        rank: of `world` ranks.
        master: host and port of rank 0. Port 0 picks a free one where `world` is 1. Each group needs a
            port of its own: on a port used before, a quick rank may meet the store of the last group.

    Raises:
        ConfigError: what shall be trained does not exist in this model.
        LearnerError: the ranks do not find each other within `learner.timeout`.
        ModelError: this model does something between its last layer and its logits that is not known here.
    """
    if config.engine == "torch":
        from stateset_ray.learner.torch_engine import TorchEngine

        return TorchEngine(model, config, hardware, rank, world, master)
    from stateset_ray.learner.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, hardware, rank, world, master)
