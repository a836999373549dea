"""Which of our environments an RLlib user's `env` is."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Mapping
from typing import Any

import gymnasium

from stateset_ray.actors.registered import is_registered
from stateset_ray.environments.base import Environment
from stateset_ray.errors import ConfigError

__all__ = ["environment_of", "portable_spec"]

_TEXT = "stateset_ray.environments.gymnasium_text:GymnasiumText"
_REGISTERED = "stateset_ray.actors.registered:Registered"


def environment_of(env: Any, env_config: Mapping[str, Any], spec: str = "") -> tuple[str, dict[str, Any]]:
    """The path and the options of `[environment]` that name an `env` and its `env_config`.

    Args:
        env: a name that `ray.tune.register_env` knows; `package.module:Class` or `gymnasium:Id` as in our
            configuration; an Environment class; an id of gymnasium; a gymnasium.Env class or its import
            path, built from the one mapping `env_config`, as RLlib does it.
        spec: what `portable_spec` gave of an id, for a process in which it is not registered.

    Raises:
        ConfigError: it names nothing that other processes can find.
    """
    options = dict(env_config)
    try:
        json.dumps(options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"env_config must be plain data, for it is written into config.toml: {error}", given=options
        ) from error
    if is_registered(env):
        return _REGISTERED, {"id": env, "config": options}
    if isinstance(env, str) and (cls := _gymnasium_class(env)) is not None:
        env = cls
    if isinstance(env, type) and issubclass(env, Environment):
        return _importable(env), options
    if isinstance(env, type) and issubclass(env, gymnasium.Env):
        return _TEXT, {"id": _importable(env), "config": options}
    if isinstance(env, str) and (spec or portable_spec(env)):
        given = {"id": env, "spec": spec or portable_spec(env)}
        return _TEXT, given | ({"kwargs": options} if options else {})
    if isinstance(env, str) and ":" in env:
        of_gymnasium = re.search(r"-v\d+$", env) and not env.startswith("gymnasium:")
        return f"gymnasium:{env}" if of_gymnasium else env, options
    raise ConfigError(
        "no environment has this name" if env is not None else "the algorithm has no environment",
        given=env,
        mend="environment('package.module:Class'), an Environment or gymnasium.Env class, or the id of an "
        "environment that gymnasium.register or ray.tune.register_env has registered",
    )


def _gymnasium_class(env: str) -> type | None:
    """The class of gymnasium that `module:Class`, or RLlib's `module.Class`, names, if it does."""
    module, _, name = env.rpartition(":" if ":" in env else ".")
    if not module or not name.isidentifier() or module.startswith("gymnasium:"):
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:  # whoever builds it says so, with the mend
        return None
    return found if isinstance(found, type) and issubclass(found, gymnasium.Env) else None


def _importable(cls: type) -> str:
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise ConfigError(
            f"the workers cannot import {cls.__qualname__}: it is defined in the script that is running, or "
            "inside of a function",
            given=f"{cls.__module__}.{cls.__qualname__}",
            mend="move it into a module beside the script, or give it a name with ray.tune.register_env",
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def portable_spec(id: Any) -> str:
    """The registration of an environment of gymnasium, for other processes; empty if there is none.

    Raises:
        ConfigError: other processes could not make it.
    """
    spec = gymnasium.registry.get(id) if isinstance(id, str) else None
    if spec is None:
        return ""
    entry = spec.entry_point
    if isinstance(entry, type):
        entry = _importable(entry)
    if not isinstance(entry, str) or entry.startswith("__main__:"):
        raise ConfigError(
            f"the workers cannot make {spec.id}: its entry point is not the name of an importable class",
            given=str(spec.entry_point),
            mend="register it with entry_point='package.module:Class', or with ray.tune.register_env",
        )
    portable = copy.deepcopy(spec)
    portable.entry_point, portable.vector_entry_point = entry, None
    text: str = portable.to_json()
    return text
