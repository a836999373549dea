"""Tokens to text as they come: the pieces, put together, are what the renderer makes of the whole reply.

A piece is held back while later tokens could change it: half of a character, space at the end (replies are
stripped), and the beginning of what may become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_HALF = "\ufffd"  # what a decoder writes for bytes that are no whole character


class TextStream:
    """The text of one reply.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stops: strings that end the reply; neither they nor what follows is part of it.
        strip: whether space around the reply is no part of it, as in a conversation.

    Attributes:
        stopped: True once a stop string was found.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, strip: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._strip = strip
        self._ids: list[int] = []
        # Only a window is decoded: from one whole character before what is new, because some tokenizers write
        # a token in another way at the beginning of a text.
        self._window = 0
        self._read = 0
        self._raw = ""
        self._sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; the text that is certain now and was not before."""
        self._ids.append(token)
        known, whole = (
            self._decode(self._ids[self._window : self._read]),
            self._decode(self._ids[self._window :]),
        )
        if len(whole) <= len(known) or whole.endswith(_HALF):
            return ""
        return self._grow(whole[len(known) :])

    def finish(self) -> str:
        """The rest, after the last token."""
        if self.stopped:
            return ""
        known = self._decode(self._ids[self._window : self._read])
        text = self._grow(self._decode(self._ids[self._window :])[len(known) :])
        return text + self._release(self._end())

    def _grow(self, text: str) -> str:
        self._window, self._read = self._read, len(self._ids)
        # A stop string may begin in what is known and end in what is new.
        start = max(0, len(self._raw) - self._longest + 1)
        self._raw += text
        found = [place for place in (self._raw.find(stop, start) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            self._raw = self._raw[: min(found)]
            return self._release(self._end())
        return self._release(min(self._end(), len(self._raw) - self._pending()))

    def _end(self) -> int:
        return len(self._raw.rstrip()) if self._strip else len(self._raw)

    def _pending(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(self._raw)), 0, -1):
            if any(stop.startswith(self._raw[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, end: int) -> str:
        begin = max(self._sent, len(self._raw) - len(self._raw.lstrip()) if self._strip else 0)
        if end <= begin:
            return ""
        self._sent = end
        return self._raw[begin:end]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
