"""Conversations in one SQLite file (WAL), for all ingress replicas of one machine.

Who waits for whom: a method for a thread, its transaction for those of other replicas, a few seconds at most.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from stateset_ray.errors import ConfigError
from stateset_ray.serving.settings import ConversationSettings
from stateset_ray.serving.store import (
    Conversation,
    Item,
    busy,
    check_room,
    crowded,
    expiry,
    new_id,
    no_such,
    unreachable,
)
from stateset_ray.types import Message, Role

__all__ = ["SqliteStore"]

_T = TypeVar("_T")
_WAIT = 5.0  # seconds for the transactions of others
_SCHEMA = """
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, expires REAL NOT NULL,
    metadata TEXT NOT NULL, items INTEGER NOT NULL, chars INTEGER NOT NULL,
    claim TEXT NOT NULL DEFAULT '', claimed REAL NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS by_owner ON conversations (owner);
CREATE INDEX IF NOT EXISTS by_expiry ON conversations (expires);
CREATE TABLE IF NOT EXISTS items (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, role TEXT NOT NULL, content TEXT NOT NULL,
    conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE
) STRICT;
CREATE INDEX IF NOT EXISTS by_conversation ON items (conversation, place);
"""


class SqliteStore:
    """See `store.Store`.

    Args:
        settings: where the file is, and the limits.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, settings: ConversationSettings) -> None:
        self._settings = settings
        path = Path(settings.store.removeprefix("sqlite:///"))
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # others are not to read what was said
            self._database = _opened(path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"conversations cannot be kept there: {error}", given=str(path)) from error
        self._lock = threading.Lock()

    async def create(
        self, owner: str, metadata: Mapping[str, str], messages: Sequence[Message]
    ) -> Conversation:
        """See `Store.create`."""
        check_room(self._settings, 0, 0, messages)
        made = Conversation(new_id("conv"), time.time(), dict(metadata))

        def work(database: sqlite3.Connection) -> Conversation:
            database.execute("DELETE FROM conversations WHERE expires < ?", (time.time(),))
            [count] = database.execute(
                "SELECT count(*) FROM conversations WHERE owner = ?", (owner,)
            ).fetchone()
            if count >= self._settings.per_key:
                raise crowded(self._settings)
            database.execute(
                "INSERT INTO conversations (id, owner, created, expires, metadata, items, chars)"
                " VALUES (?, ?, ?, ?, ?, 0, 0)",
                (made.id, owner, made.created, expiry(self._settings), json.dumps(made.metadata)),
            )
            self._add(database, made.id, messages)
            return made

        return await self._do(work)

    async def get(self, owner: str, id: str) -> Conversation:
        """See `Store.get`."""

        def work(database: sqlite3.Connection) -> Conversation:
            self._owned(database, owner, id)
            created, metadata = database.execute(
                "SELECT created, metadata FROM conversations WHERE id = ?", (id,)
            ).fetchone()
            return Conversation(id, created, json.loads(metadata))

        return await self._do(work)

    async def items(self, owner: str, id: str) -> list[Item]:
        """See `Store.items`."""

        def work(database: sqlite3.Connection) -> list[Item]:
            self._owned(database, owner, id)
            rows = database.execute(
                "SELECT id, role, content FROM items WHERE conversation = ? ORDER BY place", (id,)
            )
            return [Item(name, Message(_role(role), content)) for name, role, content in rows]

        return await self._do(work)

    async def delete(self, owner: str, id: str) -> None:
        """See `Store.delete`."""

        def work(database: sqlite3.Connection) -> None:
            self._owned(database, owner, id)
            database.execute("DELETE FROM conversations WHERE id = ?", (id,))

        await self._do(work)

    async def claim(self, owner: str, id: str, seconds: float) -> str:
        """See `Store.claim`."""
        claim = new_id("claim")

        def work(database: sqlite3.Connection) -> str:
            _, _, _, until = self._owned(database, owner, id)
            if until > time.time():
                raise busy()
            database.execute(
                "UPDATE conversations SET claim = ?, claimed = ? WHERE id = ?",
                (claim, time.time() + seconds, id),
            )
            return claim

        return await self._do(work)

    async def append(self, owner: str, id: str, claim: str, messages: Sequence[Message]) -> list[Item]:
        """See `Store.append`."""

        def work(database: sqlite3.Connection) -> list[Item]:
            items, chars, held, until = self._owned(database, owner, id)
            if held != claim or until <= time.time():
                raise busy()
            check_room(self._settings, items, chars, messages)
            return self._add(database, id, messages)

        return await self._do(work)

    async def release(self, owner: str, id: str, claim: str) -> None:
        """See `Store.release`."""

        def work(database: sqlite3.Connection) -> None:
            database.execute(
                "UPDATE conversations SET claim = '', claimed = 0 WHERE id = ? AND owner = ? AND claim = ?",
                (id, owner, claim),
            )

        await self._do(work)

    async def close(self) -> None:
        """See `Store.close`."""
        await asyncio.to_thread(self._database.close)

    def _add(self, database: sqlite3.Connection, id: str, messages: Sequence[Message]) -> list[Item]:
        added = [Item(new_id("msg"), message) for message in messages]
        database.executemany(
            "INSERT INTO items (id, role, content, conversation) VALUES (?, ?, ?, ?)",
            [(item.id, item.message.role, item.message.content, id) for item in added],
        )
        database.execute(
            "UPDATE conversations SET items = items + ?, chars = chars + ?, expires = ? WHERE id = ?",
            (len(added), sum(len(m.content) for m in messages), expiry(self._settings), id),
        )
        return added

    @staticmethod
    def _owned(database: sqlite3.Connection, owner: str, id: str) -> tuple[int, int, str, float]:
        """(items, characters, claim, until when) of a conversation that is the owner's, and not expired."""
        row: tuple[int, int, str, float] | None = database.execute(
            "SELECT items, chars, claim, claimed FROM conversations"
            " WHERE id = ? AND owner = ? AND expires >= ?",
            (id, owner, time.time()),
        ).fetchone()
        if row is None:
            raise no_such()
        return row

    async def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """One transaction, in a thread; what it raises takes everything back."""

        def alone() -> _T:
            # A disk that hangs must not take every thread of the process, one request after the other.
            if not self._lock.acquire(timeout=_WAIT):
                raise unreachable()
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    result = work(self._database)
                    self._database.execute("COMMIT")
                finally:
                    if self._database.in_transaction:
                        self._database.execute("ROLLBACK")
                return result
            except sqlite3.Error as error:
                raise unreachable() from error
            finally:
                self._lock.release()

        return await asyncio.to_thread(alone)


def _opened(path: Path) -> sqlite3.Connection:
    """The file with its tables; tried again, since who makes it locks out others, who do not wait."""
    end = time.monotonic() + _WAIT
    while True:
        database = sqlite3.connect(path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA foreign_keys = ON")
            database.executescript(_SCHEMA)
            return database
        except sqlite3.Error as error:
            database.close()
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(random.uniform(0.01, 0.05))


def _role(name: str) -> Role:
    role: Role = name  # type: ignore[assignment]  # the table holds what a Message had
    return role
