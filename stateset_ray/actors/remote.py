"""Waiting for remote calls: with a limit, a name, and the error that was really raised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from stateset_ray.errors import ClusterError, StatesetError, WaitTimeout

__all__ = ["await_ready", "cause_of", "died_with_its_node", "get", "there", "those_there"]

_TRACE_LINES = 12  # of a remote traceback that a person may need


def get(refs: Any, *, timeout: float, waiting_for: str) -> Any:
    """`ray.get` with a limit.

    Args:
        refs: a reference or a list of them.
        timeout: seconds.
        waiting_for: completes "the controller waited ... s for", in the error.

    Raises:
        WaitTimeout: the limit passed.
        StatesetError: the remote side raised it.
        ClusterError: an actor died, or the remote side raised something else.
        ObjectLostError: it lay on a node that died.
    """
    if refs == []:
        return []  # nothing to wait for; where nobody has started Ray, asking it would
    try:
        return ray.get(refs, timeout=timeout)
    except GetTimeoutError as error:
        raise WaitTimeout(
            f"the controller waited {timeout:.0f} s for {waiting_for}",
            mend="look at that actor's log; raise the limit if the work is really that long",
        ) from error
    except RayTaskError as error:
        raise cause_of(error) from None
    except RayActorError as error:
        raise ClusterError(
            f"an actor died while the controller waited for {waiting_for}: {error}",
            mend="look at its log; is there memory for its model?",
        ) from error


def await_ready(actors: Sequence[Any], what: str, seconds: float) -> None:
    """Wait until every actor has answered `ready`.

    Raises:
        StatesetError: one could not be built.
        WaitTimeout: not all did in time.
    """
    refs = [actor.ready.remote() for actor in actors]
    if not refs:
        return
    ready, waiting = ray.wait(refs, num_returns=len(refs), timeout=seconds)
    get(ready, timeout=1, waiting_for=f"{what} that said they are ready")
    if waiting:
        raise WaitTimeout(
            f"{len(waiting)} of {len(refs)} {what} were not ready after {seconds:.0f} s",
            mend="raise cluster.wait_seconds if the model is large; else look at their logs",
        )


def died_with_its_node(error: Exception) -> bool:
    """Whether `get` raised this because the node of the actor that was asked is dead."""
    cause = error.__cause__
    return isinstance(cause, RayActorError) and "node has died" in str(cause)


def cause_of(error: RayTaskError) -> Exception:
    """The project's own error inside a remote one; of any other, a ClusterError that tells it."""
    cause = error.cause
    if isinstance(cause, StatesetError):
        return cause
    trace = str(error).strip().splitlines()
    # Ray's error that is an instance of its cause too has none of RayTaskError's own attributes.
    called = re.search(r"ray::([\w.]+)", trace[0])
    return ClusterError(
        f"{called[1] if called else 'a remote call'} failed: {type(cause).__name__}: {cause}",
        given="\n".join(["", *trace[-_TRACE_LINES:]]),
        mend="if this is not of your own code, please report it",
    )


def there(answer: Any) -> bool:
    """Whether an answer has come; it may be an error."""
    return bool(ray.wait([answer], timeout=0)[0])


def those_there(answers: list[Any]) -> list[Any]:
    """Those of them that have come, not fetched; of a stream, whether its next reference has."""
    if not answers:
        return []
    return list(ray.wait(answers, num_returns=len(answers), timeout=0, fetch_local=False)[0])
