"""The pieces of conversations: calls as text, and simulated users."""

from __future__ import annotations

import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.environments.dialogue import Fact, Memory, SimulatedUser, stated
from stateset_ray.environments.tools import (
    Tool,
    ToolSyntaxError,
    check_call,
    describe,
    format_call,
    parse_calls,
)
from stateset_ray.types import ToolCall

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
VALUES = st.text(max_size=20).filter(lambda value: not set(value) & set('"\n'))
PIECES = st.sampled_from(
    ["CALL", "CALL ", "lookup", "order", "=", '"', " ", "\n", "48213", "\x1c", "\u2028", "="]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=12).map("".join)))
def test_parsing_any_text_gives_calls_or_a_correction(text: str) -> None:
    written = sum(line.split()[:1] == ["CALL"] for line in text.split("\n"))
    try:
        correction, calls = "", parse_calls(text)
    except ToolSyntaxError as error:
        correction, calls = error.correction, ()
    assert len(calls) == (0 if correction else written)
    assert correction == "" or correction.startswith("error: ")
    assert "\n" not in correction


@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=3))
def test_a_formatted_call_is_parsed_to_itself(name: str, arguments: dict[str, str]) -> None:
    call = ToolCall(name, arguments)
    assert parse_calls(f"One moment.\n{format_call(call)}\nThanks.") == (call,)


@pytest.mark.parametrize("call", [ToolCall("a b"), ToolCall("a", {"k": 'x"y'}), ToolCall("a", {"k": "x\ny"})])
def test_what_cannot_be_written_is_not_formatted(call: ToolCall) -> None:
    with pytest.raises(ToolSyntaxError):
        format_call(call)


@pytest.mark.parametrize(
    "line",
    ["CALL", "CALL 7", "CALL lookup 48213", "CALL lookup order=", "CALL lookup order=1 order=2",
     'CALL move address="12 Oak', "CALL move address=12 Oak", "CALL lookup(order=1)", "CALL: lookup order=1"],
)  # fmt: skip
def test_malformed_calls_are_told_apart_from_text(line: str) -> None:
    with pytest.raises(ToolSyntaxError) as caught:
        parse_calls(f"Sure.\n  {line}")
    assert pickle.loads(pickle.dumps(caught.value)).correction == caught.value.correction


@pytest.mark.parametrize("text", ["I will CALL you.", "call lookup order=1", "CALLED lookup order=1", ""])
def test_text_is_no_call(text: str) -> None:
    assert parse_calls(text) == ()


TOOLS = [Tool("lookup", "find an order", {"order": "N"}), Tool("bye")]


def test_calls_are_checked_against_the_tools() -> None:
    check_call(ToolCall("bye"), TOOLS)
    check_call(ToolCall("lookup", {"order": "1"}), TOOLS)
    for call, wanted in (
        (ToolCall("look", {"order": "1"}), "use lookup, bye"),
        (ToolCall("lookup"), "write CALL lookup order=N"),
        (ToolCall("lookup", {"order": ""}), "write CALL lookup order=N"),
        (ToolCall("lookup", {"order": "1", "fast": "yes"}), "write CALL lookup order=N"),
    ):
        with pytest.raises(ToolSyntaxError) as caught:
            check_call(call, TOOLS)
        assert wanted in caught.value.correction


def test_the_description_shows_how_to_call_every_tool() -> None:
    assert describe(TOOLS).splitlines() == ["CALL lookup order=N (find an order)", "CALL bye"]


STATUS = {"out": r"\bshipped\b", "in": r"\bdelivered\b"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("It has shipped.", {"out"}),
        ("SHIPPED and delivered", {"out", "in"}),
        ("It has not been shipped yet", set()),
        ("It hasn't shipped", set()),
        ("It can be delivered once it has shipped.", set()),
        ("It was not delivered, but it was shipped.", {"out"}),
        ("No, it has shipped.", {"out"}),
        ("I can see that it shipped", {"out"}),
        ("Not shipped? It shipped!", {"out"}),
    ],
)
def test_what_is_denied_or_supposed_is_not_stated(text: str, values: set[str]) -> None:
    assert stated(text, STATUS) == values


def user(patience: int = 2, seed: int = 0) -> SimulatedUser:
    facts = [
        Fact("order", "number", (("Wait.",), ("It is 7.", "7.")), "I said 7."),
        Fact("address", "address", (("12 Oak St.",),), "I said 12 Oak St."),
    ]
    complaints = {"": ["Pardon?"], "empty": ["Hello?"]}
    return SimulatedUser(facts, patience=patience, rng=random.Random(seed), complaints=complaints)


def test_a_user_tells_only_what_it_is_asked() -> None:
    customer = user()
    assert customer.answer("The number and the address matter.").text == ""
    assert customer.untold == ("order", "address")
    both = customer.answer("What are the number and the address?")
    assert (both.text, both.advanced, both.again) == ("Wait. 12 Oak St.", ("order", "address"), ())
    assert customer.untold == ("order",) and customer.times_asked("order") == 1
    second = customer.answer("Please give me number and address")
    assert second.advanced == ("order",) and second.again == ("address",) and "Oak" not in second.text
    assert customer.untold == ()
    assert customer.answer("The number?").text == "I said 7."


def test_a_user_leaves_when_out_of_patience() -> None:
    customer = user(patience=2)
    assert customer.complain("empty") == "Hello?" and not customer.left
    assert customer.complain("anything else") == "Pardon?" and customer.left


def test_a_user_draws_its_words_from_its_seed() -> None:
    def told(seed: int) -> str:
        customer = user(seed=seed)
        return [customer.answer("number?").text for _ in range(2)][1]

    assert {told(seed) for seed in range(9)} == {"It is 7.", "7."}


@given(st.text())
def test_the_memory_finds_every_reply_empty_or_repeated_the_second_time(text: str) -> None:
    memory = Memory()
    assert memory.fault(text) in ("", "empty")
    assert memory.fault(f" {text}!") in ("empty", "repeated")
