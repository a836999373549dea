"""`/v1/completions`: going on with texts or token ids, several at a time."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from fastapi import FastAPI, Request
from starlette.responses import Response

from stateset_ray.serving.answers import TextAnswer
from stateset_ray.serving.events import Ended, Event, Piece
from stateset_ray.serving.reading import body_schema
from stateset_ray.serving.replying import Replying
from stateset_ray.serving.text_protocol import TextRequest, parse_text
from stateset_ray.types import derive_seed

__all__ = ["add_texts", "together"]


def add_texts(app: FastAPI, replying: Replying) -> None:
    """Add the route."""

    @app.post("/v1/completions", openapi_extra=body_schema(TextRequest))
    async def completions(request: Request) -> Response:
        """Go on with each prompt."""
        wanted = parse_text(await request.body(), replying.settings.limits)
        replying.check_model(wanted.model)
        prompts = wanted.prompts()
        first = replying.ask(
            request, wanted, prompt=prompts[0], logprobs=wanted.logprobs is not None, top=wanted.logprobs or 0
        )
        first = replace(first, lot=first.session or first.id)  # one response is of one version
        asks = [first]
        for place, prompt in enumerate(prompts[1:], 1):
            seed = derive_seed(first.seed, "prompt", place)
            asks.append(replace(first, id=uuid.uuid4().hex, session="", prompt=prompt, seed=seed))
        answer = TextAnswer(
            f"cmpl-{uuid.uuid4().hex}", wanted.model, int(time.time()), len(asks) * wanted.n, first.logprobs
        )
        answers = [replying.answered(ask) for ask in asks]
        events = answers[0] if len(answers) == 1 else together(answers, wanted.n)
        return await replying.respond(request, wanted, answer, events, replying.settings.deadlines.total)


async def together(
    answers: Sequence[AsyncGenerator[tuple[Event, ...]]], choices: int
) -> AsyncGenerator[tuple[Event, ...]]:
    """The events of several answers as they come; the choices of the k-th begin at k * `choices`.

    Raises:
        Exception: what the first that fails raises; the others are given up.
    """
    inbox: asyncio.Queue[tuple[Event, ...] | BaseException | None] = asyncio.Queue()

    async def forward(place: int, answer: AsyncGenerator[tuple[Event, ...]]) -> None:
        try:
            async with aclosing(answer):
                async for events in answer:
                    inbox.put_nowait(tuple(_moved(event, place * choices) for event in events))
            inbox.put_nowait(None)
        except Exception as error:
            inbox.put_nowait(error)

    tasks = [asyncio.create_task(forward(place, answer)) for place, answer in enumerate(answers)]
    try:
        running = len(tasks)
        while running:
            news = await inbox.get()
            if isinstance(news, BaseException):
                raise news
            if news is None:
                running -= 1
            else:
                yield news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _moved(event: Event, by: int) -> Event:
    return replace(event, choice=event.choice + by) if isinstance(event, Piece | Ended) else event
