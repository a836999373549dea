"""How much memory one rank of the learner will take, from its configuration and the model's shape alone.

Every term is counted from the code that allocates it; what cannot be counted (the process before its model,
the holes in its heap) was measured, and says so. `python -m benchmarks.learner --memory` puts prediction and
measurement side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stateset_ray.config import Config
from stateset_ray.models import choose_hardware, config_only, count_parameters

__all__ = ["PROCESS", "RAY_INSIDE", "ModelShape", "RankMemory", "learner_memory", "versions_in_store"]

_MIB = 2**20
PROCESS = 420 * _MIB
"""A process that has computed, its tensors apart: Python, torch, transformers, the heap (measured, Linux)."""
RAY_INSIDE = 70 * _MIB
"""What being an actor adds to that (measured)."""
_BUCKET = 16_000_000
"""Elements of the engines' reduce buckets."""
_ALL_REDUCE = 500_000_000
"""Elements that DeepSpeed's stage 0 copies together when it reduces gradients."""
_LIVE = 1_000_000_000
"""Parameters that ZeRO 3 keeps whole at one time (`stage3_max_live_parameters`)."""
_HOLES = 0.5
"""Of activations and gradients, what else the heap of a process takes for them (fitted, glibc 2.36).

The likely reason: tensors are asked for aligned, and glibc does not put an aligned piece into the hole that
one of the same size has left; gradients, which stay, settle among them. With every tensor mapped apart
(`MALLOC_MMAP_THRESHOLD_=1048576`) nothing freed is kept, but an update takes a sixth more processor time.
"""
_LOGIT_COPIES = 3
"""Of a chunk's logits in float32, backwards: log-softmax, its gradient, the gradient of the logits."""
_ENTROPY_COPIES = 4
"""More of them where the entropy has a gradient: log-softmax, probabilities, and the gradients of both."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one learner rank when it needs most, by what they are for.

    On a CPU of its process, on a GPU of the device.
    """

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return _total(self.parts)


def learner_memory(config: Config, *, ray: bool = True) -> RankMemory:
    """Estimate the peak of one learner rank during an update, as `peak_memory_bytes` reports it.

    The peak is in the backward pass of a full micro-batch that is not the step's first, when gradients are
    there already; or in the optimizer step, where an engine copies them. A GPU's allocator has given back the
    activations by then, to be used again; a process has not. Conversations are taken to be as long as
    `rollout.max_context` allows. Weights that `learner.freeze` names are counted as if they were trained.

    Args:
        ray: whether the rank is a Ray actor, as it is in a run.

    Raises:
        ModelError: the model cannot be found.
    """
    model = ModelShape(config)
    learner, train = config.learner, config.train
    step = train.tasks_per_step * _group_tokens(config) // (learner.ranks * train.updates_per_step)
    tokens = min(learner.micro_batch_tokens, step)
    state, copied = _state(config, model)
    gradients = state.pop("gradients")
    kept, working = _activations(config, model, tokens), _working(config, model, tokens)
    # Gradients of the only micro-batch come while its activations go, but where a tensor waits for them.
    early = step > tokens or (learner.engine == "deepspeed" and learner.zero_stage == 3)
    if model.device == "cuda":
        backward = {"gradients": gradients * early, "activations": kept, "logits and work": working}
        stepping = {"gradients": gradients, "gradient copies": copied}
        return RankMemory({**state, **(backward if _total(backward) > _total(stepping) else stepping)})
    # A process keeps what was freed: the step's copies come on top of the activations' place.
    parts = {"process": PROCESS + ray * RAY_INSIDE, **state}
    parts["gradients"] = gradients if early else max(0, gradients - kept)
    # With checkpointing, too, the activations of all blocks pass through the heap, one block after the other.
    through = model.layers * _block(config, model, tokens)
    holes = int(_HOLES * (through + gradients)) * early + _passing(config, model, tokens)
    parts |= {"activations": kept, "holes": holes}
    parts["gradient copies" if copied > working else "logits and work"] = max(copied, working)
    if ray:  # what a process has written into the object store counts as its own
        copies = config.publish.transport == "collective"  # from which it is broadcast
        parts["published"] = (versions_in_store(config) + copies) * model.parameters * model.item
    return RankMemory(parts)


def versions_in_store(config: Config) -> int:
    """How many versions of the weights lie in Ray's object store at most.

    Two while they change, and more where conversations in flight hold the one that they began with.
    """
    return 2 + config.train.max_staleness if config.publish.transport == "object_store" else 0


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


class ModelShape:
    """The sizes of a model that its memory follows from; elements, unless they say otherwise."""

    def __init__(self, config: Config) -> None:
        model = config_only(config.model.name).get_text_config()
        hardware = choose_hardware(config.model, config.cluster.learner_gpus)
        self.device, self.item = hardware.device, hardware.dtype.itemsize  # bytes
        self.parameters = count_parameters(config.model.name)
        self.hidden, self.layers, self.vocabulary = (
            int(model.hidden_size), int(model.num_hidden_layers), int(model.vocab_size),
        )  # fmt: skip
        self.heads = int(model.num_attention_heads)
        head = getattr(model, "head_dim", None) or self.hidden // self.heads
        self.queries = self.heads * head
        self.keys = head * (getattr(model, "num_key_value_heads", None) or self.heads)
        self.inner = getattr(model, "intermediate_size", None) or 4 * self.hidden
        self.rank = config.learner.lora.rank
        self.trained = self._adapters(config.learner.lora.targets) if self.rank else self.parameters
        # The output layer's weight, whose gradient is one tensor: often the largest of all.
        self.output = 0 if self.rank else self.vocabulary * self.hidden
        self.tied = bool(getattr(model, "tie_word_embeddings", False))

    def _adapters(self, targets: tuple[str, ...]) -> int:
        """Parameters of the adapters, in a block like Llama's."""
        hidden, inner = self.hidden, self.inner
        sides = {
            "q_proj": hidden + self.queries, "k_proj": hidden + self.keys, "v_proj": hidden + self.keys,
            "o_proj": self.queries + hidden, "gate_proj": hidden + inner, "up_proj": hidden + inner,
            "down_proj": inner + hidden,
        }  # fmt: skip
        names = {target.rpartition(".")[2] for target in targets} & sides.keys() or sides.keys()
        return self.layers * self.rank * sum(sides[name] for name in names)


def _state(config: Config, model: ModelShape) -> tuple[dict[str, int], int]:
    """Bytes that an engine holds through the whole step, and those it copies gradients to in its last part.

    torch      weights, gradients and two moments. Weights in bfloat16: masters beside them. Several ranks
               sum a bucket of gradients at a time.
    stage 0    the same; all gradients are copied together before they are reduced, even on one rank.
    stage 1    ZeRO's master is a flat copy also of float32 weights; a reduce bucket; the gradients of the
               rank's share are copied into one flat tensor for the optimizer. Ranks divide master, moments
               and that copy.
    stage 2    ranks divide the gradients, too.
    stage 3    ranks divide the weights, too, and gather those that are in use; gradients lie in a flat
               tensor from the start; two reduce buckets, and one more for a tensor that is larger. With
               tied embeddings a bucket holds all that is trained (`learner.deepspeed_engine`), three times.
    """
    learner, trained = config.learner, model.trained
    deepspeed, ranks = learner.engine == "deepspeed", learner.ranks
    stage = learner.zero_stage if deepspeed else 0

    def share(least: int) -> int:
        return ranks if stage >= least else 1

    bucket = min(trained, max(_BUCKET, model.output if stage == 3 else 0)) * 4
    weights = model.parameters * model.item // share(3)
    if stage == 3 and ranks > 1:
        weights += min(model.parameters, _LIVE) * model.item
    master = trained * 4 // share(1) if stage or model.item < 4 else 0
    moments = trained * 8 // share(1)
    buckets = {1: bucket, 2: bucket, 3: 2 * min(trained, _BUCKET) * 4 + (bucket > _BUCKET * 4) * bucket}
    if stage == 3 and model.tied and not model.rank:
        buckets[3] = 3 * trained * 4
    copied = {0: min(trained, _ALL_REDUCE) * 4, 1: trained * 4 // ranks, 2: trained * 4 // ranks, 3: 0}[stage]
    if not deepspeed:
        copied = bucket if ranks > 1 else 0
    if learner.offload != "none" and model.device == "cuda":  # they lie in main memory
        master = moments = 0
        weights = 0 if learner.offload == "all" else weights
    reference = bool(config.grpo.kl_coef) and (bool(config.grpo.reference) or not model.rank)
    return {
        "weights": weights,
        "flat master": master,
        "reference": model.parameters * model.item * reference,
        "gradients": trained * 4 // share(2),
        "Adam moments": moments,
        "reduce buckets": buckets.get(stage, 0),
    }, copied


def _activations(config: Config, model: ModelShape, tokens: int) -> int:
    """Bytes that autograd keeps of one micro-batch: with checkpointing, the inputs of all blocks, and of one
    block at a time the rest.
    """
    block = _block(config, model, tokens)
    if config.learner.gradient_checkpointing:
        return model.layers * tokens * model.hidden * model.item + block
    return model.layers * block


def _block(config: Config, model: ModelShape, tokens: int) -> int:
    """Bytes that autograd keeps of one block.

    Of every token, a block like Llama's keeps, in elements:

        2 hidden        the residual stream before each norm, in float32 whatever the dtype
        2 hidden        what each norm's weight is multiplied with, if that weight is trained
        2 hidden        what it gives: the input of q, k, v, and of gate and up
        3 queries       rotated queries; the output of attention, and again as the input of o
        2 keys          rotated keys; values
        4 inner         gate, silu(gate), up, and their product, the input of down
        1 each head     the log-sum-exp of attention, in float32
        7 rank          what the first halves of adapters give

    Where a prefix is shared, each conversation that reads it copies the prefix's keys and values beside its
    own, and has a mask of [own tokens, all tokens] in each block.
    """
    norms = 0 if model.rank else 2
    kept = (2 + norms) * model.hidden + 3 * model.queries + 2 * model.keys + 4 * model.inner + 7 * model.rank
    per_token = kept * model.item + 2 * model.hidden * 4 + model.heads * 4
    block = tokens * per_token
    if prefix := _prefix(config):
        whole = config.rollout.max_context
        block += _conversations(config, tokens) * whole * (2 * model.keys + whole - prefix) * model.item
    return block


def _passing(config: Config, model: ModelShape, tokens: int) -> int:
    """Bytes that pass between the activations of blocks with adapters, and leave holes there.

    An adapted layer makes two tensors of its output's size: what the layer says, and the same with what its
    adapter adds, which alone is kept. All engines allocate and free the same here, to the byte; how many such
    outputs of every layer lie in holes when the peak comes is fitted, as `_HOLES` is:

        1/2   with checkpointing: most holes of a block are filled by the next
        2     without: activations that stay come to lie between them
        1/2   more under ZeRO 3: around every module its hooks leave autograd nodes until the backward pass,
              small pieces that settle in the holes, also in those of norms and rotations
    """
    if not model.rank:
        return 0
    learner = config.learner
    hooks = learner.engine == "deepspeed" and learner.zero_stage == 3
    left = (0.5 if learner.gradient_checkpointing else 2) + 0.5 * hooks
    outputs = 2 * model.hidden + model.queries + 2 * model.keys + 2 * model.inner
    return int(left * model.layers * tokens * outputs * model.item)


def _working(config: Config, model: ModelShape, tokens: int) -> int:
    """Bytes that exist for a moment as the backward pass begins: at the output layer, or in the last block.

    A chunk's logits, and the gradient of the output layer's weight: one of the chunk and one of the chunks
    before. Where input and output layer are tied, it waits for that of the input layer to the very end.
    """
    chunk, sampled = config.learner.logit_chunk, _conversations(config, tokens) * _longest(config)
    rows = min(chunk, sampled)
    logits = rows * model.vocabulary * 4
    copies = _LOGIT_COPIES + _ENTROPY_COPIES * (config.grpo.entropy_coef > 0)
    weight = model.output * model.item
    before = weight if sampled > chunk else 0
    head = before + max(copies * logits, logits + weight)
    # The gradients of the four inner tensors of a block.
    block = weight * model.tied + tokens * 4 * model.inner * model.item
    return max(head, block)


def _longest(config: Config) -> int:
    """Sampled tokens of the longest conversation."""
    limits = config.rollout
    return min(limits.max_turns * limits.max_turn_tokens, limits.max_sampled_tokens, limits.max_context - 1)


def _prefix(config: Config) -> int:
    """Tokens that a group shares: all that are not sampled, at most."""
    return config.rollout.max_context - _longest(config) if config.learner.share_prefix else 0


def _group_tokens(config: Config) -> int:
    """Tokens that are computed of a whole group."""
    prefix, size = _prefix(config), config.grpo.group_size
    return prefix + size * (config.rollout.max_context - prefix)


def _conversations(config: Config, tokens: int) -> int:
    """How many conversations lie in a micro-batch of so many tokens."""
    return max(1, round(tokens * config.grpo.group_size / _group_tokens(config)))
