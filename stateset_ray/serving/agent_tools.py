"""The tools of an agent: whose they are, which of them it may call, and how long they may take.

Who waits for whom: a request for its tool, within that tool's time; plain tools for a thread. A tool that was
begun is not cut short because a client leaves: it ends by itself or by its time, and is written down.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from stateset_ray.environments.base import build_environment
from stateset_ray.environments.tools import Tool, Toolbox, ToolSyntaxError
from stateset_ray.errors import ConfigError
from stateset_ray.serving.audit import Audit
from stateset_ray.serving.events import Stepped
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.meters import Meters
from stateset_ray.serving.settings import AgentSettings, ServeSettings
from stateset_ray.serving.source import Source
from stateset_ray.types import Message, ToolCall

__all__ = ["Tools", "load_tools"]

_NAME = 64  # characters of a tool's name that are told; it may be whatever a model wrote


def load_tools(settings: ServeSettings) -> Toolbox:
    """The tools of the environment that the source was trained in.

    Raises:
        ConfigError: it has none, or not those that are allowed.
    """
    found = Source(settings.source).config().environment
    environment = build_environment(found.path, found.options)
    toolbox = environment.toolbox(environment.task("heldout", settings.agent.task))
    offered = [tool.name for tool in toolbox.tools]
    if missing := [name for name in settings.agent.tools if name not in offered]:
        raise ConfigError(
            "agent.tools names what the environment does not offer", given=missing,
            mend=f"it offers {', '.join(offered)}",
        )  # fmt: skip
    return toolbox


class Tools:
    """A toolbox behind its limits.

    Args:
        toolbox: from `load_tools`.
        settings: which tools are allowed, and how long each may take.
        meters: where calls are counted.
        audit: where calls are written down.
        per_caller: calls of one caller that are under way at a time; more are refused.

    Attributes:
        system: the prompt that the policy was trained with.
        allowed: the tools that may be called.
    """

    def __init__(
        self, toolbox: Toolbox, settings: AgentSettings, meters: Meters, audit: Audit,
        per_caller: float = math.inf,
    ) -> None:  # fmt: skip
        self._toolbox = toolbox
        self._settings = settings
        self._meters = meters
        self._audit = audit
        self._threads = ThreadPoolExecutor(settings.tools_at_once, thread_name_prefix="tool")
        self._per_caller = per_caller
        self._under_way: dict[asyncio.Task[Any], str] = {}  # and for whom
        self.system = toolbox.system
        self.allowed: tuple[Tool, ...] = tuple(
            tool for tool in toolbox.tools if not settings.tools or tool.name in settings.tools
        )

    @property
    def under_way(self) -> int:
        """Calls that have not ended, whether or not somebody waits for them."""
        return len(self._under_way)

    async def take(self, step: Stepped, *, request: str, caller: str, seconds: float) -> Stepped | None:
        """What a reply asks for, done; None if it asks for nothing and is the answer.

        Args:
            step: with the reply as its only message of substance.
            request: its id, for the log.
            caller: the name of the API key.
            seconds: that are left to begin it; one that was begun gets its own time.

        Raises:
            ApiError: a tool is asked for and was not begun: 504, no seconds are left; 429, the caller has
                too many under way, which go on though their requests are gone.
        """
        try:
            call = self._toolbox.read(step.messages[0].content)
            if call is None:
                return None
            step = replace(step, tool=call.name[:_NAME], arguments=call.arguments)
            if call.name not in {tool.name for tool in self.allowed}:
                names = ", ".join(tool.name for tool in self.allowed)
                raise ToolSyntaxError(f"no tool {call.name[:40]}", given=call, mend=f"use {names}")
        except ToolSyntaxError as error:
            outcome = "not allowed" if step.tool else "malformed"
            return self._noted(_told(step, error.correction, outcome), request, caller)
        if seconds <= 0:
            raise ApiError(
                504, "deadline_exceeded", "no time was left for a call of a tool, and it was not begun"
            )
        if sum(whose == caller for whose in self._under_way.values()) >= self._per_caller:
            # Who leaves gives a request's place back, and must not gather tools that run all the same.
            raise ApiError(429, "too_many_requests", "this key has too many tools under way", retry_after=1.0)
        # Its own task: what changes something in the world must end as a whole, and be written down.
        task = asyncio.create_task(self._carry_out(step, call, request, caller))
        self._under_way[task] = caller
        task.add_done_callback(self._under_way.pop)
        return await asyncio.shield(task)

    async def _carry_out(self, step: Stepped, call: ToolCall, request: str, caller: str) -> Stepped:
        # Written down before it changes anything: this process may not live to see its end.
        self._audit.write(replace(step, outcome="begun"), request=request, key=caller, problem="")
        started, problem = time.monotonic(), ""
        try:
            text = await self._for_at_most(self._settings.tool_seconds, self._call(call, caller))
            if not isinstance(text, str):
                raise TypeError(f"a tool must give text, not {type(text).__name__}")
            # Half of a character, which no tokenizer takes, may come from anywhere.
            text = text[: self._settings.result_chars].encode("utf-8", "replace").decode()
            step = _told(step, text, "done")
        except TimeoutError:
            step = _told(step, "error: the tool took too long", "timeout")
        except BaseException as error:  # whatever its author chose; nobody outside is told
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # else it is the tool's own, of something that it waited for
            problem = type(error.__cause__ if isinstance(error, _Escaped) else error).__name__
            step = _told(step, "error: the tool failed", "failed")
        return self._noted(replace(step, seconds=time.monotonic() - started), request, caller, problem)

    @staticmethod
    async def _for_at_most(seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
        """What it gives; it is left to itself if it neither ends in time nor lets itself be cancelled.

        Raises:
            TimeoutError: it has not ended in time.
        """
        task = asyncio.create_task(work)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else may look
        try:
            await asyncio.wait({task}, timeout=seconds)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        raise TimeoutError

    async def _call(self, call: ToolCall, caller: str) -> Any:
        try:
            if inspect.iscoroutinefunction(self._toolbox.call):
                return await self._toolbox.call(call, caller)
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(self._threads, self._plainly, call, caller)
            return await result if inspect.isawaitable(result) else result
        except (KeyboardInterrupt, SystemExit) as error:  # a task would end the event loop with these
            raise _Escaped from error

    def _plainly(self, call: ToolCall, caller: str) -> Any:
        try:
            return self._toolbox.call(call, caller)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                raise
            # A future does not take these, or hands them to the event loop, which ends.
            raise _Escaped from error

    def _noted(self, step: Stepped, request: str, caller: str, problem: str = "") -> Stepped:
        known = step.tool if step.tool in {tool.name for tool in self.allowed} else "other"
        self._meters.add("tool_calls", 1, tool=known, outcome=step.outcome)
        self._meters.observe("tool_seconds", step.seconds, tool=known)
        self._audit.write(step, request=request, key=caller, problem=problem)
        return step


class _Escaped(Exception):
    """A tool has raised what is no failure elsewhere; the cause says what."""


def _told(step: Stepped, text: str, outcome: str) -> Stepped:
    return replace(step, outcome=outcome, messages=(step.messages[0], Message("tool", text)))
