"""Environments of gymnasium whose observations and actions are text.

Named by the id that gymnasium knows them by, `gymnasium:MyTextEnv-v0`, or by the class behind it,
`gymnasium:package.module:MyTextEnv`. An observation is what the user says next, an action is the policy's
reply. Everything that such an environment does is called in a thread, since it may block.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from stateset_ray.environments.base import Environment
from stateset_ray.errors import ConfigError
from stateset_ray.plain import plain
from stateset_ray.types import Message, Step, Task

__all__ = ["GymnasiumText", "named"]

_SEEDS = 2**31
"""Seeds that any generator takes, numpy's legacy one included; even, so that even seeds stay even."""

_found_good: set[str] = set()
"""What was made once in this process and speaks text; a conversation need not be checked again."""


class GymnasiumText(Environment):
    """A gymnasium environment of text spaces, one instance for each conversation.

    It is reset with the task's seed, from which all members of a group start alike; held-out tasks have odd
    seeds and the others even ones. `terminated` and `truncated` mean what they mean in gymnasium, and
    `rollout.max_turns` bounds a conversation besides. `info` is kept as far as it is plain data.

    Args:
        id: `MyTextEnv-v0`, as registered; `package.module:MyTextEnv-v0`, where importing the module registers
            it; or `package.module:MyTextEnv`, a class.
        kwargs: for its constructor, or for `gymnasium.make`.
        config: one mapping for its constructor instead of `kwargs`, as RLlib builds classes.
        spec: its `gymnasium.envs.registration.EnvSpec` as JSON, for a process in which nobody registers it.
        system: a system message that every conversation begins with.
        invalid_reward: a reply that its action space does not contain ends the conversation with this reward;
            None hands it over as it is, so that the environment decides.

    Raises:
        ConfigError: there is no such environment, it cannot be made, or a space of it is not text.

    Example:
        >>> GymnasiumText("FrozenLake-v1")
        Traceback (most recent call last):
        ...
        stateset_ray.errors.ConfigError: the observation space of FrozenLake-v1 is not text
          given: Discrete(16)
          to mend: wrap it so that this space is a gymnasium.spaces.Text
    """

    def __init__(
        self, id: str, kwargs: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None,
        spec: str = "", system: str = "", invalid_reward: float | None = None,
    ) -> None:  # fmt: skip
        if kwargs and config is not None:
            raise ConfigError(
                f"{id} takes its options as kwargs or as one config, not as both",
                given={"kwargs": dict(kwargs), "config": dict(config)},
            )
        self._id, self._kwargs, self._config, self._spec = id, dict(kwargs or {}), config, spec
        self._system, self._invalid_reward = system, invalid_reward
        self._env: Any = None
        key = repr((type(self).__name__, id, self._kwargs, config, spec))
        if key not in _found_good:
            env = self._make()
            try:
                _check_text(id, env)
            finally:
                env.close()
            _found_good.add(key)

    def reset(self, task: Task, seed: int) -> Step:
        """Make the environment and reset it with the task's seed; its observation opens the conversation."""
        self._env = self._make()
        observation, info = self._env.reset(seed=task.seed % _SEEDS)
        system = (Message("system", self._system),) if self._system else ()
        opening = (*system, Message("user", observation))
        return Step(opening, info=plain(info))

    def step(self, message: Message) -> Step:
        """Take a reply as the action."""
        action = message.content
        if self._invalid_reward is not None and not self._env.action_space.contains(action):
            return Step(reward=self._invalid_reward, terminated=True, info={"invalid_action": True})
        observation, reward, terminated, truncated, info = self._env.step(action)
        ended = bool(terminated or truncated)
        # What it says at its end is nobody's to answer, and often nothing.
        messages = () if ended and not observation else (Message("user", observation),)
        return Step(messages, float(reward), bool(terminated), bool(truncated), plain(info))

    def close(self) -> None:
        """Close the environment, if there is one."""
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def render(self) -> Any:
        """What its `render` gives, in the `render_mode` among its options; None before a reset."""
        return None if self._env is None else self._env.render()

    def _make(self) -> Any:
        gymnasium = _gymnasium(self._id)
        try:
            if self._spec:
                spec = gymnasium.envs.registration.EnvSpec.from_json(self._spec)
                return gymnasium.make(spec, **self._kwargs)
            cls = _class_at(self._id, gymnasium.Env)
            if cls is None:
                return gymnasium.make(self._id, **(self._kwargs or dict(self._config or {})))
            return cls(**self._kwargs) if self._config is None else cls(dict(self._config))
        except Exception as error:  # gymnasium's own errors, and whatever a constructor raises
            raise ConfigError(
                f"gymnasium cannot make {self._id}: {type(error).__name__}: {error}",
                given=self._kwargs or self._config or None,
                mend="name it as gymnasium:Id-v0, gymnasium:module:Id-v0 (the module registers it) or "
                "gymnasium:module:Class",
            ) from error


def named(id: str) -> type[Environment]:
    """The class of environments with this id, whose options are those of gymnasium's environment.

    Raises:
        ConfigError: gymnasium is not installed.
    """
    _gymnasium(id)

    class Named(GymnasiumText):
        def __init__(self, **options: Any) -> None:
            super().__init__(id, options)

    Named.__name__ = Named.__qualname__ = id
    return Named


def _gymnasium(id: str) -> Any:
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        raise ConfigError(
            f"gymnasium, which {id} is an environment of, cannot be imported: {error}",
            mend="pip install gymnasium",
        ) from error


def _class_at(id: str, kind: type) -> Any:
    """The class that `module:Class` names, imported; None if this is an id of the registry."""
    module_name, colon, name = id.partition(":")
    if not colon:
        return None
    found = getattr(importlib.import_module(module_name), name, None)
    return found if isinstance(found, type) and issubclass(found, kind) else None


def _check_text(id: str, env: Any) -> None:
    text = importlib.import_module("gymnasium.spaces").Text
    for name in ("observation", "action"):
        space = getattr(env, f"{name}_space", None)
        if not isinstance(space, text):
            raise ConfigError(
                f"the {name} space of {id} is not text",
                given=space,
                mend="wrap it so that this space is a gymnasium.spaces.Text",
            )
