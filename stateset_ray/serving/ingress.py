"""The ingress deployment: HTTP on one side, the policy's replicas on the other. It holds no model.

What Serve raises is put into the words of `dispatch` here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc  # comes with Ray Serve
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.context import _set_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from stateset_ray.errors import InfrastructureFault
from stateset_ray.serving.dispatch import PolicyBusy, PolicyLost
from stateset_ray.serving.events import Ask, Event
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.gate import Gate
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.proxies import remember_proxies
from stateset_ray.serving.rates import Rates
from stateset_ray.serving.redaction import RedactingFilter
from stateset_ray.serving.room import RoomyPolicies
from stateset_ray.serving.routes import routes
from stateset_ray.serving.security import KeyRing
from stateset_ray.serving.settings import SERVE_LOGGING, STEADY_MEMORY, ServeSettings
from stateset_ray.serving.transcript_log import SampledPolicies, TranscriptLog

__all__ = ["INGRESS_ENVIRONMENT", "Ingress", "ServePolicies", "drained", "ingress_deployment"]

_STATUS_SECONDS = 10.0
INGRESS_ENVIRONMENT = {
    # A stream of gRPC is read, and cancelled, where it belongs: in the event loop that asks.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    **STEADY_MEMORY,
    # Limits that do not grow.
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
_GONE = (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
"""What the end of a replica looks like over gRPC."""
_DRAIN_LOOK = 0.1  # seconds between two looks at what is still under way


class ServePolicies:
    """The policy deployment behind a Serve handle; implements `Policies`.

    Args:
        handle: to the deployment.
        may_sleep: whether it may have no replica; asking how it is must not wake it then.
    """

    def __init__(self, handle: Any, *, may_sleep: bool = False) -> None:
        self._handle = handle
        self._may_sleep = may_sleep

    async def ask(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """See `Policies.ask`."""
        if ask.lot:
            # Serve names an ask after its HTTP request. Of several at the same time its router would forget
            # all but the last, and they would wait until their deadline.
            _set_request_context(_internal_request_id=ask.id)
        # A session does not travel over the second hop by itself.
        options = {"session_id": ask.session} if ask.session else {}
        # Pieces of an answer come over a gRPC stream: as objects of Ray's they take more of the processors.
        response = self._handle.options(
            method_name="answer", stream=True, _by_reference=False, **options
        ).remote(ask)
        try:
            async for events in response:
                yield events
        except (asyncio.CancelledError, GeneratorExit) as error:
            if isinstance(error, asyncio.CancelledError) and not _being_cancelled():
                raise PolicyLost from error  # it is the replica's own, which has come over the stream
            with suppress(Exception):  # it may have failed by itself in the meantime, which `cancel` raises
                response.cancel()
            raise
        except BackPressureError:
            raise PolicyBusy from None
        except DeploymentUnavailableError:
            raise ApiError(503, "no_policy", "the policy could not be started", retry_after=10.0) from None
        except (RayActorError, TaskCancelledError, InfrastructureFault) as error:
            # Serve cancels what a replica still does when it has waited long enough for it to end.
            raise PolicyLost from error
        except grpc.aio.AioRpcError as error:
            if error.code() not in _GONE:
                raise
            raise PolicyLost from error
        except RayError as error:
            if isinstance(getattr(error, "cause", None), InfrastructureFault | RayActorError):
                raise PolicyLost from error
            raise

    async def status(self) -> dict[str, Any]:
        """See `Policies.status`."""
        if self._may_sleep:
            awake = await self.statuses()
            return awake[0] if awake else {"version": "asleep"}
        found: dict[str, Any] = await self._handle.options(method_name="status").remote()
        return found

    async def statuses(self) -> list[dict[str, Any]]:
        """See `Policies.statuses`."""
        asked = self._handle.broadcast("status")
        try:
            found = await asked.results_async(timeout_s=_STATUS_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:  # there is none
            return []
        # One that has just died is in the list for a moment longer.
        return [status for status in found if isinstance(status, dict)]


def _being_cancelled() -> bool:
    """Whether somebody has cancelled the task that asks this."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class Ingress:
    """Speaks HTTP; wrapped as a deployment by `ingress_deployment`.

    Args:
        settings: of the endpoint.
        policy: a handle to the policy deployment.

    Raises:
        ConfigError: nobody could use the endpoint, for want of keys.
    """

    def __init__(self, settings: ServeSettings, policy: Any) -> None:
        remember_proxies()
        if settings.redact:
            logging.getLogger("ray.serve").addFilter(RedactingFilter())
        meters = Meters.of_ray()
        policies = RoomyPolicies(ServePolicies(policy, may_sleep=settings.may_sleep))
        log = TranscriptLog(settings.transcripts, meters) if settings.transcripts.folder is not None else None
        app = routes(settings, SampledPolicies(policies, log) if log else policies, meters)
        keys, rates = KeyRing(settings.security), Rates(settings.rates)
        self._gate = Gate(app, keys, rates, settings, meters, policies.full)
        self._drain_seconds = settings.deadlines.drain
        self._lasting: list[Callable[[], int]] = [
            lambda: self._gate.running, *app.state.lasting, *([lambda: log.unwritten] if log else [])
        ]  # fmt: skip

    def __serve_build_asgi_app__(self) -> Gate:
        """What Serve sends requests to."""
        return self._gate

    async def __del__(self) -> None:
        """What Serve calls before it ends this replica, when its last request has ended.

        Tools and transcripts may be under way still; Serve waits `deadlines.drain` seconds for both together.
        """
        await drained(self._lasting, self._drain_seconds)

    async def drain(self, seconds: float) -> int:
        """Take no new requests; wait for those under way, for tools that were called, and for transcripts.

        Returns:
            How many were left after so many seconds.
        """
        self._gate.draining = True
        return await drained(self._lasting, seconds)


async def drained(lasting: Sequence[Callable[[], int]], seconds: float) -> int:
    """Wait until all of these count nothing any more; what they count after so many seconds."""
    end = asyncio.get_running_loop().time() + seconds
    while (left := sum(count() for count in lasting)) and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(_DRAIN_LOOK)
    return left


def ingress_deployment(settings: ServeSettings) -> Any:
    """The deployment of the ingress, with all that the settings say of it."""
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        # It only passes on: what takes a processor is the policy.
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": INGRESS_ENVIRONMENT}},
        # Looser than what the ingress itself refuses, so that refusals are in our shape and not Serve's.
        max_ongoing_requests=settings.ingress_ongoing,
        max_surge_percent=50,  # they are small: an update stops none before there is another
        graceful_shutdown_timeout_s=settings.deadlines.drain,
        logging_config=SERVE_LOGGING,
    )
