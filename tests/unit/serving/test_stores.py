"""Where conversations are kept: SQLite and Redis are held to the same."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import time

import pytest

from stateset_ray.errors import ConfigError
from stateset_ray.serving import sqlite_store
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.settings import ConversationSettings
from stateset_ray.serving.stores import open_store
from stateset_ray.types import Message

HI, YO = Message("user", "hi"), Message("assistant", "yö \U0001f600\n'; DROP TABLE items; --")


def refused(code: str):
    return pytest.raises(ApiError, match=code)


@pytest.fixture(params=["sqlite", "redis"])
def play(request, tmp_path):
    """Runs a coroutine function with as many stores on the same place as it takes."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'kept.db'}"
    else:
        url = request.getfixturevalue("redis_url")

    def played(work, **limits):
        async def all_of_it():
            count = work.__code__.co_argcount
            stores = [open_store(ConversationSettings(store=url, **limits)) for _ in range(count)]
            try:
                await work(*stores)
            finally:
                for store in stores:
                    await store.close()

        asyncio.run(all_of_it())

    return played


async def write(store, owner, id, *messages):
    claim = await store.claim(owner, id, 5)
    added = await store.append(owner, id, claim, messages)
    await store.release(owner, id, claim)
    return added


def test_what_was_said_is_there_for_every_replica_in_order(play):
    async def work(one, other):
        made = await one.create("shop", {"a": "b"}, [HI])
        assert abs(made.created - time.time()) < 60
        added = await write(other, "shop", made.id, YO, HI)
        found = await one.items("shop", made.id)
        assert [item.message for item in found] == [HI, YO, HI]
        assert found[1:] == added
        assert len({item.id for item in found}) == 3
        assert await other.get("shop", made.id) == made
        await one.delete("shop", made.id)
        with refused("conversation_not_found"):
            await other.items("shop", made.id)

    play(work)


def test_for_another_key_there_is_none_of_it(play):
    async def work(store):
        made = await store.create("shop", {}, [HI])
        for what in (
            store.get("thief", made.id), store.items("thief", made.id), store.delete("thief", made.id),
            store.claim("thief", made.id, 5), store.get("shop", "conv_none"), store.get("shop", ""),
            store.get("shop", f"{made.id}:items"), store.claim("shop", f"{made.id}:claim", 5),
            store.items("shop", f"{made.id}\n"),
            store.append("thief", made.id, "", [HI]), store.append("shop", "conv_none", "", [HI]),
        ):  # fmt: skip
            with refused("conversation_not_found"):
                await what
        await store.release("thief", made.id, "")
        assert [item.message for item in await store.items("shop", made.id)] == [HI]

    play(work)


def test_one_writes_at_a_time(play):
    async def work(one, other):
        made = await one.create("shop", {}, [])
        claim = await one.claim("shop", made.id, 5)
        for what in (other.claim("shop", made.id, 5), other.append("shop", made.id, "claim_x", [HI])):
            with refused("conversation_busy"):
                await what
        await other.release("shop", made.id, "claim_x")  # not theirs to give back
        await one.append("shop", made.id, claim, [HI])
        await one.release("shop", made.id, claim)
        with refused("conversation_busy"):
            await one.append("shop", made.id, claim, [HI])
        # Who died is not waited for.
        await one.claim("shop", made.id, 0.05)
        end = time.monotonic() + 20
        while True:
            try:
                await other.claim("shop", made.id, 5)
                break
            except ApiError:
                assert time.monotonic() < end
        assert len(await one.items("shop", made.id)) == 1

    play(work)


def test_of_many_that_write_at_once_each_is_kept_or_refused(play):
    async def work(one, other):
        made = await one.create("shop", {}, [])

        async def add(place):
            try:
                await write((one, other)[place % 2], "shop", made.id, Message("user", str(place)))
                return place
            except ApiError as error:
                assert error.code == "conversation_busy"  # noqa: PT017
                return None

        kept = {place for place in await asyncio.gather(*map(add, range(12))) if place is not None}
        assert kept
        assert {int(item.message.content) for item in await one.items("shop", made.id)} == kept

    play(work)


def test_the_limits_hold(play):
    async def work(store):
        with refused("limit_exceeded"):
            await store.create("crowd", {}, [HI] * 4)
        first = await store.create("crowd", {}, [HI, HI])
        with refused("limit_exceeded"):
            await write(store, "crowd", first.id, HI, HI)
        await store.delete("crowd", first.id)
        second = await store.create("crowd", {}, [HI])
        with refused("limit_exceeded"):
            await write(store, "crowd", second.id, Message("user", "x" * 9))
        await store.create("crowd", {}, [])
        with refused("too_many_conversations"):
            await store.create("crowd", {}, [])
        await store.create("others", {}, [])
        await store.delete("crowd", second.id)
        await store.create("crowd", {}, [])

    play(work, items=3, chars=10, per_key=2)


def test_what_is_not_used_is_removed(play):
    async def work(store):
        old = await store.create("idle", {}, [HI])
        end = time.monotonic() + 20
        while True:
            try:
                await store.get("idle", old.id)
            except ApiError as error:
                assert error.code == "conversation_not_found"  # noqa: PT017
                break
            assert time.monotonic() < end
        await store.create("idle", {}, [])  # which would be one too many

    play(work, idle_days=0.2 / 86_400, per_key=1)


def test_the_sqlite_file_is_its_owners_and_survives(tmp_path):
    path = tmp_path / "kept.db"
    settings = ConversationSettings(store=f"sqlite:///{path}")

    async def first():
        store = open_store(settings)
        made = await store.create("shop", {}, [HI])
        await store.close()
        return made

    made = asyncio.run(first())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)

    async def second():
        store = open_store(settings)
        assert [item.message for item in await store.items("shop", made.id)] == [HI]
        await store.close()
        with refused("store_unavailable"):
            await store.get("shop", made.id)

    asyncio.run(second())


def test_who_finds_the_new_file_locked_by_another_replica_tries_again(tmp_path, monkeypatch):
    """SQLite does not wait where two turn on WAL: it raises at once, whatever its timeout."""
    locked, connect = [], sqlite3.connect

    class Busy(sqlite3.Connection):
        def execute(self, sql, *given):
            if "journal_mode" in sql and len(locked) < 3:
                locked.append(sql)
                raise sqlite3.OperationalError("database is locked")
            return super().execute(sql, *given)

    monkeypatch.setattr(sqlite3, "connect", lambda *given, **more: connect(*given, factory=Busy, **more))
    store = open_store(ConversationSettings(store=f"sqlite:///{tmp_path / 'kept.db'}"))
    assert len(locked) == 3
    asyncio.run(store.close())
    locked.clear()
    monkeypatch.setattr(sqlite_store, "_WAIT", 0.0)
    with pytest.raises(ConfigError, match="locked"):  # not for ever
        open_store(ConversationSettings(store=f"sqlite:///{tmp_path / 'kept.db'}"))


def test_a_transaction_that_cannot_be_ended_is_taken_back(tmp_path):
    async def work():
        store = open_store(ConversationSettings(store=f"sqlite:///{tmp_path / 'kept.db'}"))
        made = await store.create("shop", {}, [HI])

        def orphan(database):  # which COMMIT refuses
            database.execute("PRAGMA defer_foreign_keys = ON")
            database.execute(
                "INSERT INTO items (id, role, content, conversation) VALUES ('i', 'user', '', 'x')"
            )

        with refused("store_unavailable"):
            await store._do(orphan)
        assert await store.get("shop", made.id) == made
        await store.close()

    asyncio.run(work())


def test_a_transaction_that_hangs_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_store, "_WAIT", 0.05)

    async def work():
        store = open_store(ConversationSettings(store=f"sqlite:///{tmp_path / 'kept.db'}"))
        made = await store.create("shop", {}, [HI])
        store._lock.acquire()
        waiting = asyncio.ensure_future(store.get("shop", made.id))
        await asyncio.wait({waiting}, timeout=20)
        ended = waiting.done()
        store._lock.release()
        assert ended
        with refused("store_unavailable"):
            await waiting
        assert await store.get("shop", made.id) == made
        await store.close()

    asyncio.run(work())


def test_a_store_that_cannot_be_opened_is_a_clear_error(tmp_path):
    for path in (tmp_path / "none" / "kept.db", tmp_path):
        with pytest.raises(ConfigError, match="cannot be kept there"):
            open_store(ConversationSettings(store=f"sqlite:///{path}"))
    (tmp_path / "no.db").write_text("this is no database, whatever its name says" * 9)
    with pytest.raises(ConfigError, match="cannot be kept there"):
        open_store(ConversationSettings(store=f"sqlite:///{tmp_path / 'no.db'}"))
    assert open_store(ConversationSettings()) is None


def test_a_redis_that_is_away_is_told():
    pytest.importorskip("redis", reason="the redis client is not installed")

    async def work():
        store = open_store(ConversationSettings(store="redis://127.0.0.1:1/0"))
        with refused("store_unavailable"):
            await store.get("shop", "conv_x")
        await store.close()

    asyncio.run(work())
