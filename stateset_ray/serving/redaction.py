"""Personal data and keys out of log lines: e-mail addresses, card numbers, telephone numbers, API keys.

Conversations are in no log line; this is for what gets into one by other ways (an error's text, a name), and
for the sampled transcripts, which somebody has asked for.
"""

from __future__ import annotations

import logging
import re

__all__ = ["RedactingFilter", "redact", "redact_keys"]

_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+")
_KEY = re.compile(r"\b(?:sk|pk|key|token)-[A-Za-z0-9_-]{8,}|(?i:bearer)\s+[A-Za-z0-9._~+/-]{8,}=*")
_DIGITS = re.compile(r"(?<![\w.])\+?\d(?:[ ().-]{0,2}\d){6,18}(?!\w|\.\d+ms)")
"""Not a status and a time, as Serve's own lines end: `200 4223.7ms`."""


def redact(text: str) -> str:
    """The text, with what looks like personal data or a key replaced by its kind.

    Example:
        >>> redact("mail jo@shop.example, card 4111 1111 1111 1111, call +49 30 1234567")
        'mail [email], card [card], call [phone]'
    """
    text = redact_keys(text)
    text = _EMAIL.sub("[email]", text)
    return _DIGITS.sub(_number, text)


def redact_keys(text: str) -> str:
    """The text without what looks like a key."""
    return _KEY.sub("[key]", text)


def _number(match: re.Match[str]) -> str:
    written = match[0]
    digits = re.sub(r"\D", "", written)
    if 13 <= len(digits) <= 19 and _luhn(digits):
        return "[card]"
    # Plain runs of digits are ids, sizes and times as often as telephone numbers: only written ones count.
    formatted = written.startswith("+") or bool(re.search(r"[ ()-]", written))
    return "[phone]" if formatted and len(digits) <= 15 else written


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


class RedactingFilter(logging.Filter):
    """Redacts the message of every record that passes, its arguments put in first, and its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Never refuses a record."""
        text = record.getMessage()
        clean = redact(text)
        if clean != text:
            record.msg, record.args = clean, ()
        if record.exc_info:
            # Formatters take a text that is there already.
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        return True
