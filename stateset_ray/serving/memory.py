"""The token ids of conversations, so that a next turn goes on with what was sampled and not with its
spelling.

The endpoint keeps no state that a client depends on: a request brings the whole conversation. But the same
words can be cut into tokens in several ways, and a policy that was trained turn by turn has seen the ids that
it sampled. So a replica remembers, for conversations that it answered, which ids their messages were. A
conversation that it does not know (another replica answered, or too many others since) is rendered whole.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Message

__all__ = ["ConversationMemory"]

_Key = bytes


class ConversationMemory:
    """The last conversations of a replica: (tenant, messages up to a reply) -> (ids, whether the reply
    stopped).

    Args:
        size: conversations; the one that was not used for longest is forgotten first.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[_Key, tuple[tuple[int, ...], bool]] = OrderedDict()

    def prompt(self, renderer: Renderer, tenant: str, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt for the next reply of a conversation: as a rollout builds it, if it is known.

        Raises:
            TemplateError: the chat template refuses the messages.
        """
        last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
        known = self._find(tenant, messages[: last + 1]) if last >= 0 else None
        if known is None:
            return renderer.opening(messages)
        ids, stopped = known
        context, forked = renderer.next_prompt(ids, messages, len(messages) - last - 1, stopped=stopped)
        return context if forked else (*ids, *context)

    def remember(
        self, tenant: str, messages: Sequence[Message], ids: tuple[int, ...], *, stopped: bool
    ) -> None:
        """Note the ids of a conversation that ends in a reply."""
        if self._size:
            key = _key(tenant, messages)
            self._known[key] = (ids, stopped)
            self._known.move_to_end(key)
            if len(self._known) > self._size:
                self._known.popitem(last=False)

    def _find(self, tenant: str, messages: Sequence[Message]) -> tuple[tuple[int, ...], bool] | None:
        key = _key(tenant, messages)
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)


def _key(tenant: str, messages: Sequence[Message]) -> _Key:
    """A digest in which no text can pose as two: every part goes in with its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (tenant, *(part for m in messages for part in (m.role, m.content))):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.digest()
