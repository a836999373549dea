"""What people's code brings, made into what JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["plain"]


def plain(value: Any) -> Any:
    """What of a value JSON can hold: numpy's numbers as numbers, what is no data by its `repr`.

    A number that is not finite becomes None, half of a surrogate pair a question mark, a key its text.

    Example:
        >>> plain({"score": 0.5, 3: (b"ab", float("nan"))})
        {'score': 0.5, '3': ["b'ab'", None]}
    """
    if isinstance(value, str):
        return str(value).encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if callable(as_list := getattr(value, "tolist", None)):  # numbers and arrays of numpy
        return plain(as_list())
    return plain(repr(value))
