"""The routes of the endpoint, without Ray: what they need of it is `Policies`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from stateset_ray import __version__
from stateset_ray.errors import StatesetError
from stateset_ray.serving.admin import add_release
from stateset_ray.serving.agent import add_agent
from stateset_ray.serving.chats import add_chats
from stateset_ray.serving.conversations import add_conversations
from stateset_ray.serving.dispatch import Policies
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.gate import error_response
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.page import add_page
from stateset_ray.serving.pulse import Pulse
from stateset_ray.serving.reading import parse_json
from stateset_ray.serving.replying import Replying, caller_of, no_such_model
from stateset_ray.serving.settings import ServeSettings
from stateset_ray.serving.source import Source, pin
from stateset_ray.serving.stores import open_store
from stateset_ray.serving.texts import add_texts

__all__ = ["routes"]


def routes(settings: ServeSettings, policies: Policies, meters: Meters) -> FastAPI:
    """The application behind the gate."""
    # Swagger's page would load scripts from elsewhere; the document itself is at /openapi.json.
    app = FastAPI(title="stateset_ray", version=__version__, docs_url=None, redoc_url=None)
    app.state.lasting = []  # each counts what goes on behind a request; a drain waits for it
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_failure)
    pulse = Pulse(policies)
    replying = Replying(settings, pulse, meters)
    store = open_store(settings.conversations)
    model = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "stateset_ray"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{id:path}")
    async def one_model(id: str) -> dict[str, Any]:
        """The model, if this is its id."""
        if id != settings.name:
            raise no_such_model()
        return model

    add_chats(app, replying, store)
    add_texts(app, replying)
    add_agent(app, replying, store)
    if store is not None:
        add_conversations(app, settings, store)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of the software."""
        return {"version": __version__}

    _add_health(app, pulse)
    _add_admin(app, settings, policies)
    add_release(app, settings)
    if settings.page:
        add_page(app)
    return app


def _add_health(app: FastAPI, pulse: Pulse) -> None:
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


def _add_admin(app: FastAPI, settings: ServeSettings, policies: Policies) -> None:
    @app.get("/admin/weights")
    async def weights(request: Request) -> dict[str, Any]:
        """What every policy replica holds."""
        caller_of(request).need("admin")  # as the gate has seen to; a mistake there must not open this
        return {"replicas": await policies.statuses()}

    @app.post("/admin/weights")
    async def choose_weights(request: Request) -> dict[str, Any]:
        """Hold the run at one checkpoint (a rollback), or with null go on to its newest.

        The replicas follow within `swap.poll_seconds`.
        """
        caller_of(request).need("admin")
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
