"""From a request to a response: who asks, what is asked of the policy, and the events of the answer sent.

Who waits for whom: a response for the events of its answer; the first of them comes before the response
begins, so that until then an error has a status of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Send

from stateset_ray.serving.answers import DONE, Answer, framed
from stateset_ray.serving.dispatch import Policies, answered
from stateset_ray.serving.events import Ask, Event
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.reading import SamplingRequest
from stateset_ray.serving.security import Caller
from stateset_ray.serving.settings import ServeSettings

__all__ = ["VERSION_HEADER", "Replying", "caller_of", "no_such_model", "short"]

VERSION_HEADER = "x-policy-version"
_COLDEST = 1e-4  # below this temperature the likeliest token is taken
_SPARE_SECONDS = 1.0  # in which who reads is told that the answer took too long
_log = logging.getLogger("ray.serve")
_closing = set[asyncio.Task[None]]()  # answers that nobody reads any more


class Replying:
    """What all routes that let the policy speak have in common.

    Args:
        settings: of the endpoint.
        policies: what answers.
        meters: where it is counted.
    """

    def __init__(self, settings: ServeSettings, policies: Policies, meters: Meters) -> None:
        self.settings = settings
        self.policies = policies
        self.meters = meters

    def check_model(self, name: str) -> None:
        """Refuse another model than the one that is served.

        Raises:
            ApiError: 404.
        """
        if name != self.settings.name:
            raise no_such_model()

    def ask(
        self, request: Request, wanted: SamplingRequest, conversation: str | None = None,
        session: str | None = None, **more: Any,
    ) -> Ask:  # fmt: skip
        """What the policy is asked.

        Args:
            conversation: the one that is kept here; it goes before the header: all its turns are one session,
                whoever asks for them.
            session: the name of the conversation where neither names it.
            more: the fields of `Ask` that only this kind of request has.

        Raises:
            ApiError: the header is too long.
        """
        caller = caller_of(request)
        header = request.headers.get("x-session-id") or ""
        if len(header) > 256:
            raise ApiError(
                400, "invalid_header", "x-session-id is longer than 256 characters", "x-session-id"
            )
        name = conversation or header or session
        temperature = self.settings.temperature if wanted.temperature is None else wanted.temperature
        fields: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "tenant": caller.name,
            # By its hash: it names a place on the ring and stands in Serve's own logs.
            "session": short(f"{caller.name}/{name}") if name else "",
            "messages": (),
            "max_tokens": wanted.max_tokens,
            # Logits divided by less are beyond what a float32 holds, which looks like a broken model.
            "temperature": temperature if temperature >= _COLDEST else 0.0,
            "seed": secrets.randbits(62) if wanted.seed is None else wanted.seed,
            "stops": wanted.stops,
            "choices": wanted.n,
            "stream": wanted.stream,
            "top_p": 1.0 if wanted.top_p is None else wanted.top_p,
        }
        return Ask(**fields | more)

    def answered(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """See `dispatch.answered`."""
        return answered(self.policies, ask, self.settings, self.meters)

    async def respond(
        self, request: Request, wanted: SamplingRequest, answer: Answer,
        events: AsyncGenerator[tuple[Event, ...]], seconds: float,
    ) -> Response:  # fmt: skip
        """The response of an answer, whole or as a stream.

        Args:
            seconds: the longest that the answer may take.

        Raises:
            ApiError: it failed before the response began.
        """
        started = time.monotonic()
        log = request.scope["state"].setdefault("log", {})
        log |= {"completion": answer.id, "user": short(wanted.user or ""), "stream": wanted.stream}
        first = await anext(events)
        answer.take(first)
        self.meters.observe("first_token_seconds", time.monotonic() - started)
        if not wanted.stream:
            async for news in events:
                answer.take(news)
        log["policy_version"] = answer.version
        headers = {VERSION_HEADER: answer.version}
        if not wanted.stream:
            self.meters.add("prompt_tokens", answer.usage.prompt)
            return JSONResponse(answer.completion(), headers=headers)
        headers["x-accel-buffering"] = "no"  # proxies that would collect the stream
        body = self._stream(answer, first, events, wanted.include_usage, request.scope["state"]["request_id"])
        return _Stream(body, seconds + _SPARE_SECONDS, headers)

    async def _stream(
        self, answer: Answer, first: tuple[Event, ...], events: AsyncGenerator[tuple[Event, ...]],
        usage: bool, request: str,
    ) -> AsyncGenerator[bytes]:  # fmt: skip
        pending: asyncio.Task[tuple[Event, ...] | None] | None = None
        try:
            for chunk in answer.opening():
                yield framed(chunk)
            for chunk in answer.chunks(first):
                yield framed(chunk)
            while True:
                pending = pending or asyncio.ensure_future(_next(events))
                done, _ = await asyncio.wait({pending}, timeout=self.settings.deadlines.keep_alive)
                if not done:
                    yield b": still working\n\n"
                    continue
                news, pending = pending.result(), None
                if news is None:
                    break
                answer.take(news)
                for chunk in answer.chunks(news):
                    yield framed(chunk)
            if usage:
                yield framed(answer.usage_chunk())
        except ApiError as error:
            yield framed(error.body())
        except (asyncio.CancelledError, GeneratorExit):
            self.meters.add("cancelled")
            raise
        except Exception:  # the response has begun: nobody else can say so any more
            _log.exception("a stream failed", extra={"request": request})
            yield framed(ApiError(500, "internal_error", "the server failed to answer").body())
        finally:
            self.meters.add("prompt_tokens", answer.usage.prompt)
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await events.aclose()  # frees what it still holds
        yield DONE


class _Stream(StreamingResponse):
    """A response that ends, and lets go of its answer, also where its client leaves or does not read.

    Args:
        seconds: after which it is given up.
    """

    def __init__(self, body: AsyncGenerator[bytes], seconds: float, headers: dict[str, str]) -> None:
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._body = body
        self._seconds = seconds

    async def stream_response(self, send: Send) -> None:
        """See `StreamingResponse`."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().stream_response(send)
        except TimeoutError:
            _log.warning("a client did not read its answer in time")
        finally:
            # By a task of its own: who has cancelled this one cancels it again at its next wait.
            task = asyncio.create_task(self._body.aclose())
            _closing.add(task)
            task.add_done_callback(_closing.discard)
            await asyncio.shield(task)


def caller_of(request: Request) -> Caller:
    """Who asks, as the gate has found out."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


def no_such_model() -> ApiError:
    """The refusal of another model."""
    return ApiError(404, "model_not_found", "there is no such model here", "model")


def short(text: str) -> str:
    """A name that gives nothing away; "" for nothing."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if text else ""


async def _next(events: AsyncGenerator[tuple[Event, ...]]) -> tuple[Event, ...] | None:
    return await anext(events, None)
