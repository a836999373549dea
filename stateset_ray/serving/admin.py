"""The routes of a release: canary, promote, rollback; for keys with the scope `admin`.

They change the files in the run's folder (`release`); the replicas follow within `swap.poll_seconds`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request

from stateset_ray.errors import StatesetError
from stateset_ray.serving import release
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.reading import parse_json
from stateset_ray.serving.security import Caller
from stateset_ray.serving.settings import ServeSettings
from stateset_ray.serving.source import Source

__all__ = ["add_release"]


def add_release(app: FastAPI, settings: ServeSettings) -> None:
    """Add the routes to an application behind the gate."""

    @app.get("/admin/release")
    async def show(request: Request) -> dict[str, Any]:
        """What the run's folder says; `GET /admin/weights` has what each replica holds."""
        run = _run(request, settings)
        return await _done(lambda: _shown(run))

    @app.post("/admin/canary")
    async def canary(request: Request) -> dict[str, Any]:
        """Let a checkpoint answer a share of the conversations."""
        run = _run(request, settings)
        body = parse_json(await request.body(), settings.limits)
        name, share = body.get("checkpoint"), body.get("share")
        if body.keys() != {"checkpoint", "share"} or not isinstance(name, str) or type(share) is not float:
            raise ApiError(
                400, "invalid_parameter", 'send {"checkpoint": "step-00000012", "share": 0.1}', "checkpoint"
            )
        await _done(lambda: release.start_canary(run, name, share))
        return await _done(lambda: _shown(run))

    @app.post("/admin/promote")
    async def promote(request: Request) -> dict[str, Any]:
        """Let the canary answer everybody."""
        run = _run(request, settings)
        await _done(lambda: release.promote(run))
        return await _done(lambda: _shown(run))

    @app.post("/admin/rollback")
    async def rollback(request: Request) -> dict[str, Any]:
        """End the canary, or go back to the version before."""
        run = _run(request, settings)
        await _done(lambda: release.rollback(run))
        return await _done(lambda: _shown(run))


def _run(request: Request, settings: ServeSettings) -> Path:
    caller: Caller = request.scope["state"]["caller"]
    caller.need("admin")  # as the gate has seen to; a mistake there must not open this
    run = Source(settings.source).run
    if run is None:
        raise ApiError(409, "no_run", "one model is served here, and not a run with its checkpoints")
    return run


def _shown(run: Path) -> dict[str, Any]:
    found = release.tried(run)
    return {
        "checkpoint": release.answering(run),
        "pinned": release.pinned(run) is not None,
        "canary": {"checkpoint": found[0], "share": found[1]} if found else None,
    }


async def _done(change: Callable[[], Any]) -> Any:
    try:
        return await asyncio.to_thread(change)
    except StatesetError:
        # Its words name paths, which are nothing for clients.
        raise ApiError(
            400, "invalid_release", "this cannot be done with the run as it is", "checkpoint"
        ) from None
