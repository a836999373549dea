"""Conversations in Redis, for the ingress replicas of many machines.

    ssr:conversation:ID        hash: owner, created, metadata, items, chars
    ssr:conversation:ID:items  list of JSON [id, role, content]
    ssr:conversation:ID:claim  whose turn it is
    ssr:owner:NAME             sorted set: conversation -> until when it is kept

All keys of a conversation expire together. What must not be interleaved is watched and tried again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import redis.asyncio
import redis.exceptions

from stateset_ray.serving.security import with_password
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
from stateset_ray.types import Message

__all__ = ["RedisStore"]

_T = TypeVar("_T")
_WAIT = 5.0  # seconds for an answer of the server
_ID = re.compile(r"conv_[0-9a-f]{32}")  # another name may be that of another key: `conv_...:items`


class RedisStore:
    """See `store.Store`.

    Args:
        settings: the server's URL, and the limits. A password may come from the environment
            (`security.with_password`).
    """

    def __init__(self, settings: ConversationSettings) -> None:
        self._settings = settings
        self._redis = redis.asyncio.Redis.from_url(
            with_password(settings.store),
            decode_responses=True,
            socket_timeout=_WAIT,
            socket_connect_timeout=_WAIT,
        )

    async def create(
        self, owner: str, metadata: Mapping[str, str], messages: Sequence[Message]
    ) -> Conversation:
        """See `Store.create`."""
        check_room(self._settings, 0, 0, messages)
        made = Conversation(new_id("conv"), time.time(), dict(metadata))

        async def work(pipe: Any) -> Conversation:
            await pipe.watch(_owner(owner))
            await pipe.zremrangebyscore(_owner(owner), "-inf", time.time())
            # The removal is our own change, and must not count as somebody's.
            await pipe.unwatch()
            await pipe.watch(_owner(owner))
            if await pipe.zcard(_owner(owner)) >= self._settings.per_key:
                raise crowded(self._settings)
            pipe.multi()
            fields = {"owner": owner, "created": made.created, "metadata": json.dumps(made.metadata)}
            pipe.hset(_key(made.id), mapping={**fields, "items": 0, "chars": 0})
            self._add(pipe, owner, made.id, messages)
            await pipe.execute()
            return made

        return await self._do(work)

    async def get(self, owner: str, id: str) -> Conversation:
        """See `Store.get`."""

        async def work(pipe: Any) -> Conversation:
            found = await self._owned(pipe, owner, id)
            return Conversation(id, float(found["created"]), json.loads(found["metadata"]))

        return await self._do(work)

    async def items(self, owner: str, id: str) -> list[Item]:
        """See `Store.items`."""

        async def work(pipe: Any) -> list[Item]:
            await self._owned(pipe, owner, id)
            rows = [json.loads(row) for row in await pipe.lrange(_key(id, "items"), 0, -1)]
            return [Item(name, Message(role, content)) for name, role, content in rows]

        return await self._do(work)

    async def delete(self, owner: str, id: str) -> None:
        """See `Store.delete`."""

        async def work(pipe: Any) -> None:
            await self._owned(pipe, owner, id)
            pipe.multi()
            pipe.delete(_key(id), _key(id, "items"), _key(id, "claim"))
            pipe.zrem(_owner(owner), id)
            await pipe.execute()

        await self._do(work)

    async def claim(self, owner: str, id: str, seconds: float) -> str:
        """See `Store.claim`."""
        claim = new_id("claim")

        async def work(pipe: Any) -> str:
            await self._owned(pipe, owner, id)
            if not await pipe.set(_key(id, "claim"), claim, nx=True, px=max(1, int(seconds * 1000))):
                raise busy()
            return claim

        return await self._do(work)

    async def append(self, owner: str, id: str, claim: str, messages: Sequence[Message]) -> list[Item]:
        """See `Store.append`."""

        async def work(pipe: Any) -> list[Item]:
            await pipe.watch(_key(id), _key(id, "claim"))
            found = await self._owned(pipe, owner, id)
            if await pipe.get(_key(id, "claim")) != claim:
                raise busy()
            check_room(self._settings, int(found["items"]), int(found["chars"]), messages)
            pipe.multi()
            added = self._add(pipe, owner, id, messages)
            await pipe.execute()
            return added

        return await self._do(work)

    async def release(self, owner: str, id: str, claim: str) -> None:
        """See `Store.release`."""

        async def work(pipe: Any) -> None:
            await pipe.watch(_key(id, "claim"))
            if await pipe.get(_key(id, "claim")) == claim:
                pipe.multi()
                pipe.delete(_key(id, "claim"))
                await pipe.execute()

        await self._do(work)

    async def close(self) -> None:
        """See `Store.close`."""
        await self._redis.aclose()

    def _add(self, pipe: Any, owner: str, id: str, messages: Sequence[Message]) -> list[Item]:
        added = [Item(new_id("msg"), message) for message in messages]
        if added:
            rows = [json.dumps([item.id, item.message.role, item.message.content]) for item in added]
            pipe.rpush(_key(id, "items"), *rows)
        pipe.hincrby(_key(id), "items", len(added))
        pipe.hincrby(_key(id), "chars", sum(len(m.content) for m in messages))
        until = expiry(self._settings)
        for key in (_key(id), _key(id, "items")):
            pipe.pexpireat(key, int(until * 1000))
        pipe.zadd(_owner(owner), {id: until})
        pipe.pexpireat(_owner(owner), int(until * 1000))
        return added

    @staticmethod
    async def _owned(pipe: Any, owner: str, id: str) -> dict[str, str]:
        if not _ID.fullmatch(id):
            raise no_such()
        found: dict[str, str] = await pipe.hgetall(_key(id))
        if found.get("owner") != owner:
            raise no_such()
        return found

    async def _do(self, work: Callable[[Any], Awaitable[_T]]) -> _T:
        """Do something with a connection of its own, anew if what it watches was changed meanwhile."""
        try:
            while True:
                async with self._redis.pipeline() as pipe:
                    await pipe.watch("ssr:none")  # from here to `multi` commands are sent at once
                    try:
                        return await work(pipe)
                    except redis.exceptions.WatchError:
                        continue
        except redis.exceptions.RedisError as error:
            raise unreachable() from error


def _key(id: str, part: str = "") -> str:
    return f"ssr:conversation:{id}" + (f":{part}" if part else "")


def _owner(name: str) -> str:
    return f"ssr:owner:{name}"
