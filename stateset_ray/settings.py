"""Settings as text and trees: overrides, and errors that name the key, the value and the nearest key."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from stateset_ray.errors import ConfigError

__all__ = ["apply_override", "leaves", "put", "unknown_key", "validated"]

_Model = TypeVar("_Model", bound=BaseModel)


def apply_override(tree: dict[str, Any], setting: str) -> None:
    """Set one `section.key=value` in a tree of settings; the value is TOML, or a bare word.

    Raises:
        ConfigError: the setting is malformed, or names a value as if it were a section.
    """
    key, equals, text = setting.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(
            "an override must look like section.key=value",
            given=setting,
            mend="for example --set train.steps=5",
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: --set model.name=tiny
    put(tree, path, value, given=setting)


def put(tree: dict[str, Any], path: Sequence[str], value: Any, *, given: object) -> None:
    """Set one value in a tree of settings; sections on the way are made.

    Args:
        given: what is to be changed, for the error.

    Raises:
        ConfigError: the path leads through a value.
    """
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{part!r} in this override is a value, not a section", given=given)
    node[path[-1]] = value


def validated(model: type[_Model], tree: Mapping[str, Any], source: str) -> _Model:
    """The model that a tree of settings describes.

    Args:
        source: where the settings come from, for the error.

    Raises:
        ConfigError: every problem found, each with its key, the value given and the nearest key.
    """
    for key, value in leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number", given=value)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(model, cast(Mapping[str, Any], detail)) for detail in error.errors()]
        raise ConfigError(
            f"the configuration ({source}) is wrong:\n" + "\n".join(f"  - {p}" for p in problems)
        ) from error


def _explain(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unknown_key(model, key)
    message = str(detail["msg"]).removeprefix("Value error, ")
    if isinstance(detail["input"], Mapping) and detail["type"] == "value_error":
        return message  # a check across fields names its own keys and values
    return f"{key}: {message} (given: {detail['input']!r})"


def unknown_key(model: type[BaseModel], key: str) -> str:
    """What is said of a key that a model does not have: with the nearest one that it has.

    Example:
        >>> from stateset_ray.config import Config
        >>> unknown_key(Config, "learner.learning_rat")
        "unknown key 'learner.learning_rat'; did you mean 'learner.learning_rate'?"
    """
    section, _, leaf = key.rpartition(".")
    known = list(_known_keys(model))
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    leaves = {name.rpartition(".")[2]: name for name in known}
    near = [siblings[m] for m in difflib.get_close_matches(leaf, siblings, n=1)] or [
        leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1)
    ]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {key!r}{hint}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _known_keys(info.annotation, f"{prefix}{name}.")


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in a tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
