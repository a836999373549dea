"""The shipped environments: nothing to gain without doing the task, all to gain by doing it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.environments.base import (
    Environment,
    build_environment,
    call,
    construct,
    load_environment,
)
from stateset_ray.environments.boundary import ask
from stateset_ray.environments.customer_service import CustomerService
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import ConfigError, EnvironmentFault
from stateset_ray.types import Message, Split, Step, Task

CUSTOMER_SERVICE = "stateset_ray.environments.customer_service:CustomerService"
ECHO = "stateset_ray.environments.echo:Echo"
BLAME = "stateset_ray.environments.blame:Blame"
VARIANTS = [(ECHO, {}), (BLAME, {}), *((CUSTOMER_SERVICE, {"difficulty": d}) for d in (1, 2, 3))]
IDS = ["echo", "blame", "service-1", "service-2", "service-3"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

Reply = Callable[[Environment, list[Message], int], str]
"""What a scripted policy says, given the environment, the conversation so far and the turn."""


async def converse(
    env: Environment, task: Task, reply: Reply, *, seed: int = 0, limit: int = 12
) -> tuple[list[Message], list[Step]]:
    """Play one conversation to its end, or to `limit` replies."""
    step: Step = await env.reset(task, seed)  # type: ignore[misc]
    log, steps = list(step.messages), []
    for turn in range(limit):
        log.append(Message("assistant", reply(env, log, turn)))
        step = await env.step(log[-1])  # type: ignore[misc]
        log.extend(step.messages)
        steps.append(step)
        if step.terminated or step.truncated:
            break
    return log, steps


def play(
    path: str,
    options: dict[str, object],
    tasks: Iterable[tuple[Split, int]],
    reply: Reply,
    *,
    limit: int = 12,
) -> list[tuple[list[Message], list[Step]]]:
    """Play many conversations, one fresh environment each."""

    async def run() -> list[tuple[list[Message], list[Step]]]:
        played = []
        for split, index in tasks:
            env = build_environment(path, options)
            played.append(await converse(env, env.task(split, index), reply, seed=index, limit=limit))
        return played

    return asyncio.run(run())


def tasks(count: int, splits: tuple[Split, ...] = SPLITS) -> list[tuple[Split, int]]:
    return [(split, index) for split in splits for index in range(count)]


def total(steps: list[Step]) -> float:
    return sum(step.reward for step in steps)


def expert(env: Environment, log: list[Message], turn: int) -> str:
    return env.expert()


def constant(text: str) -> Reply:
    return lambda env, log, turn: text


@pytest.mark.parametrize(("path", "options"), VARIANTS, ids=IDS)
def test_the_expert_scores_exactly_one_on_every_task(path: str, options: dict[str, object]) -> None:
    for log, steps in play(path, options, tasks(200), expert):
        assert total(steps) == 1.0, log
        assert steps[-1].terminated and not steps[-1].truncated
        assert steps[-1].info["solved"] is True


@pytest.mark.parametrize(("path", "options"), VARIANTS, ids=IDS)
def test_train_and_heldout_share_no_task(path: str, options: dict[str, object]) -> None:
    env = build_environment(path, options)
    drawn = [env.task(split, index) for split, index in tasks(500)]
    assert len({task.seed for task in drawn}) == len({task.id for task in drawn}) == 1000
    assert {(task.split, task.seed % 2) for task in drawn} == {("train", 0), ("heldout", 1)}
    assert drawn[3] == build_environment(path, options).task("train", 3)


@pytest.mark.parametrize(("path", "options"), VARIANTS, ids=IDS)
def test_the_same_task_seed_and_replies_give_the_same_conversation(
    path: str, options: dict[str, object]
) -> None:
    def erratic(env: Environment, log: list[Message], turn: int) -> str:
        return env.expert() if turn % 2 else f"Hello number {turn}"

    random.seed(1)
    first = play(path, options, tasks(10), erratic)
    random.seed(2)
    assert first == play(path, options, tasks(10), erratic)
    openings = {log[-1].content for log, _ in play(path, options, tasks(30), constant(""), limit=1)}
    assert len(openings) > 1


@pytest.mark.parametrize(("path", "options"), VARIANTS, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_reply_breaks_it_and_rewards_stay_bounded(
    path: str, options: dict[str, object], data: st.DataObject
) -> None:
    words = st.lists(
        st.sampled_from(
            ["CALL", "lookup", "cancel", "refund", "order=", "order=12345", '"', "number", "?", "\n", "$24",
             "shipped", "cannot", "Friday", "abc", "12 Oak St", "not"]
        ),
        max_size=8,
    ).map(" ".join)  # fmt: skip
    text = st.one_of(st.text(max_size=40), words, st.just("<expert>"))

    def reply(env: Environment, log: list[Message], turn: int) -> str:
        said = data.draw(text)
        return env.expert() if said == "<expert>" else said

    split, index = data.draw(st.sampled_from(SPLITS)), data.draw(st.integers(0, 99))
    [(_, steps)] = play(path, options, [(split, index)], reply)
    assert steps[-1].terminated or steps[-1].truncated
    assert all(math.isfinite(step.reward) for step in steps)
    assert -1.0 <= total(steps) <= 1.0
    json.dumps([dict(step.info) for step in steps], allow_nan=False)


@pytest.mark.parametrize(("path", "options"), VARIANTS, ids=IDS)
def test_closing_is_harmless_at_any_time(path: str, options: dict[str, object]) -> None:
    async def run() -> None:
        env = build_environment(path, options)
        await call(env.close)
        await call(env.reset, env.task("train", 0), 0)
        await call(env.close)

    asyncio.run(run())


# Echo


def echo_word(log: list[Message]) -> str:
    return log[-1].content.removeprefix("Say: ")


def test_echo_pays_for_every_position_and_charges_for_every_other() -> None:
    def off_by(change: Callable[[str], str]) -> float:
        [(_, steps)] = play(ECHO, {"turns": 1}, [("train", 0)], lambda env, log, turn: change(echo_word(log)))
        return total(steps)

    wrong_letter = off_by(lambda word: word[:2] + word[0])
    assert off_by(lambda word: word) == off_by(lambda word: f" {word}\n") == 1.0
    assert wrong_letter == pytest.approx((1 + 1 - 0.5) / 3)
    assert off_by(lambda word: word[:2] + "d") < wrong_letter
    assert off_by(lambda word: word[:2] + "~") < off_by(lambda word: word[:2] + "d")
    assert off_by(lambda word: word[:2] + "\N{SNOWMAN}") == pytest.approx((1 + 1 - 1) / 3)
    assert off_by(lambda word: word[:2]) == pytest.approx((1 + 1 - 1) / 3)
    assert off_by(lambda word: word + "a") == pytest.approx((3 - 1) / 4)


@pytest.mark.parametrize(
    "junk",
    ["", "a", "aa", "aaa", "bbbb", "c" * 200, "xyz", "Say: ", "ab" * 20, "abc" * 9, "hello", "\N{SNOWMAN}"],
)
def test_echo_gives_nothing_for_junk_on_any_task(junk: str) -> None:
    assert max(total(steps) for _, steps in play(ECHO, {}, tasks(40), constant(junk))) <= 1e-12


@pytest.mark.parametrize("options", [{}, {"alphabet": "ab"}, {"length": 5, "alphabet": "abcd"}])
def test_echo_gives_nothing_for_guessing_on_average(options: dict[str, object]) -> None:
    alphabet, length = str(options.get("alphabet", "abc")), int(str(options.get("length", 3)))
    rng = random.Random(0)
    guesses = [
        constant(alphabet[0] * length),
        constant((alphabet * length)[:length]),
        lambda env, log, turn: "".join(rng.choices(alphabet, k=length)),
        lambda env, log, turn: log[-1].content,
    ]
    for guess in guesses:
        played = play(ECHO, options, tasks(1000, ("train",)), guess)
        assert sum(total(steps) for _, steps in played) / len(played) < 0.05


def test_echo_tells_random_replies_apart() -> None:
    rng = random.Random(0)
    played = play(
        ECHO, {}, tasks(20), lambda env, log, turn: "".join(chr(rng.randrange(32, 127)) for _ in range(6))
    )
    assert len({round(total(steps), 9) for _, steps in played}) > len(played) / 2


@pytest.mark.parametrize(
    "options", [{"length": 0}, {"turns": 0}, {"alphabet": "a"}, {"alphabet": "aab"}, {"alphabet": "a b"}]
)
def test_echo_refuses_options_that_cannot_be_played(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        build_environment(ECHO, options)


# Blame


def test_blame_pays_luck_for_the_guess_and_at_the_end_for_the_words() -> None:
    def only(right: int) -> Reply:
        """The expert on the guess and on the first `right` words, then silence."""
        return lambda env, log, turn: env.expert() if turn <= right else ""

    for right, last in ((3, 0.75), (2, 0.25), (0, -0.75)):
        [(_, steps)] = play(BLAME, {}, [("train", 0)], only(right))
        assert [step.reward for step in steps] == pytest.approx([0.25, 0.0, 0.0, last])
        assert steps[-1].info == {"right": right, "solved": right == 3}


def test_blame_tosses_a_fair_coin_that_hangs_on_the_whole_guess_and_on_the_task() -> None:
    def luck(guess: str, split: Split = "train") -> list[bool]:
        played = play(BLAME, {}, tasks(1000, (split,)), constant(guess), limit=1)
        return [steps[0].reward > 0 for _, steps in played]

    guesses = ["", "0", "1", "01", "1 ", "heads", "\N{SNOWMAN}", "x" * 99]
    tossed = [luck(guess) for guess in guesses]
    for i, first in enumerate(tossed):
        assert abs(sum(first) - 500) < 64  # four standard deviations
        assert luck(guesses[i]) == first
        for second in tossed[:i]:
            assert abs(sum(a == b for a, b in zip(first, second, strict=True)) - 500) < 64
    assert luck("0") != luck("0", "heldout")


@pytest.mark.parametrize("junk", ["", "a", "aaa", "Guess!", "Say: ", "abc" * 9, "\N{SNOWMAN}"])
def test_blame_gives_nothing_for_the_words_of_who_does_not_listen(junk: str) -> None:
    assert max(total(steps[1:]) for _, steps in play(BLAME, {}, tasks(40), constant(junk))) <= 1e-12


def test_blame_gives_nothing_for_guessing_on_average() -> None:
    rng = random.Random(0)
    played = play(BLAME, {}, tasks(1000), lambda env, log, turn: "".join(rng.choices("abc", k=3)))
    assert abs(sum(total(steps) for _, steps in played) / len(played)) < 0.05


@pytest.mark.parametrize("options", [{"luck": 1.0}, {"luck": -0.1}, {"words": 0}, {"alphabet": "a"}])
def test_blame_refuses_options_that_cannot_be_played(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        build_environment(BLAME, options)


# Options of customer service


@pytest.mark.parametrize(
    "options",
    [{"difficulty": 0}, {"difficulty": 4}, {"difficulty": True}, {"intents": []}, {"intents": ["complain"]},
     {"intents": "refund"}],
)  # fmt: skip
def test_customer_service_refuses_unknown_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        CustomerService(**options)  # type: ignore[arg-type]
    assert caught.value.mend


def test_customer_service_refuses_a_misspelt_option_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="dificulty"):
        load_environment(CUSTOMER_SERVICE, {"dificulty": 1})


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_customer_service_plays_only_the_intents_it_is_given(difficulty: int) -> None:
    options = {"difficulty": difficulty, "intents": ["cancel", "order_status"]}
    seen = {steps[-1].info["intent"] for _, steps in play(CUSTOMER_SERVICE, options, tasks(20), expert)}
    assert seen == {"cancel", "order_status"}
    env = build_environment(CUSTOMER_SERVICE, options)
    assert [env.task("train", index).data["intent"] for index in range(3)] == [
        "cancel", "order_status", "cancel",
    ]  # fmt: skip


class _Cancelled(Echo):
    """Awaits a task of its own that somebody has cancelled, as HTTP clients do."""

    async def step(self, message: Message) -> Step:
        own = asyncio.ensure_future(asyncio.Event().wait())
        own.cancel()
        await own
        return Step()


def test_what_an_environment_has_cancelled_is_its_fault_and_cancels_nobody() -> None:
    async def play() -> None:
        with pytest.raises(EnvironmentFault, match="was cancelled"):
            await ask(_Cancelled(), "step", 5.0, Message("assistant", "hi"))
        asked = asyncio.create_task(ask(_Waits(), "step", 5.0, Message("assistant", "hi")))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):  # the conversation itself: passed on
            await asked

    asyncio.run(play())


class _Waits(Echo):
    async def step(self, message: Message) -> Step:
        await asyncio.Event().wait()
        return Step()


# What a module of somebody's does when it is imported


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import sys; sys.exit(0)", r"it calls sys.exit\(0\) \(.*quits\.py, line 1\)"),
        ("x = 1\ndef f(:", r"SyntaxError: invalid syntax \(.*quits\.py, line 2\)"),
        ("\n\n1 / 0", r"ZeroDivisionError: division by zero \(.*quits\.py, line 3\)"),
        ("\nimport nowhere", r"No module named 'nowhere' \(.*quits\.py, line 2\)"),
    ],
)
@pytest.mark.parametrize("path", ["quits:A", "gymnasium:quits:A"])
def test_a_module_that_cannot_be_imported_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str, path: str
) -> None:
    (tmp_path / "quits.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quits", raising=False)
    with pytest.raises(ConfigError, match=says if path == "quits:A" else says.partition(r" \(")[0]):
        build_environment(path, {})


@pytest.mark.parametrize("path", [".b:C", "a..b:C", "a.:C"])
def test_a_relative_name_is_no_module(path: str) -> None:
    with pytest.raises(ConfigError, match="no name of a module"):
        load_environment(path, {})


class Leaves(Echo):
    def __init__(self) -> None:
        sys.exit(0)


def test_an_environment_that_exits_where_it_is_built_ends_no_command() -> None:
    with pytest.raises(ConfigError, match=r"sys\.exit\(0\).*test_environments"):
        construct(Leaves, {})
