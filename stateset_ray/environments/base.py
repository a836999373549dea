"""The environment: who the policy talks to.

A class of two methods, `reset` and `step`, found by its import path (`package.module:Class`). Write them
`async` or plain; plain ones run in a thread, so that a blocking call holds up one conversation only.
One instance plays one conversation and is closed afterwards, whatever happened.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

from stateset_ray.environments.threads import THREADS
from stateset_ray.environments.tools import Toolbox
from stateset_ray.errors import ConfigError, StatesetError
from stateset_ray.types import Message, Split, Step, Task, derive_seed

__all__ = [
    "Environment",
    "build_environment",
    "call",
    "check_expert",
    "construct",
    "has_expert",
    "load_environment",
]

_NAMED = {"gymnasium": "stateset_ray.environments.gymnasium_text"}
"""Ecosystems whose environments have ids: `gymnasium:Id`. `named(id)` of the module gives their class."""


class Environment(ABC):
    """One conversation partner with its world: a simulated user, tools, rewards.

    Options come from `[environment.options]` as keyword arguments of `__init__`; an unknown option is an
    error before anything starts. `task`, `reset` and `step` must draw all their randomness from the
    seeds they are given.

    Example:
        >>> class Greeter(Environment):
        ...     def reset(self, task, seed):
        ...         return Step((Message("user", "Hello!"),))
        ...     def step(self, message):
        ...         return Step(reward=float("hello" in message.content.lower()), terminated=True)
    """

    def task(self, split: Split, index: int) -> Task:
        """The `index`-th task of a split; endless, and a pure function of options and arguments.

        The default gives train tasks even seeds and held-out tasks odd ones, so that an environment
        that builds everything from `task.seed` has disjoint splits by construction.
        """
        seed = derive_seed("task", split, index) // 2 * 2 + (split == "heldout")
        return Task(id=f"{split}-{index}", seed=seed, split=split)

    @abstractmethod
    def reset(self, task: Task, seed: int) -> Step | Awaitable[Step]:
        """Start the conversation: the opening messages, ending with one for the policy to answer.

        Args:
            task: what to play. All members of a group get the same task and the same seed, so they
                start from the same state.
            seed: for whatever is random in the partner's behaviour.
        """

    @abstractmethod
    def step(self, message: Message) -> Step | Awaitable[Step]:
        """Answer one reply of the policy: new messages, the reply's reward, whether this is the end."""

    def close(self) -> Awaitable[None] | None:
        """Free what the conversation held; called exactly once, after success, failure and cancel."""
        return None

    def expert(self) -> str:
        """What a scripted expert would reply now, with full knowledge of the world.

        Warm start learns from the dialogues that this produces. Environments without an expert leave it.

        Raises:
            ConfigError: this environment has no expert.
        """
        raise ConfigError(
            f"{type(self).__name__} has no scripted expert, so there is nothing to warm-start from",
            mend="set train.warm_start.steps=0, or write the environment's expert() method",
        )

    def toolbox(self, task: Task) -> Toolbox:
        """The tools for a policy that is served (`stateset-ray serve RUN --agent`).

        Args:
            task: whose world they work on, where the world is made up; else it may be ignored.

        Raises:
            ConfigError: this environment has no tools.
        """
        raise ConfigError(
            f"{type(self).__name__} offers no tools, so its policy cannot be served as one that acts",
            given=task.id, mend="serve it without --agent, or write the environment's toolbox() method",
        )  # fmt: skip


async def call(method: Any, *args: Any) -> Any:
    """Call an environment's method, in a thread unless it is `async`."""
    if _is_async(getattr(method, "__func__", method)):
        return await method(*args)
    run = partial(contextvars.copy_context().run, method, *args)
    result = await asyncio.get_running_loop().run_in_executor(THREADS, run)
    return await result if inspect.isawaitable(result) else result


@lru_cache(1024)
def _is_async(function: Any) -> bool:
    """Remembered, because every call of an environment asks."""
    return inspect.iscoroutinefunction(function)


def load_environment(path: str, options: Mapping[str, Any]) -> type[Environment]:
    """The environment class at `package.module:Class`, with its options checked against `__init__`.

    `gymnasium:Id` is the environment that gymnasium knows by that id (`environments.gymnasium_text`).

    Raises:
        ConfigError: the module or class does not exist or cannot be imported, is no Environment, or does not
            take an option.
    """
    module_name, _, class_name = path.partition(":")
    if adapter := _NAMED.get(module_name):
        of_id: type[Environment] = importlib.import_module(adapter).named(class_name)
        return of_id
    module = _imported(module_name, path)
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Environment)):
        near = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Environment) and not inspect.isabstract(value)
        ]
        raise ConfigError(
            f"{module_name} has no Environment class {class_name!r}",
            given=path,
            mend=f"it has: {', '.join(near) or 'none'}; subclass stateset_ray.Environment",
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"{class_name} does not define {missing}", given=path)
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise ConfigError(
            f"{class_name} cannot be built from environment.options: {error}",
            given=dict(options),
            mend=f"its signature is {class_name}{inspect.signature(found)}",
        ) from error
    return found


def _imported(name: str, path: str) -> ModuleType:
    """The module of an environment; whatever it does when it is imported is its author's to hear of."""
    mend = "name it as package.module:Class, importable from where you start the run"
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError("this is no name of a module", given=path, mend=mend)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the environment's module cannot be imported: {error}{_where(error)}", given=path, mend=mend
        ) from error
    except StatesetError:
        raise
    except (Exception, SystemExit) as error:  # a module that exits would end the command, unsaid
        raise ConfigError(
            f"the environment's module cannot be imported: {_told(error)}{_where(error)}",
            given=path,
            mend=f"mend that module; all that it says: python -c 'import {name}'",
        ) from error


def _told(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"


def _where(error: BaseException) -> str:
    """The file and line that an error is of, where they are known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<frozen"):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def build_environment(path: str, options: Mapping[str, Any]) -> Environment:
    """One instance of the environment at `path`.

    Raises:
        ConfigError: as `load_environment` does, or its constructor refuses the options.
    """
    return construct(load_environment(path, options), options)


def construct(cls: type[Environment], options: Mapping[str, Any]) -> Environment:
    """One instance of an environment that `load_environment` gave, whose options need no second look.

    Raises:
        ConfigError: its constructor refuses the options.
    """
    try:
        return cls(**options)
    except StatesetError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{cls.__name__} cannot be built: {_told(error)}{_where(error)}", given=dict(options)
        ) from error


def has_expert(environment: Environment) -> bool:
    """Whether the environment has a scripted expert to learn from."""
    return type(environment).expert is not Environment.expert


def check_expert(environment: Environment) -> None:
    """Raise the ConfigError that says so, if the environment has no scripted expert."""
    if not has_expert(environment):
        environment.expert()
