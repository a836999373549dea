"""All inference engines: where they sit and how long they live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from stateset_ray.actors.inference_engine import InferenceEngine
from stateset_ray.actors.placement import Placement
from stateset_ray.actors.remote import await_ready
from stateset_ray.config import Config

__all__ = ["inference_engines"]

_CALLS = 64  # of an engine at the same time, besides one for each conversation


@contextmanager
def inference_engines(config: Config, placement: Placement) -> Iterator[list[Any]]:
    """Create `rollout.engines` actors, wait until they can answer, and end them afterwards.

    Ray restarts an engine that dies. None at all: every rollout worker has an engine of its own.

    Raises:
        StatesetError: an engine could not be built (its model, its template); the cause is passed on.
        WaitTimeout: not ready within `cluster.wait_seconds`.
    """
    cls = ray.remote(max_restarts=-1, max_task_retries=0)(InferenceEngine)
    # Any of them may have to answer everybody, when all others are dead.
    calls = _CALLS + max(config.rollout.workers, config.rollout.max_workers) * config.rollout.concurrency
    engines = [
        cls.options(**placement.engine(index), max_concurrency=calls).remote(config, index)
        for index in range(config.rollout.engines)
    ]
    try:
        await_ready(engines, "inference engines", config.cluster.wait_seconds)
        yield engines
    finally:
        for engine in engines:
            ray.kill(engine)
