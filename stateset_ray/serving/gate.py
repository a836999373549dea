"""What every request passes before anything looks at it: who asks, how much, by which headers.

A layer around the whole application (ASGI), so that no route, and no mistake in one, lies outside of it: a
route that is not in `_OPEN` (or the page, which holds nothing) needs a key, whether it exists or not.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.rates import Rates
from stateset_ray.serving.room import Refusals
from stateset_ray.serving.security import Caller, KeyRing, is_loopback
from stateset_ray.serving.settings import ServeSettings

__all__ = ["Gate", "error_response"]

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_ASKING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/agent/chat/completions"})
_READY = frozenset({"/readyz", "/health/ready"})
_OPEN = frozenset({"/healthz", "/health", "/health/live"}) | _READY
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# By these any client could switch off the proxy's time limit, its cancellation, or its choice of replica.
# Answers are not kept to be given again: who relies on the last is told so, as with any other parameter.
_REFUSED = (
    "x-request-timeout-seconds", "x-request-disconnect-disabled", "serve-multiplexed-model-id",
    "idempotency-key",
)  # fmt: skip
_SESSION = "x-session-id"
_REQUEST_ID = "x-request-id"
_log = logging.getLogger("ray.serve")


class Gate:
    """Lets requests through to an application, or answers them itself.

    Args:
        app: the application.
        keys: who may ask.
        rates: how much.
        settings: of the endpoint.
        meters: where requests are counted.
        full: whether the policy has no room for one more question.

    Attributes:
        draining: True once no new requests are taken.
    """

    def __init__(
        self, app: _App, keys: KeyRing, rates: Rates, settings: ServeSettings, meters: Meters,
        full: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._app = app
        self._keys = keys
        self._rates = rates
        self._settings = settings
        self._meters = meters
        self._full = full
        self._refusals = Refusals()
        self._open = _OPEN | ({"/"} if settings.page else set())
        self._running = 0
        self.draining = False

    @property
    def running(self) -> int:
        """Requests under way."""
        return self._running

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:  # no route speaks WebSocket
                await send({"type": "websocket.close", "code": 1008})
            return
        visit = _Visit(scope, receive, send)
        self._running += 1
        self._meters.set("in_progress", self._running)
        try:
            await self._pass(visit)
        finally:
            self._running -= 1
            self._meters.set("in_progress", self._running)
            self._record(visit)

    async def _pass(self, visit: _Visit) -> None:
        try:
            caller = self._admit(visit)
            if caller is None:
                await self._app(visit.scope, visit.receive, visit.send)
                return
            visit.caller = caller
            visit.scope.setdefault("state", {})["caller"] = caller
            visit.limit(self._settings.limits.body_bytes, self._settings.deadlines.body)
            if _is_admin(visit.path):
                await self._app(visit.scope, visit.receive, visit.send)
                return
            await self._rates.count(caller.name)
            if visit.asks and self._full():
                self._meters.add("shed", 1, reason="overloaded")
                visit.shed = True
                await self._refusals.send(visit.send)
                return
            with self._rates.running(caller.name):
                await self._app(visit.scope, visit.receive, visit.send)
        except ApiError as error:
            if error.status == 429:
                self._meters.add("shed", 1, reason=error.code)
            await visit.refuse(error)
        except ClientDisconnect:
            pass  # nobody is there to be told, and nothing failed
        except Exception:
            _log.exception("a request failed", extra={"request": visit.id})
            await visit.refuse(ApiError(500, "internal_error", "the server failed to answer"))

    def _admit(self, visit: _Visit) -> Caller | None:
        """Who asks; None where nobody needs to be known.

        Raises:
            ApiError: the request goes no further.
        """
        headers, path = visit.headers, visit.path
        if not _ID.fullmatch(headers.get(_REQUEST_ID, visit.id)):
            raise ApiError(
                400, "invalid_header", "x-request-id must be 1 to 128 plain characters", _REQUEST_ID
            )
        for given in headers:
            name = given.lower().replace("_", "-")  # Serve takes both for the same
            if name in _REFUSED or (name == _SESSION and "_" in given):  # of which we would read the other
                raise ApiError(400, "unsupported_header", f"the header {name} is not accepted", name)
        if path in self._open:
            if self.draining and path in _READY:
                raise self._draining()
            return None
        if self._keys.open and not is_loopback(_host(headers.get("host", ""))):
            # A page of another site can make a browser ask this machine; it cannot forge this header.
            raise ApiError(403, "wrong_host", "without API keys this endpoint answers to localhost only")
        caller = self._keys.caller(headers.get("authorization"))
        caller.need(_scope_of(path))
        if path != "/" and path.endswith("/"):  # else Starlette would send them elsewhere, by HTTP, for good
            raise ApiError(404, "not_found", "there is no such route")
        if self.draining:
            raise self._draining()
        if visit.scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "unsupported_media_type", "send content-type: application/json")
            if headers.get("content-encoding", "identity") != "identity":
                raise ApiError(415, "unsupported_encoding", "send the body as it is, not compressed")
        return caller

    def _draining(self) -> ApiError:
        return ApiError(503, "draining", "this server is being stopped", retry_after=1.0)

    def _record(self, visit: _Visit) -> None:
        route = visit.path if visit.shed else getattr(visit.scope.get("route"), "path", "none")
        seconds = time.monotonic() - visit.started
        self._meters.add("requests", 1, path=route, status=f"{visit.status // 100}xx")
        self._meters.observe("request_seconds", seconds, path=route)
        if route not in _OPEN and not visit.shed:
            _log.info(
                "%s %s by %s: %d in %.3f s", visit.scope["method"], route,
                visit.caller.name if visit.caller else "nobody", visit.status, seconds,
                extra={"request": visit.id, **visit.scope.get("state", {}).get("log", {})},
            )  # fmt: skip


class _Visit:
    """One request on its way through the gate."""

    def __init__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        # Serve's proxy gives every request an id and every response its header. Without one: so do we.
        self._proxied = _REQUEST_ID in self.headers
        self.id = self.headers.get(_REQUEST_ID) or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id
        # An application may be mounted below a prefix, which is no part of its routes.
        self.path = str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"
        self.asks = scope["method"] == "POST" and self.path in _ASKING
        self.caller: Caller | None = None
        self.shed = False
        self.started = time.monotonic()
        self.status = 499  # the client left before there was any
        self._receive = receive
        self._send = send
        self._most: int | None = None
        self._received = 0
        self._whole = False
        self._left = False
        self._end = math.inf

    def limit(self, most: int, seconds: float) -> None:
        """Refuse a body that is longer, by what it says or by what comes, and one that does not come.

        Raises:
            ApiError: 413.
        """
        self._most, self._end = most, time.monotonic() + seconds
        said = self.headers.get("content-length", "0")
        if not said.isdecimal() or len(said) > 18 or int(said) > most:
            raise self._too_long()

    async def receive(self) -> MutableMapping[str, Any]:
        if self._whole:  # what comes now is only that the client has left
            return await self._receive()
        try:
            async with asyncio.timeout(None if math.isinf(self._end) else self._end - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "body_too_slow", "the body did not come in time") from None
        self._left = message["type"] == "http.disconnect"
        self._whole = not message.get("more_body", False)
        self._received += len(message.get("body", b""))
        if self._most is not None and self._received > self._most:
            raise self._too_long()
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self._left:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-content-type-options"] = "nosniff"
            headers["cache-control"] = "no-store"
            if not self._proxied:
                headers[_REQUEST_ID] = self.id
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        if self.status == 499:
            await error_response(error)(self.scope, self.receive, self.send)

    def _too_long(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the body is longer than {self._most} bytes")


def error_response(error: ApiError) -> JSONResponse:
    """An error as every client gets it."""
    return JSONResponse(error.body(), error.status, error.headers())


def _is_admin(path: str) -> bool:
    return _below(path, "/admin")


def _scope_of(path: str) -> str:
    if _is_admin(path):
        return "admin"
    return "agent" if _below(path, "/v1/agent") else "chat"


def _below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}/")


def _host(header: str) -> str:
    return header.rpartition(":")[0] if re.fullmatch(r".*:\d+", header) else header
