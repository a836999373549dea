"""Tools that the client brings and runs itself: OpenAI's function calling, in the words of Hermes' templates.

    <tool_call>
    {"name": "lookup", "arguments": {"order": 48213}}
    </tool_call>

The chat template must show the tools and write calls in this way, as those of Qwen and Hermes do; for others
tools are refused. What is inside of a call is data: it is handed to the client and nothing is done with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NoReturn

from pydantic import Field

from stateset_ray.errors import TemplateError
from stateset_ray.policies.renderer import Renderer
from stateset_ray.serving.answers import Answer
from stateset_ray.serving.events import Ended, Event, Piece
from stateset_ray.serving.reading import Strict

__all__ = ["CalledTool", "OfferedTool", "ToolsAnswer", "tool_renderer", "written"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_NAME = r"^[A-Za-z0-9_-]{1,64}$"


class _Function(Strict):
    name: str = Field(pattern=_NAME)
    description: str = ""
    parameters: dict[str, Any] = Field(default={})
    strict: Literal[False] | None = None
    """Nothing makes the policy keep to a schema, so true is refused."""


class OfferedTool(Strict):
    """A tool that the policy may ask the client to call."""

    type: Literal["function"]
    function: _Function


class _Call(Strict):
    name: str = Field(pattern=_NAME)
    arguments: str
    """JSON, as OpenAI has it."""


class CalledTool(Strict):
    """A call in a message of the assistant, as an answer had it."""

    id: str = Field(min_length=1, max_length=64)
    type: Literal["function"]
    function: _Call
    index: int | None = None
    """OpenAI's client leaves it in what it puts together from a stream; the place says as much."""


def written(content: str, calls: Sequence[CalledTool]) -> str:
    """A reply with calls as the policy writes it.

    Raises:
        ValueError: arguments are no JSON object.
    """
    parts = [content] if content else []
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if not isinstance(arguments, dict):
            raise ValueError("arguments must be a JSON object")
        parts.append(_block(call.function.name, arguments))
    return "\n".join(parts)


def tool_renderer(renderer: Renderer, tokenizer: Any, tools: str) -> Renderer:
    """A renderer that shows tools.

    Args:
        tools: a list of OpenAI's tools as JSON; control tokens in it stay words.

    Raises:
        TemplateError: the template does not show them, or writes calls in another way.
    """
    shown = json.loads(renderer.plain(tools))
    made = renderer.with_tools(shown)
    arguments = {"a": 1, "b": '\u00e4 "x"', "c": [True, None]}
    function = {"name": "look_up", "arguments": arguments}
    opening = {"role": "user", "content": "u"}
    result = {"role": "tool", "content": "r"}

    def text(reply: dict[str, Any]) -> str:
        chat = [opening, {"role": "assistant", **reply}, result]
        return str(
            tokenizer.apply_chat_template(chat, tools=shown, tokenize=False, add_generation_prompt=True)
        )

    try:
        structured = text({"content": "", "tool_calls": [{"type": "function", "function": function}]})
        plain = text({"content": _block("look_up", arguments)})
    except Exception as error:  # templates raise whatever their author chose
        raise TemplateError(f"the chat template refuses calls of tools: {error}") from error
    if structured != plain or _OPEN not in tokenizer.decode(
        tokenizer.encode(_OPEN, add_special_tokens=False), skip_special_tokens=True
    ):
        raise TemplateError("the chat template writes calls of tools in a way that is not read here")
    return made


class ToolsAnswer(Answer):
    """A chat completion in which the policy may ask for calls.

    Attributes:
        tools: the names that were offered.
    """

    tools: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._seen = ["" for _ in range(self.choices)]
        self._shown = [0 for _ in range(self.choices)]

    def completion(self) -> dict[str, Any]:
        """See `Answer.completion`."""
        body = super().completion()
        for choice in body["choices"]:
            index = choice["index"]
            content, calls = self._read(index, self.text(index))
            if calls:
                choice["message"] |= {"content": content or None, "tool_calls": calls}
                choice["finish_reason"] = "tool_calls"
        return body

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """See `Answer.chunks`; a call is one chunk, when it is complete."""
        for event in events:
            if isinstance(event, Piece):
                self._seen[event.choice] += event.text
                text = self._grown(event.choice, _certain(self._seen[event.choice]))
                if text or event.tokens:
                    yield self._chunk(event.choice, {"content": text}, tokens=event.tokens)
            elif isinstance(event, Ended):
                yield from self._last(event)

    def _last(self, event: Ended) -> Iterator[dict[str, Any]]:
        whole = self._seen[event.choice]
        _, calls = self._read(event.choice, whole)
        if calls:
            indexed = [{"index": place, **call} for place, call in enumerate(calls)]
            yield self._chunk(event.choice, {"tool_calls": indexed})
            yield self._chunk(event.choice, {}, finish="tool_calls")
            return
        if rest := self._grown(event.choice, len(whole)):
            yield self._chunk(event.choice, {"content": rest})
        yield self._end(event)

    def _grown(self, choice: int, end: int) -> str:
        begin, self._shown[choice] = self._shown[choice], max(end, self._shown[choice])
        return self._seen[choice][begin:end]

    def _read(self, choice: int, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What is said before the calls, and the calls; none where one of them is not what was offered."""
        blocks = list(_blocks(text)) if self.finish(choice) == "stop" else []
        if not blocks:
            return text, []
        calls: list[dict[str, Any]] = []
        for place, block in enumerate(blocks):
            try:
                call = json.loads(block, parse_constant=_refused)
                _json(call).encode()  # half of a character, written as an escape, cannot be sent
            except (ValueError, RecursionError):
                return text, []
            if (
                not isinstance(call, dict)
                or call.keys() != {"name", "arguments"}
                or not isinstance(call["name"], str)
                or call["name"] not in self.tools
                or not isinstance(call["arguments"], dict)
            ):
                return text, []
            function = {"name": call["name"], "arguments": _json(call["arguments"])}
            id = f"call_{self.id.rpartition('-')[2][:20]}_{choice}_{place}"
            calls.append({"id": id, "type": "function", "function": function})
        return text[: text.index(_OPEN)].rstrip(), calls


def _blocks(text: str) -> Iterator[str]:
    """What is between the marks, in one pass: a policy may well write nothing but marks, or line breaks."""
    end = 0
    while (begin := text.find(_OPEN, end)) >= 0 and (close := text.find(_CLOSE, begin)) >= 0:
        yield text[begin + len(_OPEN) : close].strip()
        end = close + len(_CLOSE)


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _certain(text: str) -> int:
    """How much of a text is said to the client, whatever follows."""
    if _OPEN in text:
        return len(text[: text.index(_OPEN)].rstrip())
    for length in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if text.endswith(_OPEN[:length]):
            text = text[:-length]
            break
    return len(text.rstrip())


def _block(name: str, arguments: dict[str, Any]) -> str:
    return f'{_OPEN}\n{{"name": "{name}", "arguments": {_json(arguments)}}}\n{_CLOSE}'


def _json(value: Any) -> str:
    """As chat templates write it.

    Raises:
        ValueError: it holds what JSON has no number for, as `1e999` is read.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
