"""What clients may send: honoured, or refused by name."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.protocol import parse_chat, parse_json
from stateset_ray.serving.settings import LimitSettings
from stateset_ray.types import Message

LIMITS = LimitSettings()
SOUND = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"order":  7}'}}
BROKEN = CALL | {"function": {"name": "look", "arguments": "[]"}}


def parse(**changes):
    return parse_chat(json.dumps(SOUND | changes).encode(), LIMITS)


def refused(body: bytes | dict, limits: LimitSettings = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat(body if isinstance(body, bytes) else json.dumps(SOUND | body).encode(), limits)
    return caught.value


def test_a_whole_request_is_read():
    request = parse(
        temperature=0, max_tokens=5, n=2, stop=["a", "b"], seed=-3, logprobs=True, stream=True,
        stream_options={"include_usage": True}, user="u", prompt_cache_key="c",
        messages=[
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
    )  # fmt: skip
    assert request.said() == (Message("system", "s"), Message("user", "ab"))
    assert (request.stops, request.reply_tokens, request.include_usage) == (("a", "b"), 5, True)
    assert parse(stop="x").stops == ("x",)
    assert parse(max_completion_tokens=7).reply_tokens == 7
    assert (parse(top_p=1).top_p, parse(top_p=0.25).top_p, parse(top_logprobs=None).top_logprobs) == (
        1,
        0.25,
        0,
    )
    assert parse(conversation="conv_1", messages=[]).conversation == "conv_1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0), ("tools", []), ("parallel_tool_calls", True),
        ("response_format", {"type": "text"}), ("store", False), ("top_logprobs", 0), ("logit_bias", {}),
        ("anything_null", None), ("stop", None), ("seed", None),
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_honoured(name, value):
    assert parse(**{name: value}) == parse()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5), ("presence_penalty", False), ("store", 0),
        ("logit_bias", {"1": 2}), ("response_format", {"type": "json_object"}),
        ("reasoning_effort", "high"), ("tool_choice", "required"), ("frequency_penalty", 1), ("audio", {}),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(name, value):
    error = refused({name: value})
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", name)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"chat_template": "{{ x }}"}, "unknown_parameter", "chat_template"),
        ({"messages": []}, "invalid_parameter", "messages"),
        ({"messages": [{"role": "user"}]}, "missing_parameter", "messages[0].content"),
        ({"messages": [{"role": "root", "content": "x"}]}, "invalid_parameter", "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]},
         "unknown_parameter", "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
            None, None,
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "invalid_parameter", "messages"),
        ({"n": True}, "invalid_parameter", "n"),
        ({"tools": [{}]}, "missing_parameter", "tools[0].type"),
        ({"tools": [TOOL | {"type": "web_search"}]}, "invalid_parameter", "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
         "invalid_parameter", "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]},
         "invalid_parameter", "tools[0].function.strict"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "unsupported_parameter", "parallel_tool_calls"),
        ({"tools": [TOOL], "conversation": "c"}, "unsupported_parameter", "tools"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}], "tools": [TOOL]},
         "invalid_parameter", "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}], "tools": [TOOL]},
         "invalid_parameter", "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
         "invalid_parameter", "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [BROKEN]}], "tools": [TOOL]},
         "invalid_parameter", "messages[0].tool_calls"),
        ({"top_p": True}, "invalid_parameter", "top_p"),
        ({"top_p": 1.1}, "invalid_parameter", "top_p"),
        ({"top_logprobs": 3}, "invalid_parameter", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_parameter", "top_logprobs"),
        ({"conversation": "c", "n": 2}, "invalid_parameter", "n"),
        ({"n": 1.0}, "invalid_parameter", "n"),
        ({"n": 0}, "invalid_parameter", "n"),
        ({"n": 9}, "limit_exceeded", "n"),
        ({"seed": 2**63}, "invalid_parameter", "seed"),
        ({"temperature": "1"}, "invalid_parameter", "temperature"),
        ({"temperature": True}, "invalid_parameter", "temperature"),
        ({"temperature": -0.1}, "invalid_parameter", "temperature"),
        ({"stream": 1}, "invalid_parameter", "stream"),
        ({"stop": ["a"] * 5}, "limit_exceeded", "stop"),
        ({"stop": [""]}, "invalid_parameter", "stop"),
        ({"stop": "x" * 65}, "limit_exceeded", "stop"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "invalid_parameter", "max_tokens"),
        ({"max_tokens": 0}, "invalid_parameter", "max_tokens"),
        ({"stream_options": {}}, "invalid_parameter", "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "invalid_parameter", "messages[0].content"),
        ({"user": "\ud800"}, "invalid_parameter", "user"),
        ({"model": ""}, "invalid_parameter", "model"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(changes, code, param):
    error = refused(changes)
    assert error.status == 400
    if code is not None:
        assert (error.code, error.param) == (code, param)
    assert "http://x" not in error.message


def test_calls_of_tools_are_read_as_the_policy_wrote_them():
    talk = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [CALL, CALL | {"id": "2"}]},
        {"role": "tool", "content": "here", "tool_call_id": "2"},
    ]
    request = parse(messages=talk, tools=[TOOL])
    block = '<tool_call>\n{"name": "look", "arguments": {"order": 7}}\n</tool_call>'
    assert request.said()[1:] == (Message("assistant", f"Hm.\n{block}\n{block}"), Message("tool", "here"))
    assert json.loads(request.offered) == [TOOL]
    assert parse(tools=[TOOL], tool_choice="none").offered == ""


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1, "a": 2}',
        b'{"n": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}", b'{"a": [1e999]}', b'{"a": -1e999}',
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body):
    assert refused(body).code == "invalid_json"


def test_lone_surrogates_are_refused():
    error = refused(b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}')
    assert (error.code, error.param) == ("invalid_parameter", "messages[0].content")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"a": [' + b"[]," * 300_000 + b"[]]}",
        b'{"a": "' + b'\\"' * 500_000,  # a string that is never closed
        b'{"a": "' + b"\\" * 999_999,
    ],
)
def test_hostile_bodies_cost_little(body):
    started = time.process_time()
    error = refused(body)
    assert error.code in ("limit_exceeded", "invalid_json")
    assert time.process_time() - started < 1.0


def test_brackets_in_strings_are_no_depth():
    assert parse(messages=[{"role": "user", "content": "[[[[{{{{" * 99 + '\\"'}]).said()


def test_the_limits_hold():
    limits = LimitSettings(messages=2, message_chars=5)
    many = {"messages": [{"role": "user", "content": "x"}] * 3}
    assert refused(many, limits).param == "messages"
    assert (
        refused({"messages": [{"role": "user", "content": "x" * 6}]}, limits).param == "messages[0].content"
    )


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.binary() | st.dictionaries(st.sampled_from([*SOUND, "n", "stop", "top_p", "x"]), _values).map(
    lambda tree: json.dumps(tree).encode()
))  # fmt: skip
def test_anything_is_read_or_refused(body):
    for read in (parse_chat, parse_json):
        try:
            read(body, LIMITS)
        except ApiError as error:
            assert error.status == 400  # noqa: PT017  # most bodies raise nothing
