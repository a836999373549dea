"""How much memory a run will take, from its configuration and the model's shape alone.

An estimate to be warned by, not a promise; no weights are loaded and nothing is started. What a learner
rank takes is counted in `learner_memory`; what it says of itself afterwards is `peak_memory_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stateset_ray.actors.learner_memory import (
    PROCESS,
    RAY_INSIDE,
    ModelShape,
    RankMemory,
    learner_memory,
    versions_in_store,
)
from stateset_ray.config import Config

__all__ = ["Memory", "expected_memory", "size"]

_MIB, _GIB = 2**20, 2**30
_RAY = 512 * _MIB
"""Ray's own processes on one node (measured)."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a run is expected to take, on the device for learners and engines.

    Attributes:
        learner: one learner rank at its peak.
        weights: of the model.
        kv_cache: of one engine, if every slot is filled.
        published: one version of the weights on its way to the engines.
        checkpoint: one checkpoint on disk.
        total: everything, on all machines together, but for what vLLM takes beside weights and cache.
        engine: where the engines are: in rollout workers, or apart from them.
        transport: how versions travel.
        versions: of the weights that lie in the object store, or in the folder, at most.
        vllm: whether engines are vLLM's.
    """

    learner: RankMemory
    weights: int
    kv_cache: int
    published: int
    checkpoint: int
    total: int
    engine: str = "rollout worker"
    transport: Literal["object_store", "folder", "collective"] = "object_store"
    versions: int = 2
    vllm: bool = False

    def rows(self) -> list[str]:
        """A line for each part."""
        one = size(self.published)
        published = {
            "object_store": f"{'object store':<16} {one} a version; {self.versions} at most",
            "folder": f"{'folder':<16} {one} a version; {self.versions} on disk, none in memory of their own",
            "collective": f"{'broadcast':<16} {one} in main memory at rank 0, and as much at each engine",
        }[self.transport]
        own = (
            f"{'vLLM':<16} is a process of its own; what its kernels take is not counted; {one} more in "
            "/dev/shm while weights change"
        )
        return [
            f"{'learner rank':<16} {size(self.learner.total)} at its peak:",
            *(f"  {part:<14} {size(count)}" for part, count in self.learner.parts.items() if count),
            f"{self.engine:<16} {size(self.weights)} weights + {size(self.kv_cache)} KV cache at most",
            *([own] if self.vllm else []),
            published,
            f"{'checkpoint':<16} {size(self.checkpoint)} on disk",
            f"{'in all':<16} {size(self.total)}, with {size(_RAY)} for Ray and "
            f"{size(PROCESS + RAY_INSIDE)} for each process itself",
        ]


def expected_memory(config: Config) -> Memory:
    """Estimate what a run takes, from the model's shape alone; no weights are loaded.

    Raises:
        ModelError: the model cannot be found.
    """
    model = ModelShape(config)
    limits, ranks, transport = config.rollout, config.learner.ranks, config.publish.transport
    learner = learner_memory(config)
    # Conversations lie where they are answered: in the workers, or in engines apart from them.
    workers = max(limits.workers, limits.max_workers)
    holders = limits.engines or workers
    cache = model.layers * 2 * limits.slots * limits.max_context * model.keys * model.item
    weights, process = model.parameters * model.item, PROCESS + RAY_INSIDE
    vllm = limits.engine_kind == "vllm"
    # Beside the weights that answer: those that arrive, whole, by a broadcast or in the file that vLLM reads.
    arriving = (transport == "collective") + vllm
    holder = weights + cache + process + vllm * PROCESS + arriving * weights
    rank = learner.total - learner.parts.get("published", 0)  # that is there once, whoever has written it
    rank += 0 if "process" in learner.parts else process
    published = (versions_in_store(config) + (transport == "collective")) * weights
    total = ranks * rank + holders * holder + process + _RAY + published
    total += workers * process if limits.engines else 0
    return Memory(
        learner, weights, cache, weights, checkpoint=weights + model.trained * (3 * 4), total=total,
        engine="inference engine" if limits.engines else "rollout worker", transport=transport,
        versions=config.publish.keep if transport == "folder" else versions_in_store(config), vllm=vllm,
    )  # fmt: skip


def size(count: int) -> str:
    """A number of bytes, for people.

    Example:
        >>> size(3 * 2**29)
        '1.50 GiB'
    """
    return f"{count / _GIB:.2f} GiB" if count >= 100 * _MIB else f"{count / _MIB:.1f} MiB"
