"""Messages to tokens and back, so that nothing that was sampled is ever tokenized again.

The state of a conversation is a list of token ids. The first prompt is rendered whole; every later
prompt is *all ids so far + suffix*, where the suffix comes from a difference of two renders: a fixed
short conversation that ends in an assistant reply, without and with the new messages after it. What
follows the reply's stop token is the suffix. A message is never rendered alone, because templates add
system prompts to a conversation that begins.

Templates that rewrite history (thinking removed from earlier replies, say) cannot be continued that
way. The audit at construction finds them; `rewrites_history` is then True and each prompt is a full
render. Where that does not begin with every token so far, the turn is marked as a fork.

The members of a group are told the same, and environments repeat themselves: what was rendered or read
lately is remembered (`_REMEMBERED`), unless the template writes the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

from stateset_ray.errors import TemplateError
from stateset_ray.policies.template import control_tokens, encoder, writer
from stateset_ray.types import Message, Role

__all__ = ["Renderer", "characters"]

_REMEMBERED = 1024
"""Texts of one kind that are remembered: openings, suffixes, scripted replies, sampled replies."""
_LONG = 16_384
"""Characters beyond which a prompt is not remembered: a thousand of them would fill a machine."""
_LONG_IDS = 4096
"""Tokens, likewise: a character may be several, and each takes more memory than the character."""

_Said = tuple[tuple[Role, str], ...]
"""(role, content) of messages: what templates are given of them, and what hashes."""

_PROBE = (Message("system", "s"), Message("user", "u"))
_REPLY = "r1"
_REPLIES = (
    ("First reply.", "Second one."),
    ("<think>\nLet me see.\n</think>\n\nFirst reply.", "<think>\nHm.\n</think>\n\nSecond one."),
)
_AUDITS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "Second question?"),),
    (Message("tool", "order 7: shipped"),),
    (Message("tool", "line one\nline two"), Message("user", " spaces  stay ")),
    (Message("user", "ünïcode, emoji \U0001f600 and\n\nblank lines"),),
    (Message("user", ""),),
)


class Renderer:
    """Renders conversations for one tokenizer and its chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        stop_ids: further end tokens, from the model's generation config.

    Attributes:
        stop_ids: tokens that end a reply.
        rewrites_history: True if the template edits earlier turns, so that later turns may fork.

    Raises:
        TemplateError: there is no chat template, or its turns cannot be told apart.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int] = ()) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                "the tokenizer has no chat template, so conversations cannot be rendered",
                given=getattr(tokenizer, "name_or_path", type(tokenizer).__name__),
                mend="use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer",
            )
        self._tokenizer = tokenizer
        self._encode, self._written = encoder(tokenizer), writer(tokenizer)
        self._tools: tuple[dict[str, Any], ...] = ()
        self._remember()
        self._control, self._marks = control_tokens(tokenizer)
        self._probe = self._accepted_probe()
        self._stop = self._find_stop()
        self._base = self._render_base()
        self._prompt = self._render(self._probe, prompt=True)
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset({self._stop, *stop_ids} | ({eos} if eos is not None else set()))
        # A model may stop with a token that its template never writes (a plain end of text): its turn is
        # then as open as if it had been cut.
        named = {i: tokenizer.convert_ids_to_tokens(i) or "" for i in self.stop_ids}
        written = str(tokenizer.chat_template)
        self._closing = {self._stop, *(i for i, token in named.items() if token and token in written)}
        self.rewrites_history = not self._continues()

    def opening(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The first prompt of a conversation, ready for the policy's reply."""
        said = _said(messages)
        if characters(messages) > _LONG:
            return self._render_opening(self._template, said)
        return _recalled(self._opening, self._template, said)

    def suffix(self, messages: Sequence[Message], *, stopped: bool = True) -> tuple[int, ...]:
        """What follows a reply: the new messages and the next generation prompt.

        Args:
            messages: what user and tools said since the reply, adjacent messages as one suffix.
            stopped: False if the reply was cut before its stop token, which is then closed here. The
                closing token was not sampled, so it belongs to the context.
        """
        if characters(messages) > _LONG:
            return self._render_suffix(self._template, _said(messages), stopped)
        return _recalled(self._suffix, self._template, _said(messages), stopped)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a prompt of n tokens has at most n times as many."""
        return max(len(token) for token in self._tokenizer.get_vocab())

    @property
    def shortest(self) -> int:
        """Tokens of a prompt in which next to nothing is said."""
        return len(self._prompt)

    def next_prompt(
        self, ids: Sequence[int], messages: Sequence[Message], new: int, *, stopped: bool
    ) -> tuple[tuple[int, ...], bool]:
        """Tokens to add for the next turn, and whether they fork.

        Args:
            ids: every token so far.
            messages: the whole conversation.
            new: how many of the last messages came after the reply.
            stopped: whether the reply ended in a stop token.

        Returns:
            (context ids, forked): what follows `ids` and False, or the full new prompt and True.
        """
        if self.rewrites_history:
            full = self._render(messages, prompt=True)
            kept = full[: len(ids)] == tuple(ids)
            return (full[len(ids) :], False) if kept else (full, True)
        closed = stopped and ids[-1] in self._closing
        return self.suffix(messages[len(messages) - new :], stopped=closed), False

    def reply(self, text: str) -> tuple[int, ...]:
        """A scripted reply as tokens, as the template writes it; its stop token included."""
        return self._reply(self._template, text)

    def text(self, ids: Sequence[int]) -> str:
        """The words of a sampled reply; control tokens are left out."""
        return self._text(tuple(ids))

    def plain(self, text: str) -> str:
        """Text in which no control token is left, as in what users say."""
        return self._clean(Message("user", text))

    def stopped(self, ids: Sequence[int]) -> bool:
        """Whether a reply ended in a stop token."""
        return bool(ids) and ids[-1] in self.stop_ids

    def with_tools(self, tools: Sequence[dict[str, Any]]) -> Renderer:
        """One that shows tools (OpenAI's, as JSON schemas) in every conversation, by the chat template.

        Raises:
            TemplateError: the template does not show them.
        """
        self.check_tools(tools)
        made = copy.copy(self)
        made._tools = tuple(tools)
        made._remember()
        made._base = made._render_base()
        made._prompt = made._render(made._probe, prompt=True)
        return made

    def check_tools(self, tools: Sequence[dict[str, Any]]) -> None:
        """Prove that the template shows tools to the model (many drop them silently).

        Raises:
            TemplateError: a tool's name is absent from the rendered prompt.
        """
        without = self._write(self._probe, prompt=False, tools=())
        text = self._write(self._probe, prompt=False, tools=list(tools))
        for tool in tools:
            name = str(tool.get("function", tool)["name"])
            if text.count(name) <= without.count(name):
                raise TemplateError(
                    "the chat template ignores tools",
                    given=name,
                    mend="describe tools in the system message: stateset_ray.environments.tools.describe",
                )

    # What is remembered. A template that was changed meanwhile is another template.

    def _remember(self) -> None:
        remember = lru_cache(0 if "strftime_now" in str(self._tokenizer.chat_template) else _REMEMBERED)
        self._opening = remember(_short(self._render_opening))
        self._suffix = remember(_short(self._render_suffix))
        self._reply, self._text = remember(self._render_reply), remember(self._read)

    @property
    def _template(self) -> str:
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else str(template)  # some have several, by name

    def _render_opening(self, template: str, said: _Said) -> tuple[int, ...]:
        return self._render([Message(role, text) for role, text in said], prompt=True)

    def _render_suffix(self, template: str, said: _Said, stopped: bool) -> tuple[int, ...]:
        messages = [Message(role, text) for role, text in said]
        full = self._render((*self._probe, Message("assistant", _REPLY), *messages), prompt=True)
        if full[: len(self._base)] != self._base:
            self._base = self._render_base()  # some templates write the date, and a day may have passed
        end = len(self._base)
        if full[:end] != self._base:
            raise TemplateError(
                "the chat template changes an earlier reply when these messages follow it",
                given=[message.role for message in messages],
                mend="use a template that only appends, or report this dialogue",
            )
        return full[end:] if stopped else (self._stop, *full[end:])

    def _render_reply(self, template: str, text: str) -> tuple[int, ...]:
        said = Message("assistant", text)
        plain = tuple(self._encode(self._clean(said)))
        whole = self._render((*self._probe, said), prompt=False)
        start = len(self._prompt)
        if whole[:start] != self._prompt:
            self._prompt = self._render(self._probe, prompt=True)  # as in a suffix: another day
            start = len(self._prompt)
        if whole[:start] == self._prompt and self._stop in whole[start:]:
            written = whole[start : whole.index(self._stop, start)]
            # Templates may set a space before a reply, or trim it. Whatever else they do was not said.
            if written == plain or self._words(written) == self._words(plain):
                return (*written, self._stop)
        return (*plain, self._stop)

    def _read(self, ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _write(self, messages: Sequence[Message], *, prompt: bool, tools: Any = None) -> str:
        plain = [{"role": m.role, "content": self._clean(m)} for m in messages]
        try:
            return self._written(plain, prompt, list(self._tools if tools is None else tools) or None)
        except Exception as error:  # templates raise whatever their author chose
            raise TemplateError(
                f"the chat template refuses this conversation: {error}",
                given=[message.role for message in messages],
                mend="many templates want user and assistant to alternate, or know no tool role",
            ) from error

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> tuple[int, ...]:
        text = self._write(messages, prompt=prompt)
        return tuple(self._encode(text))

    def _render_base(self) -> tuple[int, ...]:
        """The fixed conversation that suffixes are measured against, up to its reply's stop token."""
        base = self._render((*self._probe, Message("assistant", _REPLY)), prompt=False)
        return base[: len(base) - base[::-1].index(self._stop)]

    def _accepted_probe(self) -> tuple[Message, ...]:
        try:
            self._render(_PROBE, prompt=True)
        except TemplateError:  # some templates know no system role
            return _PROBE[1:]
        return _PROBE

    def _clean(self, message: Message) -> str:
        """Break control tokens in text, so that no user or tool can end a turn or forge one."""
        text = message.content
        for token in self._marks if message.role in ("user", "tool") else self._control:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _words(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids))).strip()

    def _find_stop(self) -> int:
        """The token that the template puts right after a reply."""
        base = self._render((*self._probe, Message("assistant", _REPLY)), prompt=False)
        last = self._tokenizer.encode(_REPLY, add_special_tokens=False)[-1]
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        for token in base[len(base) - base[::-1].index(last) :] if last in base else ():
            if token in special:
                return int(token)
        raise TemplateError(
            "the chat template does not end a reply with a control token",
            given=self._tokenizer.decode(list(base)),
            mend="use an instruction-tuned model whose template closes every turn",
        )

    def _continues(self) -> bool:
        """Whether building turn by turn equals one full render, on dialogues that try it hard."""
        openings = (self._probe, self._probe[-1:])
        for opening, (first, second), new in product(openings, _REPLIES, _AUDITS):
            dialogue = [*opening, Message("assistant", first), *new]
            more = [Message("assistant", second), Message("user", "And?")]
            try:
                once, twice = (self._render(d, prompt=True) for d in (dialogue, dialogue + more))
            except TemplateError:
                # Refused, for instance because there is no tool role: environments that need it fail
                # with that message.
                continue
            try:
                ids = (*self.opening(opening), *self.reply(first), *self.suffix(new))
                again = (*ids, *self.reply(second), *self.suffix(more[1:]))
            except TemplateError:
                return False
            if (ids, again) != (once, twice):
                return False
        return True


class _Long(Exception):
    """Carries the ids of a prompt past what would remember them."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        super().__init__()
        self.ids = ids


def _short(render: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    def rendered(*given: Any) -> tuple[int, ...]:
        ids = render(*given)
        if len(ids) > _LONG_IDS:
            raise _Long(ids)
        return ids

    return rendered


def _recalled(remembered: Callable[..., tuple[int, ...]], *given: Any) -> tuple[int, ...]:
    try:
        return remembered(*given)
    except _Long as long:
        return long.ids


def characters(messages: Sequence[Message]) -> int:
    """Characters that messages say."""
    return sum(len(message.content) for message in messages)


def _said(messages: Sequence[Message]) -> _Said:
    return tuple([(message.role, message.content) for message in messages])
