"""Served conversations, logged by an endpoint's own log, are learned from by a real warm start."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from playground import small

from stateset_ray.serving.events import Ask, Began, Ended, Piece
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.settings import TranscriptSettings
from stateset_ray.serving.transcript_log import SampledPolicies, TranscriptLog
from stateset_ray.train import train
from stateset_ray.types import Message

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


class Repeating:
    """Policies that say back the last word; implements `Policies`."""

    async def ask(self, ask):
        yield (Began("v1", 1),)
        yield (Piece(0, ask.messages[-1].content.split()[-1]), Ended(0, "stop", 1))

    async def status(self):
        return {}

    async def statuses(self):
        return []


class Uncounted:
    """In the place of a metric."""

    def __init__(self, _):
        pass

    def inc(self, amount, tags):
        pass


def test_what_was_served_is_learned(tmp_path: Path) -> None:
    async def serve() -> None:
        log = TranscriptLog(TranscriptSettings(folder=tmp_path / "log", share=1), Meters(Uncounted))
        policies = SampledPolicies(Repeating(), log)
        for number, word in enumerate(("cab", "bac", "abc", "cba", "bca", "acb") * 3):
            said = (Message("user", f"{number} Say: {word}"),)
            async for _ in policies.ask(Ask(str(number), "shop", "", said, None, 1.0, 1)):
                pass
        await log.written()

    asyncio.run(serve())
    config = small(
        tmp_path, "environment.path=stateset_ray.environments.transcripts:Transcripts",
        f"environment.options.path={json.dumps(str(tmp_path / 'log'))}",
        "train.warm_start.steps=12", "train.warm_start.learning_rate=1e-2", "train.steps=1",
    )  # fmt: skip
    events: list[dict] = []
    train(config, on_event=lambda event: events.append(dict(event)))
    losses = [event["loss"] for event in events if event["event"] == "warm_start"]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
