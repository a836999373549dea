"""Which parameters are trained: freezing by name, and errors that name what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from stateset_ray.errors import ConfigError

__all__ = ["freeze", "nearest"]


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Exclude the parameters whose names match from training; tied ones have two names, either will do.

    Args:
        model: a Hugging Face model.
        patterns: names or shell patterns: `model.layers.[0-9].*`.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [p for name, p in parameters.items() if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(
                "learner.freeze names no parameter of this model",
                given=pattern,
                mend=f"its names look like {nearest(pattern, parameters)}",
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ConfigError("learner.freeze leaves nothing to train", given=list(patterns))


def nearest(name: str, known: Iterable[str]) -> str:
    """Up to three known names, those most like the given one first, for a message.

    Example:
        >>> nearest("qproj", ["q_proj", "k_proj", "norm"])
        'q_proj, k_proj'
    """
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return ", ".join(close or names[:3])
