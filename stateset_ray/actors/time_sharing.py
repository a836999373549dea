"""One device for engines and learner, in turns.

While the learner computes, the engines hold neither weights nor cache, and while they answer, the learner
holds no activations; with `learner.offload`, no optimizer states either. What wakes an engine is what heals a
restarted one: a request names the version that must answer, and brings its handle (`HeldEngine.hold`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from stateset_ray.actors.remote import cause_of
from stateset_ray.errors import WaitTimeout

__all__ = ["fall_asleep"]


_SLICE = 1.0  # seconds between two looks at who is alive


def fall_asleep(receivers: Sequence[Any], seconds: float, beat: Callable[[], None]) -> None:
    """Let every engine give up its memory, and wait for it; one that has died holds none.

    Args:
        receivers: actors with an engine.
        seconds: how long each may take: the turns that run end before.
        beat: called while it waits: restarts who does not answer, which by that holds nothing either.

    Raises:
        WaitTimeout: an engine did not end its turns in time.
        StatesetError: one could not.
    """
    asked = [actor.sleep.remote() for actor in receivers]
    deadline, waiting = time.monotonic() + seconds, asked
    while waiting and (left := deadline - time.monotonic()) > 0:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=min(_SLICE, left))
        if waiting:
            beat()
    if waiting:
        raise WaitTimeout(
            f"{len(waiting)} of {len(asked)} engines did not fall asleep within {seconds:g} s",
            mend="look at their logs; raise rollout.turn_timeout if a reply is really that long",
        )
    for answer in asked:
        try:
            ray.get(answer, timeout=seconds)
        except RayActorError:
            continue
        except RayTaskError as error:
            raise cause_of(error) from None
