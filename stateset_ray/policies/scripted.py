"""Policies without a model: scripts, experts and people. They ship as the seam for tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from stateset_ray.policies.base import Reply, ReplyRequest
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Message

__all__ = ["ScriptedPolicy"]


class ScriptedPolicy:
    """Replies with whatever a function of the conversation says.

    A scripted reply is certain, so its log-probabilities are 0.

    Args:
        renderer: turns the reply's text into tokens.
        script: the conversation so far -> the reply's text; may be async.
        version: the policy version that its turns carry.

    Example: `ScriptedPolicy(renderer, lambda messages: messages[-1].content)` repeats the user.
    """

    def __init__(
        self,
        renderer: Renderer,
        script: Callable[[Sequence[Message]], str | Awaitable[str]],
        version: int = 0,
    ) -> None:
        self._renderer = renderer
        self._script = script
        self._version = version

    async def reply(self, request: ReplyRequest) -> Reply:
        """See `Policy.reply`."""
        said = self._script(request.messages)
        text = said if isinstance(said, str) else await said
        ids = self._renderer.reply(text)
        if len(ids) > request.max_tokens:
            ids, finish = ids[: request.max_tokens], "length"
        else:
            finish = "stop"
        return Reply(ids, (0.0,) * len(ids), self._version, "stop" if finish == "stop" else "length")

    def release(self, conversation: str) -> None:
        """See `Policy.release`; a script holds nothing."""
