"""Tools as text: how a policy calls them in its reply, and how a bad call is answered.

Chat templates of small models drop the `tools` argument without a word, so tools are described in the
system prompt and called in plain text, one call a line:

    CALL lookup order=48213
    CALL change_address order=48213 address="12 Oak St"

A bad call is a `ToolSyntaxError`. It is content and not a failure: its `correction` goes back to the
policy, and the conversation goes on.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field

from stateset_ray.errors import StatesetError
from stateset_ray.types import ToolCall

__all__ = [
    "Tool", "ToolSyntaxError", "Toolbox", "check_call", "describe", "format_call", "one_call", "parse_calls",
]  # fmt: skip

_CALL = re.compile(r"\s*CALL(?!\w)(.*)", re.DOTALL)
_NAME = re.compile(r"\s*([A-Za-z_]\w*)")
_ARGUMENT = re.compile(r'\s+([A-Za-z_]\w*)=(?:"([^"]*)"|([^\s"=]+))(?=\s|\Z)')
_BARE = re.compile(r'[^\s"=]+')


class ToolSyntaxError(StatesetError):
    """A call that cannot be carried out as it is written."""

    @property
    def correction(self) -> str:
        """One line that tells the policy what to write instead."""
        return f"error: {self.problem}; {self.mend}" if self.mend else f"error: {self.problem}"


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that a policy can call.

    Attributes:
        name: what is written after CALL.
        description: what it does, in a few words; empty where the name says it.
        parameters: every parameter, all of them needed, with the placeholder that describes it.

    Example:
        >>> Tool("lookup", "find an order", {"order": "N"}).usage
        'CALL lookup order=N'
    """

    name: str
    description: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def usage(self) -> str:
        """A call of this tool with placeholders for values."""
        return " ".join(["CALL", self.name, *(f"{name}={hint}" for name, hint in self.parameters.items())])


class Toolbox(ABC):
    """What an environment offers to a policy that is served: its tools, as it was trained with them.

    An environment that builds one in `reset` and reads and answers calls by it in `step` serves what it
    trains. Written for an endpoint, `call` reaches a real system; it is asked for many conversations at
    once, and again for the same call if a client asks again.

    Attributes:
        system: the system prompt that the policy was trained with.
        tools: what may be called.
    """

    system: str
    tools: tuple[Tool, ...]

    def read(self, text: str) -> ToolCall | None:
        """The call that a reply makes, checked; None if the reply is for the user.

        Raises:
            ToolSyntaxError: it makes a call that cannot be carried out; the policy is told its `correction`.
        """
        return one_call(text, self.tools)

    @abstractmethod
    def call(self, call: ToolCall, caller: str) -> str | Awaitable[str]:
        """Carry out a checked call; write it `async` or plain, plain ones run in a thread.

        Args:
            caller: the name of the API key for which the policy acts; "" in training. What a key may not see
                or change is to be refused here: arguments come from a model, and so from its users.

        Returns:
            What the policy is told.
        """


def describe(tools: Iterable[Tool]) -> str:
    """The tools as text for a system prompt, one line each.

    Example:
        >>> print(describe([Tool("lookup", "find an order", {"order": "N"}), Tool("bye")]))
        CALL lookup order=N (find an order)
        CALL bye
    """
    return "\n".join(f"{t.usage} ({t.description})" if t.description else t.usage for t in tools)


def parse_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls in a reply, in order; lines that do not start with CALL are no calls.

    Example:
        >>> parse_calls('One moment.\\nCALL lookup order=48213')
        (ToolCall(name='lookup', arguments={'order': '48213'}),)

    Raises:
        ToolSyntaxError: a line starts with CALL and cannot be read. Nothing else is ever raised.
    """
    # Not splitlines(): it also cuts at characters that may stand inside a quoted value.
    found = (_CALL.fullmatch(line) for line in text.split("\n"))
    return tuple(_parse(match[1]) for match in found if match)


def one_call(text: str, tools: Iterable[Tool]) -> ToolCall | None:
    """The one call in a reply, checked against the tools that there are; None if it makes none.

    Raises:
        ToolSyntaxError: it makes several, or one that cannot be carried out.
    """
    calls = parse_calls(text)
    if not calls:
        return None
    if len(calls) > 1:
        raise ToolSyntaxError("more than one call", mend="make one call a reply")
    check_call(calls[0], tools)
    return calls[0]


def check_call(call: ToolCall, tools: Iterable[Tool]) -> None:
    """Check a call against the tools that there are.

    Raises:
        ToolSyntaxError: there is no such tool, or its parameters are other ones.
    """
    known = {tool.name: tool for tool in tools}
    tool = known.get(call.name)
    if tool is None:
        raise ToolSyntaxError(f"no tool {call.name[:40]}", given=call, mend=f"use {', '.join(known)}")
    missing = [name for name in tool.parameters if not call.arguments.get(name)]
    if missing or set(call.arguments) != set(tool.parameters):
        problem = f"{tool.name} needs {missing[0]}" if missing else f"{tool.name} does not take that"
        raise ToolSyntaxError(problem, given=call, mend=f"write {tool.usage}")


def format_call(call: ToolCall) -> str:
    """A call as a policy writes it: the inverse of `parse_calls`.

    Example:
        >>> format_call(ToolCall("move", {"order": "7", "address": "12 Oak St"}))
        'CALL move order=7 address="12 Oak St"'

    Raises:
        ToolSyntaxError: a name or a value cannot be written (it holds a quote or a line break).
    """
    values = (v if _BARE.fullmatch(v) else f'"{v}"' for v in call.arguments.values())
    text = " ".join(["CALL", call.name, *(f"{k}={v}" for k, v in zip(call.arguments, values, strict=True))])
    if "\n" in text or parse_calls(text) != (call,):
        raise ToolSyntaxError(
            "the call cannot be written as text",
            given=call,
            mend="use plain names, and values without quotes and line breaks",
        )
    return text


def _parse(rest: str) -> ToolCall:
    name = _NAME.match(rest)
    if name is None:
        raise ToolSyntaxError("no tool named", given=rest[:80], mend="write CALL tool name=value")
    arguments: dict[str, str] = {}
    at = name.end()
    while match := _ARGUMENT.match(rest, at):
        key, quoted, bare = match.groups()
        if key in arguments:
            raise ToolSyntaxError(f"{key[:40]} given twice", given=rest[:80], mend="give it once")
        arguments[key] = bare if quoted is None else quoted
        at = match.end()
    if rest[at:].strip():
        raise ToolSyntaxError(
            "cannot read the call", given=rest[:80], mend='write CALL tool name=value name="two words"'
        )
    return ToolCall(name[1], arguments)
