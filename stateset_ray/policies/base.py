"""What replies: the interface between a conversation and whatever produces its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from stateset_ray.types import Message

__all__ = ["Policy", "Reply", "ReplyRequest"]


@dataclass(frozen=True, slots=True)
class ReplyRequest:
    """One turn that a conversation asks of its policy.

    Attributes:
        conversation: names the conversation, so that an engine can keep its KV cache between turns.
        prompt_ids: every token so far. An engine looks at nothing else.
        messages: the same conversation for people and scripts; engines ignore it.
        max_tokens: where the reply is cut.
        temperature: of the sampling distribution; 0 is greedy.
        seed: all randomness of this reply.
    """

    conversation: str
    prompt_ids: tuple[int, ...]
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """The tokens of one turn; the fields mean what they mean in `Turn`.

    Attributes:
        finish: "stop" if the last token is a stop token, "length" if the reply was cut.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int
    finish: Literal["stop", "length"]


class Policy(Protocol):
    """Produces replies; one policy serves many conversations at once."""

    async def reply(self, request: ReplyRequest) -> Reply:
        """Sample one reply.

        Raises:
            InfrastructureFault: the policy cannot answer; the conversation is retried elsewhere.
        """
        ...

    def release(self, conversation: str) -> None:
        """Forget a conversation: it has ended and its cache may be reused."""
        ...
