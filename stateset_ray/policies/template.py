"""What is asked of a tokenizer and its chat template: messages to text, text to ids, control tokens.

Both ways are the tokenizer's own, past what `transformers` does around them for tensors, tools, documents and
images, which takes longer than they do. That they give the same is tried on the tokenizer itself at
construction; where they do not, it is asked the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers.utils import chat_template_utils

__all__ = ["control_tokens", "encoder", "writer"]

_Chat = list[dict[str, str]]

_CHATS: tuple[_Chat, ...] = (
    [{"role": "user", "content": "Where is it?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " spaces  stay "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nb"},
        {"role": "user", "content": "\u00fcn\u00efcode, emoji \U0001f600 and\n\nblank lines"},
    ],
)


def writer(tokenizer: Any) -> Callable[[_Chat, bool, Any], str]:
    """(messages, whether a generation prompt follows, tools) -> text, as `apply_chat_template` writes it."""

    def slowly(chat: _Chat, prompt: bool, tools: Any = None) -> str:
        text = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=prompt)
        return str(text)

    compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compiled is None or not isinstance(tokenizer.chat_template, str):
        return slowly
    names = dict(tokenizer.special_tokens_map)

    def quickly(chat: _Chat, prompt: bool, tools: Any = None) -> str:
        if tools is not None or not chat:
            return slowly(chat, prompt, tools)
        template = compiled(tokenizer.chat_template)  # which it remembers
        return str(
            template.render(messages=chat, tools=None, documents=None, add_generation_prompt=prompt, **names)
        )

    tried = [(chat, prompt) for chat in _CHATS for prompt in (False, True)]
    return quickly if all(_ends(quickly, *how) == _ends(slowly, *how) for how in tried) else slowly


def _ends(write: Callable[[_Chat, bool], str], chat: _Chat, prompt: bool) -> tuple[str, str]:
    """The text, or how it was refused."""
    try:
        return "written", write(chat, prompt)
    except Exception as error:  # templates raise whatever their author chose
        return "refused", str(error)


def encoder(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """Text -> ids, as `encode` gives them without special tokens; positions in the text are not computed."""
    slowly = partial(tokenizer.encode, add_special_tokens=False)
    batch = getattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast", None)
    if batch is None:
        return slowly

    def quickly(text: str) -> Sequence[int]:
        ids: list[int] = batch([text], add_special_tokens=False)[0].ids
        return ids

    said = [message["content"] for chat in _CHATS for message in chat]
    tried = [
        *said,
        "",
        "".join(tokenizer.all_special_tokens),
        " \n".join([*tokenizer.all_special_tokens, *said]),
    ]
    return quickly if all(list(quickly(text)) == list(slowly(text)) for text in tried) else slowly


def control_tokens(tokenizer: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What nobody may write, and what users and tools may not; longest first.

    Some families (Qwen3, DeepSeek) do not call all tokens special with which their templates mark
    thinking, tool results and even turns. Policies and instructions may write those.
    """
    added = [t for t in tokenizer.added_tokens_decoder.values() if len(t.content) > 1]
    control = {t.content for t in added if t.special}
    control |= {t for t in tokenizer.all_special_tokens if len(t) > 1}
    template = str(tokenizer.chat_template)
    marks = control | {t.content for t in added if any(form in template for form in _pair(t.content))}
    return tuple(sorted(control, key=len, reverse=True)), tuple(sorted(marks, key=len, reverse=True))


def _pair(token: str) -> tuple[str, ...]:
    """A bracketed token and its opposite (`<think>`, `</think>`), since a template may name one only.

    () for words and spaces, which some tokenizers have among their added tokens.
    """
    if token[0].isalnum() or token[-1].isalnum() or not any(map(str.isalnum, token)):
        return ()
    return token, token.replace("</", "<", 1) if "</" in token else token.replace("<", "</", 1)
