"""Whether an actor still answers: whose event loop is blocked, or whose process is stopped, is not dead."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError

from stateset_ray.actors.remote import there

__all__ = ["Heartbeat"]

_BEATS = 4  # within a limit
_FETCH = 10.0  # seconds for an answer that has come, from another node


class Heartbeat:
    """What is known of one actor's being alive.

    The actor is asked again four times within a limit. An actor that was lost is asked as well, but has all
    the time that it needs to come back: to load a model blocks its event loop. A death is noticed by the
    question that fails with it; one that falls between two questions is not, and then loading has the limit.
    """

    def __init__(self) -> None:
        self._question: Any = None
        self._asked = 0.0
        self._lost = False

    def missed(self, actor: Any, limit: float) -> bool:
        """Ask the actor again when it is time; whether it has been silent for too long.

        That is told once. From then on the actor counts as lost, until it answers.

        Args:
            actor: has a method `ready`.
            limit: seconds.
        """
        now = time.monotonic()
        if now - self._asked <= limit / _BEATS:
            return False
        # The caller may have been busy with something else: what has come meanwhile is no silence.
        if self._question is None or there(self._question):
            self._ask(actor, now, lost=self._question is not None and _failed(self._question))
        elif not self._lost and now - self._asked > limit:
            self._ask(actor, now, lost=True)
            return True
        return False

    def _ask(self, actor: Any, now: float, *, lost: bool) -> None:
        # Of who was lost, again after each restart: a question has no effects.
        call = actor.ready.options(max_task_retries=-1) if lost else actor.ready
        self._question, self._asked, self._lost = call.remote(), now, lost


def _failed(answer: Any) -> bool:
    try:
        ray.get(answer, timeout=_FETCH)
    except RayError:
        return True
    return False
