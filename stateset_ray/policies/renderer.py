"""Messages to tokens and back, so that nothing that was sampled is ever tokenized again.

The state of a conversation is a list of token ids. The first prompt is rendered whole; every later
prompt is *all ids so far + suffix*, where the suffix comes from a difference of two renders: a fixed
short conversation that ends in an assistant reply, without and with the new messages after it. What
follows the reply's stop token is the suffix. A message is never rendered alone, because templates add
system prompts to a conversation that begins.

Templates that rewrite history (thinking removed from earlier replies, say) cannot be continued that
way. The audit at construction finds them; `rewrites_history` is then True, each prompt is a full render
and the turn is marked as a fork.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from stateset_ray.errors import TemplateError
from stateset_ray.types import Message

__all__ = ["Renderer"]

_PROBE = (Message("system", "s"), Message("user", "u"))
_REPLY = "r1"
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
        rewrites_history: True if the template edits earlier turns, so that later turns fork.

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
        self._control = _control_tokens(tokenizer)
        self._base = self._render((*_PROBE, Message("assistant", _REPLY)), prompt=False)
        self._stop = self._find_stop()
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset({self._stop, *stop_ids} | ({eos} if eos is not None else set()))
        self._base_end = len(self._base) - 1 - self._base[::-1].index(self._stop)
        self.rewrites_history = not self._continues()

    def opening(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The first prompt of a conversation, ready for the policy's reply."""
        return self._render(messages, prompt=True)

    def suffix(self, messages: Sequence[Message], *, stopped: bool = True) -> tuple[int, ...]:
        """What follows a reply: the new messages and the next generation prompt.

        Args:
            messages: what user and tools said since the reply, adjacent messages as one suffix.
            stopped: False if the reply was cut before its stop token, which is then closed here. The
                closing token was not sampled, so it belongs to the context.
        """
        dialogue = (*_PROBE, Message("assistant", _REPLY), *messages)
        full = self._render(dialogue, prompt=True)
        end = self._base_end + 1
        if full[:end] != self._base[:end]:
            raise TemplateError(
                "the chat template changes an earlier reply when these messages follow it",
                given=[message.role for message in messages],
                mend="use a template that only appends, or report this dialogue",
            )
        return full[end:] if stopped else (self._stop, *full[end:])

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
            (context ids, forked): the suffix and False, or the full new prompt and True.
        """
        if self.rewrites_history:
            return self.opening(messages), True
        return self.suffix(messages[len(messages) - new :], stopped=stopped), False

    def reply(self, text: str) -> tuple[int, ...]:
        """A scripted reply as tokens, its stop token included."""
        ids = self._tokenizer.encode(self._clean(text), add_special_tokens=False)
        return (*ids, self._stop)

    def text(self, ids: Sequence[int]) -> str:
        """The words of a sampled reply; control tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def stopped(self, ids: Sequence[int]) -> bool:
        """Whether a reply ended in a stop token."""
        return bool(ids) and ids[-1] in self.stop_ids

    def check_tools(self, tools: Sequence[dict[str, Any]]) -> None:
        """Prove that the template shows tools to the model (many drop them silently).

        Raises:
            TemplateError: a tool's name is absent from the rendered prompt.
        """
        text = self._tokenizer.apply_chat_template(
            _plain(_PROBE, self._clean), tools=list(tools), tokenize=False
        )
        for tool in tools:
            name = str(tool.get("function", tool)["name"])
            if name not in text:
                raise TemplateError(
                    "the chat template ignores tools",
                    given=name,
                    mend="describe tools in the system message: stateset_ray.environments.tools.describe",
                )

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> tuple[int, ...]:
        try:
            text = self._tokenizer.apply_chat_template(
                _plain(messages, self._clean), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise whatever their author chose
            raise TemplateError(
                f"the chat template refuses this conversation: {error}",
                given=[message.role for message in messages],
                mend="many templates want user and assistant to alternate, or know no tool role",
            ) from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _clean(self, text: str) -> str:
        """Break control tokens in text, so that no user or tool can end a turn or forge one."""
        for token in self._control:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _find_stop(self) -> int:
        """The token that the template puts right after a reply."""
        reply = self._tokenizer.encode(_REPLY, add_special_tokens=False)
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        after = (
            self._base[len(self._base) - self._base[::-1].index(reply[-1]) :]
            if reply[-1] in self._base
            else ()
        )
        for token in after:
            if token in special:
                return int(token)
        raise TemplateError(
            "the chat template does not end a reply with a control token",
            given=self._tokenizer.decode(list(self._base)),
            mend="use an instruction-tuned model whose template closes every turn",
        )

    def _continues(self) -> bool:
        """Whether building turn by turn equals one full render, on dialogues that try it hard."""
        for new in _AUDITS:
            dialogue = [*_PROBE, Message("assistant", "First reply."), *new]
            try:
                ids = [*self.opening(_PROBE), *self.reply("First reply.")]
                ids += self.suffix(new)
                if tuple(ids) != self._render(dialogue, prompt=True):
                    return False
                ids += [*self.reply("Second one."), *self.suffix((Message("user", "And?"),))]
            except TemplateError:
                # Some templates know no tool role; environments that use it fail with that message.
                if any(message.role == "tool" for message in new):
                    continue
                return False
            dialogue += [Message("assistant", "Second one."), Message("user", "And?")]
            if tuple(ids) != self._render(dialogue, prompt=True):
                return False
        return True


def _plain(messages: Sequence[Message], clean: Any) -> list[dict[str, str]]:
    return [{"role": m.role, "content": clean(m.content)} for m in messages]


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    tokens = {t for t in (*tokenizer.all_special_tokens, *added) if len(t) > 1}
    return tuple(sorted(tokens, key=len, reverse=True))
