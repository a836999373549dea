"""Environments that `ray.tune.register_env` has registered, which is how RLlib's users name theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.registry import ENV_CREATOR, _global_registry

from stateset_ray.environments.gymnasium_text import GymnasiumText
from stateset_ray.errors import ConfigError

__all__ = ["Registered", "is_registered"]


def is_registered(name: object) -> bool:
    """Whether somebody has registered an environment of this name in this Ray job."""
    return isinstance(name, str) and bool(_global_registry.contains(ENV_CREATOR, name))


class Registered(GymnasiumText):
    """A gymnasium environment of text spaces that is made by what was registered under a name.

    Every process of the Ray job can make it, wherever its class was defined.

    Args:
        id: the name.
        config: what it is made from.
        system, invalid_reward: see `GymnasiumText`.

    Raises:
        ConfigError: nobody has registered it in this Ray job, it cannot be made, or a space is not text.
    """

    def __init__(
        self, id: str, config: Mapping[str, Any] | None = None, system: str = "",
        invalid_reward: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(id, config=config or {}, system=system, invalid_reward=invalid_reward)

    def _make(self) -> Any:
        if not is_registered(self._id):
            raise ConfigError(
                "nobody has registered an environment of this name", given=self._id,
                mend="call ray.tune.register_env(name, creator) in the program that trains",
            )  # fmt: skip
        try:
            return _global_registry.get(ENV_CREATOR, self._id)(dict(self._config or {}))
        except Exception as error:
            raise ConfigError(
                f"what was registered as {self._id!r} cannot be made: {type(error).__name__}: {error}",
                given=self._config,
            ) from error
