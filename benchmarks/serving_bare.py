"""An ingress that knows nothing but one question: what any ingress costs, whatever it does.

What the endpoint's takes or grows beyond it is the endpoint's own.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ray import serve

from benchmarks.serving_clients import HI
from stateset_ray.serving.events import Ask
from stateset_ray.serving.ingress import INGRESS_ENVIRONMENT
from stateset_ray.serving.settings import SERVE_LOGGING
from stateset_ray.types import Message

__all__ = ["BARE", "TOKENS", "asked", "bare", "question"]

BARE = "/bare"
"""Where it answers to POST with `{"stream": true}` or false."""
TOKENS = 20
"""Of an answer."""


@contextmanager
def bare() -> Iterator[None]:
    """It answers under `BARE`, beside the endpoint and before the same policy, until this is left."""
    deployment = serve.deployment(
        serve.ingress()(_Bare), name="Bare", num_replicas=2, max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": INGRESS_ENVIRONMENT}},
        logging_config=SERVE_LOGGING,
    )  # fmt: skip
    serve.run(deployment.bind(), name="bare", route_prefix=BARE)
    try:
        yield
    finally:
        serve.delete("bare")


def question(stream: bool) -> Ask:
    """The one that it knows: 20 tokens at temperature 0."""
    said = tuple(Message(m["role"], m["content"]) for m in HI)  # type: ignore[arg-type]
    return Ask(uuid.uuid4().hex, "t", "", said, TOKENS, 0.0, 1, stream=stream)


def asked(policy: Any, stream: bool) -> Any:
    """The events of an answer, over the kind of connection that the endpoint has."""
    options = {"method_name": "answer", "stream": True, "_by_reference": False}
    return policy.options(**options).remote(question(stream))


class _Bare:
    """What Serve builds."""

    def __serve_build_asgi_app__(self) -> Any:
        return _PassOn(serve.get_deployment_handle("Policy", "policy"))


class _PassOn:
    """Reads a body, asks the policy, writes what it says; nothing else."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        stream = json.loads(body)["stream"]
        answer = asked(self._policy, stream)
        start = {"type": "http.response.start", "status": 200, "headers": []}
        if stream:
            first = await anext(answer)
            await send(start)
            await send({"type": "http.response.body", "body": _written(first), "more_body": True})
            async for events in answer:
                await send({"type": "http.response.body", "body": _written(events), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return
        seen = [event async for events in answer for event in events]
        await send(start)
        await send({"type": "http.response.body", "body": _written(seen)})


def _written(events: Any) -> bytes:
    return json.dumps([asdict(event) for event in events]).encode() + b"\n"
