"""What Serve raises, in our words; and what the ingress does not load."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import aclosing
from types import SimpleNamespace

import grpc
import pytest
from ray.exceptions import ActorDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from stateset_ray.errors import InfrastructureFault
from stateset_ray.serving.dispatch import PolicyBusy, PolicyLost
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.ingress import Ingress, ServePolicies, ingress_deployment
from stateset_ray.serving.policy_deployment import policy_deployment
from stateset_ray.serving.settings import AutoscalingSettings, PolicySettings, ServeSettings


class Response:
    """A handle's response: some events, then an error, which `cancel` raises again, as Serve's does."""

    def __init__(self, error=None):
        self.error = error
        self.cancelled = False

    async def __aiter__(self):
        yield ("event",)
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()

    def cancel(self):
        self.cancelled = True
        if self.error is not None:
            raise self.error


class Handle:
    def __init__(self, response):
        self.response = response

    def options(self, **options):
        self.chosen = options
        return self

    def remote(self, _):
        return self.response


def _rpc_error(code):
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


class _Ask:
    id = "ask-1"
    session = "s"
    lot = 0


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (BackPressureError(3, 2), PolicyBusy),
        (ActorDiedError(), PolicyLost),
        (TaskCancelledError(), PolicyLost),
        (InfrastructureFault("x"), PolicyLost),
        # Over a gRPC stream: the replica has gone, is stopping, has cancelled the answer itself, has a bug.
        (_rpc_error(grpc.StatusCode.UNAVAILABLE), PolicyLost),
        (_rpc_error(grpc.StatusCode.CANCELLED), PolicyLost),
        (asyncio.CancelledError(), PolicyLost),
        (_rpc_error(grpc.StatusCode.INTERNAL), grpc.aio.AioRpcError),
        (RayTaskError("f", "trace", InfrastructureFault("x")).as_instanceof_cause(), PolicyLost),
        (DeploymentUnavailableError("x"), ApiError),
        (RayTaskError("f", "trace", ValueError("x")).as_instanceof_cause(), RayTaskError),
    ],
)
def test_what_serve_raises(error, wanted):
    async def play():
        with pytest.raises(wanted):
            async for _ in ServePolicies(Handle(Response(error))).ask(_Ask()):
                pass

    asyncio.run(play())


def test_what_is_given_up_is_cancelled():
    async def play():
        handle = Handle(Response())
        async with aclosing(ServePolicies(handle).ask(_Ask())) as answer:
            await anext(answer)
        assert handle.response.cancelled
        assert handle.chosen["method_name"] == "answer"
        assert handle.chosen["session_id"] == "s"
        late = Response(BackPressureError(3, 2))  # failed while it was given up
        async with aclosing(ServePolicies(Handle(late)).ask(_Ask())) as answer:
            await anext(answer)
        assert late.cancelled

    asyncio.run(play())


def test_a_caller_that_is_cancelled_has_not_lost_the_replica():
    async def play():
        response = Response()

        async def ask():
            async for _ in ServePolicies(Handle(response)).ask(_Ask()):
                begun.set()

        begun = asyncio.Event()
        asking = asyncio.create_task(ask())
        await begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert response.cancelled

    asyncio.run(play())


def test_a_replica_that_has_just_died_has_no_status():
    class Asked:
        async def results_async(self, **options):
            assert options["return_exceptions"]
            return [ActorDiedError(), {"pid": 1}]

    class Broadcasting:
        def broadcast(self, name):
            return Asked()

    assert asyncio.run(ServePolicies(Broadcasting()).statuses()) == [{"pid": 1}]


@pytest.mark.parametrize("awake", [True, False])
def test_asking_how_it_is_wakes_nobody(awake):
    """Where there may be no replica: health checks would keep one for ever."""

    class Asked:
        async def results_async(self, **_):
            if not awake:
                raise DeploymentUnavailableError("Policy")
            return [{"version": "v1"}]

    class Sleeping:
        def broadcast(self, name):
            return Asked()

        def options(self, **_):
            raise AssertionError("this would start a replica")

    policies = ServePolicies(Sleeping(), may_sleep=True)
    assert asyncio.run(policies.status()) == {"version": "v1" if awake else "asleep"}
    assert len(asyncio.run(policies.statuses())) == awake


def test_before_serve_ends_a_replica_its_tools_and_transcripts_end():
    """Serve awaits this itself, also where it was not our command that deployed it."""
    left = [2]
    ingress = SimpleNamespace(_lasting=[lambda: left[0]], _drain_seconds=20.0)

    async def play():
        ending = asyncio.create_task(Ingress.__del__(ingress))
        await asyncio.sleep(0)
        assert not ending.done()
        left[0] = 0
        await ending

    asyncio.run(play())


def test_room_for_an_update_is_told_to_serve():
    settings = ServeSettings(source="tiny", policy=PolicySettings(surge=30))
    assert policy_deployment(settings)._deployment_config.max_surge_percent == 30
    assert ingress_deployment(settings)._deployment_config.max_surge_percent > 0


def test_scaling_to_zero_is_told_to_serve():
    settings = ServeSettings(source="tiny", autoscaling=AutoscalingSettings(min_replicas=0, max_replicas=2))
    assert settings.may_sleep
    scaling = policy_deployment(settings)._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 2)
    assert not ServeSettings(source="tiny").may_sleep


def test_an_ingress_replica_loads_no_torch():
    code = "import sys, stateset_ray.serving.ingress; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "False"


def test_a_question_may_be_as_long_as_the_limits_say():
    """Serve's channel between replicas takes 4 MiB, unless the one that receives is told otherwise."""
    options = policy_deployment(ServeSettings(source="tiny")).ray_actor_options
    code = (
        "from ray.serve._private.constants import RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH as most; "
        "print(most)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **options["runtime_env"]["env_vars"]},
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert int(done.stdout.strip().splitlines()[-1]) > 1 << 30
