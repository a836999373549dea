"""What replies: the interface between a conversation and whatever produces its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from stateset_ray.errors import InfrastructureFault
from stateset_ray.types import Message

__all__ = ["Engine", "EngineStats", "Policy", "Reply", "ReplyRequest", "check_fits"]


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


def check_fits(request: ReplyRequest, max_context: int) -> None:
    """Refuse a request whose prompt and reply are longer than an engine's context.

    Raises:
        InfrastructureFault: they are.
    """
    if len(request.prompt_ids) + request.max_tokens > max_context:
        raise InfrastructureFault(
            f"a prompt of {len(request.prompt_ids)} tokens and a reply of {request.max_tokens} exceed the "
            f"engine's context of {max_context}",
            mend="the rollout must stop at its max_context; make both limits equal",
        )


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


@dataclass
class EngineStats:
    """What an engine has done since it was made; seconds are of wall clock."""

    prompt_tokens: int = 0
    """Tokens of all prompts, as a server without a cache would have to compute them."""
    prefill_tokens: int = 0
    """Prompt tokens that were really computed."""
    decode_tokens: int = 0
    """Sampled tokens."""
    forwards: int = 0
    """Passes through the model; 0 where the engine does not tell."""
    seconds: float = 0.0
    """Spent on replies."""
    sleeps: int = 0
    """How often it gave up its memory."""


class Engine(Policy, Protocol):
    """A policy that is a model, whose weights can be replaced between turns.

    Attributes:
        version: of the weights that answer; every reply carries it.
        stats: what was done so far.
    """

    version: int
    stats: EngineStats

    @property
    def dead(self) -> bool:
        """Whether it will never answer again, and has to be built anew."""
        ...

    def forget(self) -> None:
        """Answer later turns as if none had been answered before: nothing that is cached is used."""
        ...

    async def load_weights(self, version: int, tensors: Mapping[str, Any]) -> None:
        """Take new weights: turns that run end with the old ones, later turns begin with the new.

        Args:
            version: that replies carry from then on.
            tensors: name -> torch tensor of every parameter, as `models.state_tensors` names them.

        Raises:
            ModelError: the tensors are not those of this model; nothing was changed then.
        """
        ...

    async def sleep(self) -> None:
        """Give up weights and cache; turns that run end before, later ones wait for new weights."""
        ...

    async def close(self) -> None:
        """End everything that runs, and fail what still waits."""
        ...
