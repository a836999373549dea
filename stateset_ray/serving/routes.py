"""The routes of the endpoint, without Ray: what they need of it is `Policies`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from stateset_ray import __version__
from stateset_ray.errors import StatesetError
from stateset_ray.serving.admin import add_release
from stateset_ray.serving.answers import DONE, Answer, framed
from stateset_ray.serving.dispatch import Policies, answered
from stateset_ray.serving.events import Ask, Event
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.gate import error_response
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.page import add_page
from stateset_ray.serving.protocol import ChatRequest, parse_chat, parse_json
from stateset_ray.serving.security import Caller
from stateset_ray.serving.settings import ServeSettings
from stateset_ray.serving.source import Source, pin

__all__ = ["routes"]

_log = logging.getLogger("ray.serve")
_PULSE_SECONDS = 1.0  # for which an answer to whether anybody is ready holds
_BUSY_SECONDS = 20.0  # for which replicas that do not answer are taken to be busy
_READY_SECONDS = 5.0
_VERSION = "x-policy-version"
_CHAT_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": ChatRequest.model_json_schema()}},
    }
}


def routes(settings: ServeSettings, policies: Policies, meters: Meters) -> FastAPI:
    """The application behind the gate."""
    # Swagger's page would load scripts from elsewhere; the document itself is at /openapi.json.
    app = FastAPI(title="stateset_ray", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_failure)
    chat = _Chat(settings, policies, meters)
    model = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "stateset_ray"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{id:path}")
    async def one_model(id: str) -> dict[str, Any]:
        """The model, if this is its id."""
        if id != settings.name:
            raise _no_such_model()
        return model

    @app.post("/v1/chat/completions", openapi_extra=_CHAT_SCHEMA)
    async def chat_completions(request: Request) -> Response:
        """Reply to a conversation."""
        return await chat.complete(request)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of the software."""
        return {"version": __version__}

    _add_health(app, policies)
    _add_admin(app, settings, policies)
    add_release(app, settings)
    if settings.page:
        add_page(app)
    return app


def _add_health(app: FastAPI, policies: Policies) -> None:
    pulse = _Pulse(policies)

    async def healthz() -> dict[str, str]:
        """This ingress replica is alive."""
        return {"status": "ok"}

    async def readyz() -> Response:
        """A policy replica can answer."""
        version = await pulse.version()
        if version is None:
            return JSONResponse({"status": "no policy replica answers"}, 503)
        return JSONResponse({"status": "ready", "version": version})

    for path in ("/healthz", "/health", "/health/live"):
        app.get(path)(healthz)
    for path in ("/readyz", "/health/ready"):
        app.get(path)(readyz)


class _Pulse:
    """Whether a policy replica answers; asked once for all who want to know, since they need no key."""

    def __init__(self, policies: Policies) -> None:
        self._policies = policies
        self._version: str | None = None
        self._asked = self._answered = -math.inf
        self._asking = asyncio.Lock()

    async def version(self) -> str | None:
        """What a replica answers with; None if none has answered for a while.

        Replicas that are busy do not answer at once; they are ready all the same.
        """
        async with self._asking:
            if time.monotonic() - self._asked > _PULSE_SECONDS:
                try:
                    async with asyncio.timeout(_READY_SECONDS):
                        self._version = str((await self._policies.status())["version"])
                    self._answered = time.monotonic()
                except Exception as error:  # whatever it is, the answer is the same
                    _log.debug("no policy replica said what it holds: %s", error)
                self._asked = time.monotonic()
        return self._version if time.monotonic() - self._answered < _BUSY_SECONDS else None


def _add_admin(app: FastAPI, settings: ServeSettings, policies: Policies) -> None:
    @app.get("/admin/weights")
    async def weights(request: Request) -> dict[str, Any]:
        """What every policy replica holds."""
        _caller(request).need("admin")  # as the gate has seen to; a mistake there must not open this
        return {"replicas": await policies.statuses()}

    @app.post("/admin/weights")
    async def choose_weights(request: Request) -> dict[str, Any]:
        """Hold the run at one checkpoint (a rollback), or with null go on to its newest.

        The replicas follow within `swap.poll_seconds`.
        """
        _caller(request).need("admin")
        body = parse_json(await request.body(), settings.limits)
        if body.keys() != {"checkpoint"} or not isinstance(body["checkpoint"], str | None):
            raise ApiError(
                400, "invalid_parameter", 'send {"checkpoint": "step-00000012"} or null', "checkpoint"
            )
        run = Source(settings.source).run
        if run is None:
            raise ApiError(409, "no_run", "one model is served here, and not a run with its checkpoints")
        try:
            await asyncio.to_thread(pin, run, body["checkpoint"])
        except StatesetError:
            raise ApiError(
                400, "invalid_checkpoint", "this is not the name of a whole checkpoint", "checkpoint"
            ) from None
        return {"checkpoint": body["checkpoint"]}


class _Chat:
    """Chat completions."""

    def __init__(self, settings: ServeSettings, policies: Policies, meters: Meters) -> None:
        self._settings = settings
        self._policies = policies
        self._meters = meters

    async def complete(self, request: Request) -> Response:
        started = time.monotonic()
        wanted = parse_chat(await request.body(), self._settings.limits)
        if wanted.model != self._settings.name:
            raise _no_such_model()
        ask = self._ask(request, wanted)
        answer = Answer(
            f"chatcmpl-{uuid.uuid4().hex}", wanted.model, int(time.time()), wanted.n, wanted.logprobs
        )
        log = request.scope["state"].setdefault("log", {})
        log |= {"completion": answer.id, "user": _short(wanted.user or ""), "stream": wanted.stream}
        events = answered(self._policies, ask, self._settings, self._meters)
        # The first event comes before the response begins: until then an error has a status of its own.
        first = await anext(events)
        answer.take(first)
        log["policy_version"] = answer.version
        self._meters.add("prompt_tokens", answer.usage.prompt)
        self._meters.observe("first_token_seconds", time.monotonic() - started)
        headers = {_VERSION: answer.version}
        if not wanted.stream:
            await events.aclose()
            return JSONResponse(answer.completion(), headers=headers)
        headers["x-accel-buffering"] = "no"  # proxies that would collect the stream
        body = self._stream(answer, events, wanted.include_usage)
        return StreamingResponse(body, media_type="text/event-stream", headers=headers)

    def _ask(self, request: Request, wanted: ChatRequest) -> Ask:
        caller = _caller(request)
        session = request.headers.get("x-session-id") or wanted.prompt_cache_key or ""
        if len(session) > 256:
            raise ApiError(
                400, "invalid_header", "x-session-id is longer than 256 characters", "x-session-id"
            )
        return Ask(
            id=uuid.uuid4().hex,
            tenant=caller.name,
            # By its hash: it names a place on the ring and stands in Serve's own logs.
            session=_short(f"{caller.name}/{session}") if session else "",
            messages=wanted.conversation(),
            max_tokens=wanted.reply_tokens,
            temperature=self._settings.temperature if wanted.temperature is None else wanted.temperature,
            seed=secrets.randbits(62) if wanted.seed is None else wanted.seed,
            stops=wanted.stops,
            choices=wanted.n,
            logprobs=wanted.logprobs,
            stream=wanted.stream,
        )

    async def _stream(
        self, answer: Answer, events: AsyncGenerator[tuple[Event, ...]], usage: bool
    ) -> AsyncIterator[bytes]:
        pending: asyncio.Task[tuple[Event, ...] | None] | None = None
        try:
            for chunk in answer.opening():
                yield framed(chunk)
            while True:
                pending = pending or asyncio.ensure_future(_next(events))
                done, _ = await asyncio.wait({pending}, timeout=self._settings.deadlines.keep_alive)
                if not done:
                    yield b": still working\n\n"
                    continue
                news, pending = pending.result(), None
                if news is None:
                    break
                for chunk in answer.chunks(news):
                    yield framed(chunk)
            if usage:
                yield framed(answer.usage_chunk())
        except ApiError as error:
            yield framed(error.body())
        except asyncio.CancelledError:
            self._meters.add("cancelled")
            raise
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await events.aclose()  # frees what it still holds
        yield DONE


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["state"]["caller"]
    return caller


async def _next(events: AsyncGenerator[tuple[Event, ...]]) -> tuple[Event, ...] | None:
    return await anext(events, None)


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http(_: Request, error: Exception) -> Response:
    """Starlette's own refusals, in our shape."""
    assert isinstance(error, HTTPException)
    known = {404: ("not_found", "there is no such route"), 405: ("method_not_allowed", "not by this method")}
    code, message = known.get(error.status_code, ("refused", "the request was refused"))
    return error_response(ApiError(error.status_code, code, message))


async def _on_failure(_: Request, __: Exception) -> Response:
    """A failure of ours, which the gate writes to the log; clients are told nothing of it."""
    return error_response(ApiError(500, "internal_error", "the server failed to answer"))


def _no_such_model() -> ApiError:
    return ApiError(404, "model_not_found", "there is no such model here", "model")


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if text else ""
