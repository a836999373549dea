"""Serve's proxies, looked up once by each ingress replica and not for every request.

A replica reads the body of a request from the proxy that sent it, which Serve looks up by its name each time.
Ray asks the GCS then, and the replica's event loop stands still meanwhile: for half a millisecond each time,
and where there is no GCS until there is one again.

Who waits for whom: the first request of a proxy for the GCS.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.serve._private.common import StreamingHTTPRequest
from ray.serve._private.constants import SERVE_NAMESPACE

__all__ = ["Proxies", "remember_proxies"]

_Receive = Callable[[Any], Awaitable[bytes]]


class Proxies:
    """Handles of proxies by name.

    Args:
        find: from a name to its actor; slow.
    """

    def __init__(self, find: Callable[[str], Any]) -> None:
        self._find = find
        self._known: dict[str, tuple[Any, _Receive]] = {}

    def receiving(self, name: str) -> _Receive:
        """What reads messages of a request from a proxy, as Serve calls it."""
        self._actor(name)  # errors of the look-up belong here

        async def receive(metadata: Any) -> bytes:
            proxy = self._actor(name)
            try:
                found = await proxy[1](metadata)
            except RayActorError:
                if self._known.get(name) is proxy:  # one that is started again has its name again
                    del self._known[name]
                found = await self._actor(name)[1](metadata)
            return found

        return receive

    def _actor(self, name: str) -> tuple[Any, _Receive]:
        """A proxy, and its method: made once too, since Ray makes one for each time that it is named."""
        if name not in self._known:
            actor = self._find(name)
            self._known[name] = actor, actor.receive_asgi_messages.remote
        return self._known[name]


def remember_proxies() -> None:
    """Let the requests of this process find their proxies here."""
    proxies = Proxies(lambda name: ray.get_actor(name, namespace=SERVE_NAMESPACE))

    def receive_asgi_messages(request: Any) -> _Receive:
        given: _Receive | None = request._receive_asgi_messages
        return given or proxies.receiving(request._proxy_actor_name)

    # Serve has no place for it of its own.
    StreamingHTTPRequest.receive_asgi_messages = property(receive_asgi_messages)
