"""How much memory a run will take, from its configuration and the model's shape alone.

An estimate to be warned by, not a promise; no weights are loaded and nothing is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stateset_ray.config import Config
from stateset_ray.models import choose_hardware, config_only, count_parameters

__all__ = ["Memory", "expected_memory", "size"]

_GIB = 2**30
_PROCESS = 350 * 2**20  # of the controller or an actor before its model: Python, torch, Ray
_RAY = 512 * 2**20  # of Ray's own processes on one node
_BUCKET = 16_000_000  # elements of the learner's reduce buckets (`learner.engine`)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run is expected to take, on the device for learners and engines.

    Attributes:
        learner_state: weights, gradients and optimizer of one rank, at their peak.
        activations: what one micro-batch leaves for its backward pass, and its logits.
        weights: of the model, as each rollout worker holds them.
        kv_cache: of one rollout worker, if every slot is filled.
        published: one version of the weights in the object store; two while they change.
        checkpoint: one checkpoint on disk.
        total: everything, on all machines together.
    """

    learner_state: int
    activations: int
    weights: int
    kv_cache: int
    published: int
    checkpoint: int
    total: int

    def rows(self) -> list[str]:
        """A line for each part."""
        return [
            f"{'learner rank':<16} {size(self.learner_state)} weights, gradients, Adam moments and ZeRO's "
            f"flat copies, + about {size(self.activations)} activations",
            f"{'rollout worker':<16} {size(self.weights)} weights + {size(self.kv_cache)} KV cache at most",
            f"{'object store':<16} {size(self.published)} a version; two while weights change",
            f"{'checkpoint':<16} {size(self.checkpoint)} on disk",
            f"{'in all':<16} {size(self.total)}, with {size(_RAY)} for Ray and "
            f"{size(_PROCESS)} for each process itself",
        ]


def expected_memory(config: Config) -> Memory:
    """Estimate what a run takes, from the model's shape alone; no weights are loaded.

    One rank of DeepSpeed ZeRO-1 in float32 was measured at 6.7 times the weights at its peak, which is:
    weights, gradients, two Adam moments, the flat master copy, flat gradients, and two reduce buckets.
    ZeRO 1 divides moments, master and flat gradients among the ranks, 2 the gradients, 3 the weights too.

    Raises:
        ModelError: the model cannot be found.
    """
    model = config_only(config.model.name)
    parameters, ranks, limits = count_parameters(config.model.name), config.learner.ranks, config.rollout
    hardware = choose_hardware(config.model, config.cluster.learner_gpus)
    item = hardware.dtype.itemsize
    stage = config.learner.zero_stage
    share = {name: ranks if stage >= least else 1 for name, least in (("weights", 3), ("gradients", 2))}
    state = parameters * item // share["weights"] + parameters * item // share["gradients"]
    state += parameters * 4 * 4 // ranks
    state += 2 * min(parameters, _BUCKET) * item
    if config.grpo.kl_coef:
        state += parameters * item  # the frozen reference is whole on each rank
    heads = model.num_attention_heads
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    head = getattr(model, "head_dim", None) or model.hidden_size // heads
    cache = model.num_hidden_layers * 2 * limits.concurrency * kv_heads * limits.max_context * head * item
    activations, weights = _activations(config, model, item), parameters * item
    total = ranks * (state + activations + _PROCESS) + limits.workers * (weights + cache + _PROCESS)
    return Memory(
        state, activations, weights, cache, weights,
        checkpoint=parameters * (2 * item + 3 * 4), total=total + 2 * weights + _PROCESS + _RAY,
    )  # fmt: skip


def _activations(config: Config, model: Any, item: int) -> int:
    """What one micro-batch leaves for its backward pass: layers, then logits of the sampled tokens."""
    limits, train = config.rollout, config.train
    step = train.tasks_per_step * config.grpo.group_size * limits.max_context // config.learner.ranks
    tokens = min(config.learner.micro_batch_tokens, step)
    layers = 1 if config.learner.gradient_checkpointing else model.num_hidden_layers
    inner = getattr(model, "intermediate_size", None) or 4 * model.hidden_size
    kept = tokens * item * layers * (8 * model.hidden_size + 4 * inner)
    longest = min(limits.max_turns * limits.max_turn_tokens, limits.max_sampled_tokens, limits.max_context)
    logits = tokens * longest // limits.max_context * model.vocab_size * 4
    return int(kept + 3 * logits)  # logits, their float32 softmax and its gradient


def size(count: int) -> str:
    """A number of bytes, for people.

    Example:
        >>> size(3 * 2**29)
        '1.50 GiB'
    """
    return f"{count / _GIB:.2f} GiB" if count >= 100 * 2**20 else f"{count / 2**20:.1f} MiB"
