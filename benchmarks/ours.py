"""Our side of the training benchmark: the rollout, the engine's two kinds of pass, a step through Ray."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import ray

from benchmarks.conversations import GROUP, Partner, Script, render
from stateset_ray.actors.placement import cluster
from stateset_ray.actors.run import open_run
from stateset_ray.config import Config, RolloutConfig, load_config
from stateset_ray.learner.learner import Learner
from stateset_ray.models import Hardware, load_model
from stateset_ray.policies.base import ReplyRequest
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.policies.weights import decode, split
from stateset_ray.rollout import rollout
from stateset_ray.train import train_step
from stateset_ray.types import Trajectory

__all__ = ["engine_passes", "new_engine", "play_ours", "publish_in_process", "publish_through_ray", "steps"]


def new_engine(model: Any, limits: RolloutConfig, hardware: Hardware) -> TransformersEngine:
    """An engine whose replies never stop before their limit."""
    return TransformersEngine(
        model, (), slots=limits.concurrency, max_context=limits.max_context, hardware=hardware
    )


def play_ours(
    model: Any, played: Sequence[Script], renderer: Renderer, limits: RolloutConfig, hardware: Hardware,
    seed: int,
) -> tuple[list[Trajectory], dict[str, float]]:  # fmt: skip
    """Play all conversations at once with an empty cache; returns them and what the engine counted."""

    async def play() -> tuple[list[Trajectory], dict[str, float]]:
        engine = new_engine(model, limits, hardware)
        try:
            trajectories = await asyncio.gather(
                *[
                    rollout(
                        Partner(script), script.task, engine, renderer, limits,
                        id=f"{script.task.id}/{script.sample}", seed=seed, sample=script.sample,
                    )
                    for script in played
                ]
            )  # fmt: skip
        finally:
            await engine.close()
        return trajectories, dict(vars(engine.stats))

    trajectories, stats = asyncio.run(play())
    for trajectory in trajectories:
        if trajectory.error or len(trajectory.turns) != len(played[0].answers) + 1:
            raise RuntimeError(f"{trajectory.id} ended early: {trajectory.stop_reason} {trajectory.error}")
    return trajectories, stats


def engine_passes(
    model: Any, played: Sequence[Script], renderer: Renderer, limits: RolloutConfig, hardware: Hardware
) -> dict[str, tuple[int, float]]:
    """(tokens, seconds) of prefilling the openings, none of them shared, and of decoding after them."""
    prompts = []
    for index, script in enumerate(played):
        opening = list(render(script, renderer)[0])
        opening[0] = index  # any token: a first one of its own, so that no prompt is copied from another
        prompts.append(tuple(opening))
    longest = max(map(len, prompts))
    tokens = min(32, limits.max_context - longest)

    async def passes() -> dict[str, tuple[int, float]]:
        engine = new_engine(model, limits, hardware)

        async def replies(count: int) -> float:
            before = engine.stats.seconds
            await asyncio.gather(
                *[engine.reply(ReplyRequest(str(i), p, (), count, 1.0, i)) for i, p in enumerate(prompts)]
            )
            return engine.stats.seconds - before

        try:
            seconds = await replies(1)
            prefilled = engine.stats.prefill_tokens
            # The same prompts again: all but their last token is known, so every pass is a decoding one.
            return {"prefill": (prefilled, seconds), "decode": (tokens * len(prompts), await replies(tokens))}
        finally:
            await engine.close()

    return asyncio.run(passes())


def publish_in_process(learner: Learner, engine: TransformersEngine) -> dict[str, float]:
    """Seconds of each part of publishing without Ray: out of the learner, into the engine."""

    async def load(tensors: dict[str, Any]) -> None:
        await engine.load_weights(1, tensors)

    started = time.perf_counter()
    arrays = learner.export_weights()
    encoded = time.perf_counter()
    tensors = {name: decode(array) for name, array in arrays.items()}
    decoded = time.perf_counter()
    asyncio.run(load(tensors))
    loaded = time.perf_counter()
    return {
        "encode": encoded - started,
        "decode": decoded - encoded,
        "load": loaded - decoded,
        "total": loaded - started,
    }


class _Receiver:
    """A process that holds a model and takes weights from the object store."""

    def __init__(self, name: str, hardware: Hardware) -> None:
        self._engine = TransformersEngine(
            load_model(name, hardware), (), slots=1, max_context=8, hardware=hardware
        )

    async def load(self, refs: list[Any]) -> None:
        parts = await asyncio.gather(*refs)
        tensors = {name: decode(array) for part in parts for name, array in part.items()}
        await self._engine.load_weights(1, tensors)


def publish_through_ray(
    arrays: dict[str, Any], name: str, hardware: Hardware, repeats: int
) -> list[dict[str, float]]:
    """Seconds of `ray.put` and of a worker's load from the object store; needs a running Ray."""
    receiver = ray.remote(num_cpus=0)(_Receiver).remote(name, hardware)
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        refs = [ray.put(part) for part in split(arrays)]
        middle = time.perf_counter()
        ray.get(receiver.load.remote(refs))
        found.append({"put": middle - start, "worker_load": time.perf_counter() - middle})
    ray.kill(receiver)
    return found[1:]  # the first one also starts the process and maps the store's memory


def steps(name: str, dtype: str, conversations: int, seed: int, count: int = 2) -> list[dict[str, Any]]:
    """Real GRPO steps of the customer-service environment through Ray; what each of them took.

    `rollout`, `credit`, `learner` and `publish` are the phases that `train_step` times, `whole` is the wall
    clock of the step; `engine` and `update` are what the engine's and the learner's own clocks saw.
    """
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        config = _config(name, dtype, conversations, seed, count, folder)
        with cluster(config):
            return _steps(config)


def _config(name: str, dtype: str, conversations: int, seed: int, count: int, folder: str) -> Config:
    longer = [] if name == "smollm2" else ["rollout.max_context=1024", "learner.micro_batch_tokens=4096"]
    return load_config(
        None,
        [
            f"run.dir={folder}", "run.name=bench", f"run.seed={seed}", f"model.name={name}",
            f"model.dtype={dtype}",
            "environment.path=stateset_ray.environments.customer_service:CustomerService",
            "environment.options.difficulty=1", "rollout.max_turns=4", "rollout.max_turn_tokens=32",
            "rollout.max_context=320", "rollout.on_cut_reply=close", "learner.micro_batch_tokens=1024",
            f"grpo.group_size={GROUP}", f"train.tasks_per_step={max(1, conversations // GROUP)}",
            f"train.steps={count}", "train.checkpoint_every=1000", "evaluate.tasks=0", *longer,
        ],
    )  # fmt: skip


def _steps(config: Config) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    found = []
    with open_run(config, on_event=lambda event: events.append(dict(event))) as run:
        for step in run.steps():
            before = run.pool.stats()[0]
            started = time.monotonic()
            update = train_step(run, step)
            whole = time.monotonic() - started
            after = run.pool.stats()[0]
            record = next(event for event in reversed(events) if event["event"] == "step")
            found.append(
                {
                    **record["seconds"],
                    "whole": whole,
                    "engine": after["seconds"] - before["seconds"],
                    "update": update.get("seconds", 0.0),
                    "sampled_tokens": after["decode_tokens"] - before["decode_tokens"],
                    "learner_tokens": update.get("tokens", 0.0),
                    "kl_mismatch": update.get("kl_mismatch"),
                }
            )
    return found
