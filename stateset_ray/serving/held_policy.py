"""One version of the policy, loaded and proved, and the answers that it is giving.

A version is never changed: a newer one is loaded beside it, and the replica's reference is swapped. Answers
under way end with the version that they began with; the last of them closes a version that was retired.

Who waits for whom: an answer waits for the engine; a retired version for its answers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from stateset_ray.errors import InfrastructureFault, ModelError, TemplateError
from stateset_ray.models import Hardware, generation_stop_ids, load_model, load_tokenizer
from stateset_ray.policies.base import Reply, ReplyRequest
from stateset_ray.policies.nucleus import Sampled
from stateset_ray.policies.renderer import Renderer, characters
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.policies.vllm_engine import VllmEngine
from stateset_ray.serving.events import Ask, Began, Ended, Event, Piece, Refused, TokenLogprob, in_parts
from stateset_ray.serving.memory import ConversationMemory
from stateset_ray.serving.raw_prompt import raw_prompt
from stateset_ray.serving.settings import ServeSettings
from stateset_ray.serving.source import Candidate
from stateset_ray.serving.text_stream import TextStream
from stateset_ray.serving.tool_calls import tool_renderer
from stateset_ray.types import Message, derive_seed

__all__ = ["HeldPolicy", "load_policy"]

_PROBE_TOKENS = 8
_RENDERERS = 16  # sets of tools for which a renderer is kept


@dataclass(eq=False)
class _Choice:
    """One reply in the making."""

    text: TextStream
    budget: int
    task: asyncio.Task[Reply]
    sampled: int = 0
    ended: bool = False
    held: list[TokenLogprob] = field(default_factory=list)


@dataclass
class HeldPolicy:
    """Model, tokenizer and engine of one version.

    Attributes:
        candidate: which version it is.
        max_context: tokens of a conversation.
        tokens: that its answers still have before them: prompts that wait, and replies' room.
        sampled: tokens sampled so far, for metrics.
        retired: whether the engine is closed after the last answer.
    """

    candidate: Candidate
    renderer: Renderer
    tokenizer: Any
    engine: TransformersEngine | VllmEngine
    max_context: int
    max_reply: int
    memory: ConversationMemory
    tokens: int = 0
    sampled: int = 0
    retired: bool = False
    _answers: int = 0
    _counted: tuple[int, int] = (0, 0)
    _sessions: set[str] = field(default_factory=set)
    _renderers: dict[str, Renderer] = field(default_factory=dict)

    @property
    def running(self) -> int:
        """Answers under way."""
        return self._answers

    def uncounted(self) -> tuple[int, int]:
        """Tokens sampled, and tokens of prompts computed, since this was last asked; for metrics."""
        before, self._counted = self._counted, (self.sampled, self.engine.stats.prefill_tokens)
        return self._counted[0] - before[0], self._counted[1] - before[1]

    async def probe(self, text: str) -> None:
        """Let it answer once, greedily, before it may answer anyone.

        Raises:
            ModelError: it gives no finite probabilities, or no tokens.
        """
        prompt = self.renderer.opening((Message("user", text),))
        tokens = min(_PROBE_TOKENS, self.max_context - len(prompt))
        try:
            reply = await self.engine.reply(ReplyRequest("probe", prompt, (), tokens, 1.0, 0))
        except InfrastructureFault as error:
            raise ModelError(f"the weights do not answer: {error.problem}", self.candidate.label) from error
        finally:
            self.engine.release("probe")
        if not reply.token_ids or not all(map(math.isfinite, reply.logprobs)):
            raise ModelError("the weights answer with nothing", given=self.candidate.label)

    async def answer(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        """The events of one answer; closing the iterator early frees every slot that it holds.

        Raises:
            InfrastructureFault: the engine failed; another replica may answer.
        """
        self._answers += 1
        try:
            async with aclosing(self._answer(ask)) as answer:
                async for events in answer:
                    yield events
        finally:
            self._answers -= 1
            await self._close_if_done()

    async def retire(self) -> None:
        """No new answers come; close the engine after the last one."""
        self.retired = True
        await self._close_if_done()

    async def _close_if_done(self) -> None:
        if self.retired and not self._answers:
            await self.engine.close()

    async def _answer(self, ask: Ask) -> AsyncGenerator[tuple[Event, ...]]:
        prompt = self._too_long(ask) or self._prompt(ask)
        if isinstance(prompt, Refused):
            yield (prompt,)
            return
        budget = self._budget(ask, len(prompt))
        if isinstance(budget, Refused):
            yield (budget,)
            return
        session = ask.session if ask.choices == 1 and ask.session not in self._sessions else ""
        self._sessions.add(session)
        inbox: asyncio.Queue[tuple[int, Sampled | None]] = asyncio.Queue()  # (choice, None at its end)
        choices = [self._begin(ask, prompt, budget, session, i, inbox) for i in range(ask.choices)]
        waiting = len(prompt) * len(choices)  # prompt tokens that were not read yet, as far as one can tell
        self.tokens += waiting
        try:
            async for events in self._events(ask, prompt, choices, inbox):
                self.tokens, waiting = self.tokens - waiting, 0
                yield events
        finally:
            self.tokens -= waiting + sum(c.budget - c.sampled for c in choices if not c.ended)
            for choice in choices:
                choice.task.cancel()
            await asyncio.gather(*(c.task for c in choices), return_exceptions=True)
            self._sessions.discard(session)
            if not session:
                for i in range(ask.choices):
                    self.engine.release(f"{ask.id}/{i}")

    def _too_long(self, ask: Ask) -> Refused | None:
        """The refusal of what cannot fit: found out before rendering costs anything."""
        where, said = "messages", characters(ask.messages) + len(ask.tools)
        if ask.prompt is not None:  # token ids are counted as they are
            where, said = "prompt", len(ask.prompt) if isinstance(ask.prompt, str) else 0
        most = self.max_context * self.renderer.longest_token
        if said <= most:
            return None
        return Refused(
            400, "context_length_exceeded",
            f"the conversation has {said} characters, which the policy's context of "
            f"{self.max_context} tokens cannot hold", "tools" if len(ask.tools) > most else where,
        )  # fmt: skip

    def _prompt(self, ask: Ask) -> tuple[int, ...] | Refused:
        if ask.prompt is not None:
            ids = raw_prompt(self.renderer, self.tokenizer, ask.prompt, self.engine.vocabulary)
            wrong = "the prompt is empty, or holds a token that this model does not have"
            return ids or Refused(400, "invalid_parameter", wrong, "prompt")
        renderer, tenant = self.renderer, ask.tenant
        if ask.tools:
            try:
                renderer = self._shown(ask.tools)
            except TemplateError:
                wrong = "the chat template of this policy knows no tools, or not as they are read here"
                return Refused(400, "tools_unsupported", wrong, "tools")
            tenant = f"{tenant}\x1f{ask.tools}"  # the same words after other tools are other tokens
        try:
            return self.memory.prompt(renderer, tenant, ask.messages)
        except TemplateError:
            return Refused(400, "invalid_messages", "the chat template refuses these messages", "messages")

    def _shown(self, tools: str) -> Renderer:
        """The renderer for conversations with these tools; the last few that leave room to speak are kept."""
        if found := self._renderers.get(tools):
            return found
        made = tool_renderer(self.renderer, self.tokenizer, tools)
        if made.shortest < self.max_context:
            while len(self._renderers) >= _RENDERERS:
                self._renderers.pop(next(iter(self._renderers)))
            self._renderers[tools] = made
        return made

    def _budget(self, ask: Ask, prompt: int) -> int | Refused:
        """Tokens that each reply may take."""
        room = self.max_context - prompt
        if room < 1 or (ask.max_tokens or 0) > room:
            wanted = f"{prompt} tokens and a reply of {ask.max_tokens or 1}"
            where = "messages" if ask.prompt is None else "prompt"
            return Refused(
                400, "context_length_exceeded",
                f"the conversation has {wanted}, and the policy's context is {self.max_context} tokens",
                where if room < 1 else "max_tokens",
            )  # fmt: skip
        most = self.max_reply or room
        if (ask.max_tokens or 0) > most:
            return Refused(
                400, "limit_exceeded", f"at most {most} tokens of a reply are allowed", "max_tokens"
            )
        return ask.max_tokens or min(room, most)

    def _begin(
        self, ask: Ask, prompt: tuple[int, ...], budget: int, session: str, index: int,
        inbox: asyncio.Queue[tuple[int, Sampled | None]],
    ) -> _Choice:  # fmt: skip
        name = f"session/{session}" if session else f"{ask.id}/{index}"
        seed = derive_seed(ask.seed, "choice", index)
        request = ReplyRequest(name, prompt, ask.messages, budget, ask.temperature, seed)
        task = asyncio.create_task(
            self.engine.reply(
                request, lambda sampled: inbox.put_nowait((index, sampled)), top_p=ask.top_p, top=ask.top
            )
        )
        # Its end wakes the reader as well, behind the last token.
        task.add_done_callback(lambda _: inbox.put_nowait((index, None)))
        self.tokens += budget
        stream = TextStream(self.tokenizer, ask.stops, strip=ask.prompt is None)
        return _Choice(stream, budget, task)

    async def _events(
        self, ask: Ask, prompt: tuple[int, ...], choices: list[_Choice],
        inbox: asyncio.Queue[tuple[int, Sampled | None]],
    ) -> AsyncIterator[tuple[Event, ...]]:  # fmt: skip
        began, later = False, []
        while not all(choice.ended for choice in choices):
            news = [await inbox.get()]
            while not inbox.empty():
                news.append(inbox.get_nowait())
            events: list[Event] = []
            for index, sampled in news:
                choice = choices[index]
                if choice.ended:
                    continue  # what was sampled before the cancellation of a stopped reply was felt
                if sampled is None:
                    events += self._end(ask, prompt, index, choice)
                else:
                    events += self._take(ask, index, choice, sampled)
                    if not began:
                        began = True
                        yield (Began(self.candidate.label, len(prompt)),)
            if not ask.stream:
                later += events
                continue
            for part in in_parts(events):
                yield part
        for part in in_parts(later):
            yield part

    def _take(self, ask: Ask, index: int, choice: _Choice, sampled: Sampled) -> list[Event]:
        choice.sampled += 1
        self.sampled += 1
        self.tokens -= 1
        if ask.logprobs:
            top = tuple((str(self.tokenizer.decode([token])), logprob) for token, logprob in sampled.top)
            text = str(self.tokenizer.decode([sampled.token]))
            choice.held.append(TokenLogprob(text, sampled.logprob, top))
        if not (ask.stream or ask.stops):
            return []  # nobody looks at the text before its end
        text = choice.text.push(sampled.token)
        events = self._piece(index, choice, text) if text else []
        if choice.text.stopped:
            choice.task.cancel()
            choice.ended = True
            self.tokens -= choice.budget - choice.sampled
            if choice.held:
                events += self._piece(index, choice, "")
            events.append(Ended(index, "stop", choice.sampled))
        return events

    def _end(self, ask: Ask, prompt: tuple[int, ...], index: int, choice: _Choice) -> list[Event]:
        reply = choice.task.result()  # raises what the engine raised
        choice.ended = True
        self.tokens -= choice.budget - choice.sampled
        looked_at = ask.stream or ask.stops
        said = self.renderer.text(reply.token_ids) if ask.prompt is None else None
        text = choice.text.finish() if looked_at else said
        if text is None:
            text = str(self.tokenizer.decode(list(reply.token_ids), skip_special_tokens=True))
        events = self._piece(index, choice, text) if text or choice.held else []
        # A stop string may still be in what was held back to the end.
        stopped = reply.finish == "stop"
        if said is not None and not choice.text.stopped:
            self.memory.remember(
                f"{ask.tenant}\x1f{ask.tools}" if ask.tools else ask.tenant,
                (*ask.messages, Message("assistant", said)), (*prompt, *reply.token_ids), stopped=stopped,
            )  # fmt: skip
        ended = stopped or choice.text.stopped
        return [*events, Ended(index, "stop" if ended else "length", choice.sampled)]

    def _piece(self, index: int, choice: _Choice, text: str) -> list[Event]:
        held, choice.held = tuple(choice.held), []
        return [Piece(index, text, held)]


def load_policy(
    candidate: Candidate, settings: ServeSettings, hardware: Hardware, max_context: int,
    before: HeldPolicy | None,
) -> HeldPolicy:  # fmt: skip
    """Load a version beside others; takes as long as reading its weights does.

    Args:
        candidate: what `checked` has accepted.
        max_context: what `checked` returned.
        before: the version that answers now; what it remembers of conversations goes on if both read
            the same tokens.

    Raises:
        StatesetError: it cannot be loaded, or its template cannot be used.
    """
    policy = settings.policy
    tokenizer = load_tokenizer(candidate.model)
    renderer = Renderer(tokenizer, generation_stop_ids(candidate.model))
    engine: TransformersEngine | VllmEngine
    if policy.engine == "vllm":
        engine = VllmEngine(
            candidate.model, renderer.stop_ids,
            slots=policy.slots, max_context=max_context, hardware=hardware, serving=True,
        )  # fmt: skip
    else:
        engine = TransformersEngine(
            load_model(candidate.model, hardware), renderer.stop_ids,
            slots=policy.slots, max_context=max_context, hardware=hardware,
        )  # fmt: skip
    memory = ConversationMemory(policy.remembered)
    if before is not None and _reads_alike(before.tokenizer, tokenizer):
        memory = before.memory
    return HeldPolicy(
        candidate, renderer, tokenizer, engine, max_context, policy.max_reply_tokens, memory
    )  # fmt: skip


def _reads_alike(one: Any, other: Any) -> bool:
    return bool(one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template)
