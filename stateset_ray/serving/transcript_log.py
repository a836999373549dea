"""A sample of the conversations that were served, as lines of JSON: for people, and to learn from.

Off unless `transcripts.folder` is set. Whole conversations are sampled, by the hash of their names, so that
what is kept can be replayed (`environments.transcripts`). Only answers that were completed are kept. Keys
are never written, nor (unless `transcripts.redact` is off) what looks like personal data.

Every ingress replica writes files of its own. Who waits for whom: nobody. Lines are written in a thread,
behind the answer; what cannot be written is counted and dropped, and no client hears of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stateset_ray.errors import ConfigError
from stateset_ray.serving.dispatch import Policies
from stateset_ray.serving.events import Ask, Began, Ended, Event, Piece
from stateset_ray.serving.lines import append_line
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.redaction import redact, redact_keys
from stateset_ray.serving.release import falls_to
from stateset_ray.serving.settings import TranscriptSettings
from stateset_ray.types import Message

__all__ = ["SampledPolicies", "TranscriptLog"]

_log = logging.getLogger("ray.serve")
_BACKLOG = 256  # lines that may wait to be written; a slow disk must not fill the memory
_NAME = "transcripts-{}.jsonl"


class TranscriptLog:
    """The files of one ingress replica; the folder is made if missing, for its owner only.

    Args:
        settings: with a folder.
        meters: where lines are counted.

    Raises:
        ConfigError: there is no folder, or it cannot be made.
    """

    def __init__(self, settings: TranscriptSettings, meters: Meters) -> None:
        if settings.folder is None:
            raise ConfigError("a log of transcripts needs a folder", mend="set transcripts.folder")
        self._settings = settings
        self._folder = settings.folder
        self._meters = meters
        self._file = self._next_file()
        self._writing: asyncio.Task[None] | None = None
        self._waiting: list[str] = []
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the folder of transcripts cannot be made: {error.strerror}", given=str(self._folder)
            ) from error

    def samples(self, ask: Ask) -> bool:
        """Whether this conversation is in the sample: all of its turns are, or none.

        Bare prompts are not, nor what was asked with tools of the client: a line has no place for these, and
        a policy that learned from it would call tools that it was not shown.
        """
        if ask.prompt is not None or ask.tools:
            return False
        return falls_to("transcripts", self._settings.share, ask.session or ask.id)

    def add(self, ask: Ask, version: str, texts: list[str], ended: list[Ended]) -> None:
        """Have a completed answer written, soon."""
        if len(self._waiting) >= _BACKLOG:
            self._meters.add("transcripts", 1, outcome="dropped")
            return
        self._waiting.append(self._line(ask, version, texts, ended))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all(), name="transcripts")

    @property
    def unwritten(self) -> int:
        """Pieces of work that are left: lines that wait, and what is being written."""
        return len(self._waiting) + int(self._writing is not None and not self._writing.done())

    async def written(self) -> None:
        """Wait until nothing is left to be written."""
        if self._writing is not None:
            await self._writing

    def _line(self, ask: Ask, version: str, texts: list[str], ended: list[Ended]) -> str:
        clean = redact if self._settings.redact else redact_keys
        record = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": ask.id,
            "key": ask.tenant,
            "session": ask.session,
            "version": version,
            "temperature": ask.temperature,
            "messages": [_body(message, clean) for message in ask.messages],
            "stops": [clean(stop) for stop in ask.stops],
            "replies": [
                {"content": clean(text), "finish": end.finish, "tokens": end.tokens}
                for text, end in zip(texts, ended, strict=True)
            ],
        }
        return json.dumps(record, ensure_ascii=True)

    async def _write_all(self) -> None:
        while self._waiting:
            lines, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._write, lines)
            except OSError as error:
                self._meters.add("transcripts", len(lines), outcome="dropped")
                _log.error("transcripts were dropped: %s", error.strerror)
            else:
                self._meters.add("transcripts", len(lines), outcome="written")

    def _write(self, lines: list[str]) -> None:
        for line in lines:
            body = line.encode()
            with suppress(FileNotFoundError):
                if self._file.stat().st_size + len(body) + 1 > self._settings.file_bytes:
                    self._file = self._next_file()
            append_line(self._file, body)
        self._prune()

    def _prune(self) -> None:
        """Remove the oldest files of all who write here."""
        found = sorted(self._folder.glob(_NAME.format("*")), key=lambda path: path.name)
        for path in found[: -self._settings.files]:
            if path != self._file:
                path.unlink(missing_ok=True)

    def _next_file(self) -> Path:
        return self._folder / _NAME.format(f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}")  # sorted by time


class SampledPolicies:
    """Policies whose answers are logged when they are complete; implements `Policies`."""

    def __init__(self, policies: Policies, log: TranscriptLog) -> None:
        self._policies = policies
        self._log = log
        self.status = policies.status
        self.statuses = policies.statuses

    async def ask(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """See `Policies.ask`."""
        kept = self._log.samples(ask)
        version, texts = "", [""] * ask.choices
        ended: dict[int, Ended] = {}
        async with aclosing(self._policies.ask(ask)) as answer:
            async for events in answer:
                for event in events if kept else ():
                    if isinstance(event, Began):
                        version = event.version
                    elif isinstance(event, Piece):
                        texts[event.choice] += event.text
                    elif isinstance(event, Ended):
                        ended[event.choice] = event
                # Before the last events are passed on: whoever has them may close this at once.
                if kept and len(ended) == ask.choices:
                    kept = False
                    self._log.add(ask, version, texts, [ended[i] for i in range(ask.choices)])
                yield events


def _body(message: Message, clean: Callable[[str], str]) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": clean(message.content)}
    if message.tool_calls:
        body["tool_calls"] = [
            {
                "name": call.name,
                "arguments": {key: clean(str(value)) for key, value in call.arguments.items()},
            }
            for call in message.tool_calls
        ]
    return body
