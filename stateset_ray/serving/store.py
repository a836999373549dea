"""Where conversations are kept: what a store can do.

A conversation belongs to the key that made it; for every other key there is none of that name. It is written
by one request at a time: who wants to write claims it first, and what is claimed is refused to others (409)
and not waited for. A claim ends by itself, should its holder die.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.settings import ConversationSettings
from stateset_ray.types import Message

__all__ = [
    "Conversation", "Item", "Store", "busy", "check_room", "crowded", "expiry", "new_id", "no_such",
    "unreachable",
]  # fmt: skip

_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Item:
    """One message of a conversation; `id` names it within all of them."""

    id: str
    message: Message


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation without its messages; `created` in seconds since the epoch."""

    id: str
    created: float
    metadata: Mapping[str, str] = field(default_factory=dict)


class Store(Protocol):
    """Keeps conversations. Every method waits for no other request, and raises ApiError: 404 where the owner
    has no such conversation, 409 where it is claimed, 400 where it would grow beyond its limits."""

    async def create(
        self, owner: str, metadata: Mapping[str, str], messages: Sequence[Message]
    ) -> Conversation:
        """Make a conversation; 429 if the owner has too many."""
        ...

    async def get(self, owner: str, id: str) -> Conversation:
        """What is known of it."""
        ...

    async def items(self, owner: str, id: str) -> list[Item]:
        """Its messages, the oldest first."""
        ...

    async def delete(self, owner: str, id: str) -> None:
        """Remove it."""
        ...

    async def claim(self, owner: str, id: str, seconds: float) -> str:
        """Let nobody else write for so long; returns the claim."""
        ...

    async def append(self, owner: str, id: str, claim: str, messages: Sequence[Message]) -> list[Item]:
        """Add messages; 409 if the claim has ended."""
        ...

    async def release(self, owner: str, id: str, claim: str) -> None:
        """Give a claim back; nothing happens if it has ended."""
        ...

    async def close(self) -> None:
        """Let go of files and connections."""
        ...


def new_id(kind: str) -> str:
    """A name that nobody guesses."""
    return f"{kind}_{secrets.token_hex(16)}"


def expiry(settings: ConversationSettings) -> float:
    """Until when what is used now is kept, in seconds since the epoch."""
    return time.time() + settings.idle_days * _DAY


def check_room(settings: ConversationSettings, items: int, chars: int, messages: Sequence[Any]) -> None:
    """Refuse messages for which a conversation has no room.

    Args:
        items: that it holds.
        chars: that they hold.

    Raises:
        ApiError: 400.
    """
    if items + len(messages) > settings.items:
        raise ApiError(
            400, "limit_exceeded", f"a conversation may hold at most {settings.items} messages", "items"
        )
    if chars + sum(len(m.content) for m in messages) > settings.chars:
        raise ApiError(
            400, "limit_exceeded", f"a conversation may hold at most {settings.chars} characters", "items"
        )


def no_such() -> ApiError:
    """There is none of this name, for this key."""
    return ApiError(404, "conversation_not_found", "there is no such conversation", "conversation")


def busy() -> ApiError:
    """Another request is writing."""
    return ApiError(
        409, "conversation_busy", "another request writes in this conversation", "conversation",
        retry_after=1.0,
    )  # fmt: skip


def unreachable() -> ApiError:
    """The store does not answer."""
    return ApiError(503, "store_unavailable", "conversations cannot be reached", retry_after=2.0)


def crowded(settings: ConversationSettings) -> ApiError:
    """The owner has too many."""
    return ApiError(
        429, "too_many_conversations", f"this key has {settings.per_key} conversations: delete some"
    )
