"""All inference engines: where they sit, how long they live, and which of them has fallen silent.

Who waits for whom: the workers' routers wait for the engines' replies. An engine has to answer a heartbeat
within `rollout.heartbeat_timeout`; one that does not (its process is stopped, its event loop blocked) is
killed, so that its conversations go on elsewhere, and Ray restarts it like one that crashed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from stateset_ray.actors.heartbeat import Heartbeat
from stateset_ray.actors.inference_engine import InferenceEngine
from stateset_ray.actors.placement import Placement
from stateset_ray.actors.publishing.base import PublishedWeights
from stateset_ray.actors.remote import await_ready, get
from stateset_ray.config import Config

__all__ = ["InferencePool", "inference_engines"]

_log = logging.getLogger(__name__)
_CALLS = 64  # of an engine at the same time, besides one for each conversation


class InferencePool:
    """The engines that `inference_engines` created, as the controller knows them.

    Args:
        config: of the run.
        actors: the engines; none at all where each rollout worker has one of its own.
    """

    def __init__(self, config: Config, actors: Sequence[Any] = ()) -> None:
        self.actors = list(actors)
        self._limit = config.rollout.heartbeat_timeout
        self._wait_seconds = config.cluster.wait_seconds
        self._heartbeats = [Heartbeat() for _ in self.actors]
        self._announced: list[Any] = []

    @property
    def pids(self) -> list[int]:
        """Process ids of the engines; waits for those that Ray restarts."""
        # Asked again after a restart: a question has no effects.
        asked = [engine.ready.options(max_task_retries=-1).remote() for engine in self.actors]
        facts = get(asked, timeout=self._wait_seconds, waiting_for="the inference engines' answers")
        return [fact["pid"] for fact in facts]

    def announce(self, weights: PublishedWeights) -> None:
        """Let all engines fetch a version now; does not wait for them.

        One that fails, or is not there, will fetch it when it is asked for a reply.
        """
        self._announced = [engine.hold.remote(weights.version, weights.told) for engine in self.actors]

    def beat(self) -> None:
        """Ask the engines whether they are alive, and kill those that did not answer in time."""
        for index, (engine, heartbeat) in enumerate(zip(self.actors, self._heartbeats, strict=True)):
            if heartbeat.missed(engine, self._limit):
                _log.warning(
                    "inference engine %d has not answered for %.0f s (rollout.heartbeat_timeout) and is "
                    "restarted", index, self._limit,
                )  # fmt: skip
                ray.kill(engine, no_restart=False)  # the routers will hear of its death


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
