"""What replies earn in customer service: adversaries get nothing, each mistake costs what it should."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable

import pytest

from stateset_ray.environments.cases import INTENTS
from stateset_ray.environments.customer_service import CustomerService
from stateset_ray.environments.shop import DAYS
from stateset_ray.types import Message, Split, Step, Task

DIFFICULTIES = [1, 2, 3]
SPLITS: tuple[Split, ...] = ("train", "heldout")
STUFFING = (
    "refunded cancelled changed updated cannot unable processing shipped delivered arrived final sale "
    + " ".join(DAYS)
    + " $24 12 Oak St"
)
Reply = Callable[[list[Message], int, random.Random], str]


def play(env: CustomerService, task: Task, reply: Reply, limit: int = 12) -> tuple[float, list[Step]]:
    """The total and the steps of one conversation with a policy that sees only what was said."""

    async def run() -> tuple[float, list[Step]]:
        rng = random.Random(task.seed)
        step = await env.reset(task, 0)
        log, steps = list(step.messages), []
        while not (step.terminated or step.truncated) and len(steps) < limit:
            log.append(Message("assistant", reply(log, len(steps), rng)))
            step = await env.step(log[-1])
            log.extend(step.messages)
            steps.append(step)
        return sum(step.reward for step in steps), steps

    return asyncio.run(run())


def constant(text: str) -> Reply:
    return lambda log, turn, rng: text


def in_turn(*texts: str) -> Reply:
    return lambda log, turn, rng: texts[turn % len(texts)]


def number_in(log: list[Message], default: str = "12345") -> str:
    found = re.findall(r"\b\d{5}\b", " ".join(m.content for m in log if m.role != "system"))
    return found[-1] if found else default


def sweep_tools(log: list[Message], turn: int, rng: random.Random) -> str:
    """Ask well, then try every tool on the order."""
    calls = ("lookup", "refund", "cancel", "change_address")
    if turn == 0:
        return "What is your order number?"
    tail = ' address="7 Oak St"' if turn == 4 else ""
    return f"CALL {calls[(turn - 1) % 4]} order={number_in(log)}{tail}"


def babble(log: list[Message], turn: int, rng: random.Random) -> str:
    words = [*STUFFING.split(), "order", "number", "?", "your", "CALL", "lookup", "the", "please", "I"]
    return " ".join(rng.choices(words, k=12))


ADVERSARIES: dict[str, Reply] = {
    "empty": constant(""),
    "punctuation": constant("..."),
    "one letter for ever": constant("a" * 200),
    "one word for ever": constant("order " * 40),
    "hello": constant("Hello! How can I help you today?"),
    "varied chit-chat": lambda log, turn, rng: f"I will look into this for you, thanks for waiting {turn}.",
    "sorry": constant("I am sorry, I cannot help you with that."),
    "copies the customer": lambda log, turn, rng: log[-1].content,
    "copies the opening": lambda log, turn, rng: log[1].content,
    "copies the system prompt": lambda log, turn, rng: log[0].content,
    "quotes the customer": lambda log, turn, rng: f"You said: {log[-1].content} ({turn})",
    "asks for ever": constant("What is your order number?"),
    "asks in many ways": lambda log, turn, rng: f"Please tell me your order number and address ({turn})?",
    "asks, then chats": in_turn("What is your order number?", "Thank you.", "One moment.", "All is well."),
    "stuffs": constant(STUFFING),
    "stuffs variedly": lambda log, turn, rng: f"{STUFFING} {turn}",
    "stuffs a question": lambda log, turn, rng: f"{STUFFING}. What is your order number? {turn}",
    "guesses an answer": constant("Your order has shipped and arrives Friday."),
    "asks, then guesses": in_turn("Your order number?", "It has shipped and arrives Friday.", "Refunded!"),
    "calls one order for ever": constant("CALL lookup order=12345"),
    "calls random orders": lambda log, turn, rng: f"CALL lookup order={rng.randrange(10_000, 99_999)}",
    "refunds random orders": lambda log, turn, rng: f"CALL refund order={rng.randrange(10_000, 99_999)}",
    "calls without arguments": lambda log, turn, rng: f"CALL {('lookup', 'refund', 'cancel')[turn % 3]}",
    "calls whatever number it sees": lambda log, turn, rng: f"CALL cancel order={number_in(log)}",
    "many calls a reply": lambda log, turn, rng: "\n".join(f"CALL lookup order={n}" for n in range(20)),
    "copies the usage": lambda log, turn, rng: re.findall("CALL.*", log[0].content)[turn % 4],
    "asks, then sweeps the tools": sweep_tools,
    "babble": babble,
}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_bug_32_no_adversary_earns_anything_on_any_task(name: str, difficulty: int) -> None:
    env = CustomerService(difficulty)
    for split in SPLITS:
        for index in range(24):
            total, steps = play(env, env.task(split, index), ADVERSARIES[name])
            assert total <= 0.0, [dict(step.info) for step in steps]
            assert not steps[-1].info["solved"]
            assert steps[-1].terminated or steps[-1].truncated


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_stuffing_the_last_answer_loses_what_the_work_before_it_earned(difficulty: int) -> None:
    env = CustomerService(difficulty)
    for index in range(40):

        def reply(log: list[Message], turn: int, rng: random.Random) -> str:
            said = env.expert()
            return said if said.startswith("CALL") or said.endswith("?") else STUFFING

        assert play(env, env.task("train", index), reply)[0] <= 0.0


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_wasting_turns_never_pays(difficulty: int) -> None:
    env = CustomerService(difficulty)
    for index in range(20):
        totals = []
        for waste in ("", "Thank you.", "CALL lookup", "It is on the way.", "CALL lookup order=00000"):

            def reply(log: list[Message], turn: int, rng: random.Random, waste: str = waste) -> str:
                return waste if turn == 1 else env.expert()

            totals.append(play(env, env.task("heldout", index), reply)[0])
        assert all(0.5 < total < 1.0 for total in totals), totals


def script(
    difficulty: int, intent: str, wanted: Callable[[CustomerService], bool], *replies: str
) -> list[Step]:
    """Play replies with {number}, {day} and so on filled in, on the first task with such a case."""
    env = CustomerService(difficulty, [intent])
    for index in range(400):
        task = env.task("train", index)
        asyncio.run(env.reset(task, 0))
        if wanted(env):
            break
    else:
        raise AssertionError("no task has such a case")
    order = env._case.order
    facts = {"number": order.number, "day": order.day, "price": order.price, "address": env._case.address,
             "status": order.status}  # fmt: skip
    return play(env, task, lambda log, turn, rng: replies[turn].format(**facts), limit=len(replies))[1]


def status(value: str) -> Callable[[CustomerService], bool]:
    return lambda env: env._case.order.status == value and not env._case.order.final_sale


ASK, LOOK = "What is your order number?", "CALL lookup order={number}"


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("It has shipped and arrives {day}.", 0.5),
        ("It is on its way. It will be delivered on {day}!", 0.5),
        ("It has been shipped and isn't delivered yet; {day}.", 0.5),
        ("order {number}: shipped, arrives {day}", 0.5),
        ("It arrives {day}.", 0.25),
        ("It has shipped.", 0.25),
        ("It was delivered on {day}.", 0.25 - 0.375),
        ("It has shipped, I refunded it; {day}.", 0.5 - 0.375),
        ("It has not shipped, and " + " ".join(DAYS) + ".", -0.75),
    ],
)
def test_the_last_answer_is_judged_by_what_it_states(answer: str, reward: float) -> None:
    steps = script(1, "order_status", status("shipped"), ASK, LOOK, answer)
    assert [step.reward for step in steps] == [0.25, 0.25, reward]
    assert steps[-1].terminated
    assert steps[-1].info["solved"] is (reward == 0.5)


@pytest.mark.parametrize(
    ("intent", "answer", "reward"),
    [
        ("refund", "Sorry, I can't refund it, it hasn't been delivered, only shipped.", 0.5),
        ("refund", "I have refunded ${price} to you.", -0.375),
        ("cancel", "I\N{RIGHT SINGLE QUOTATION MARK}m unable to: it is in transit.", 0.5),
        ("cancel", "It is cancelled.", -0.375),
        ("change_address", "It is too late, it was shipped.", 0.5),
        ("change_address", "That is not possible.", 0.25),
    ],
)
@pytest.mark.parametrize("difficulty", [1, 2])
def test_a_refusal_tells_that_and_why(difficulty: int, intent: str, answer: str, reward: float) -> None:
    steps = script(difficulty, intent, status("shipped"), ASK, LOOK, answer)
    assert [step.reward for step in steps] == [0.25, 0.25, reward]


@pytest.mark.parametrize("question", [
    "What is your order number?", "Could you please share the order ID?", "Which order is it?",
    "I need your order no. to help you", "Sure! Please provide the number of your order.", "order #?",
    "To look it up, I need the digits of your order.",
])  # fmt: skip
def test_the_customer_understands_many_questions_for_the_number(question: str) -> None:
    assert [step.reward for step in script(1, "cancel", lambda env: True, question)] == [0.25]


@pytest.mark.parametrize(
    ("replies", "events", "reward"),
    [
        ((ASK, ""), ("asked", "empty"), -0.25),
        ((ASK, ASK.upper()), ("asked", "repeated"), -0.25),
        ((ASK, "Tell me your order number."), ("asked", "asked again"), -0.125),
        ((ASK, "Have a nice evening."), ("asked", "irrelevant"), -0.125),
        ((ASK, "It has shipped."), ("asked", "unfounded"), -0.25),
        ((ASK, "CALL lookup"), ("asked", "malformed"), -0.125),
        ((ASK, "CALL lookup order={number}\nCALL cancel order={number}"), ("asked", "malformed"), -0.125),
        ((ASK, "CALL lookup order=00000"), ("asked", "wrong order"), -0.25),
        ((ASK, LOOK), ("asked", "looked up"), 0.0),
        ((ASK, LOOK, 'CALL lookup order="{number}"'), ("asked", "looked up", "repeated"), -0.25),
        ((ASK, LOOK, "CALL lookup order={number}."), ("asked", "looked up", "repeated"), -0.25),
        ((ASK, LOOK, "It is processing."), ("asked", "looked up", "premature"), -0.125),
        ((ASK, LOOK, "It is refunded."), ("asked", "looked up", "unfounded"), -0.25),
        ((ASK, "CALL refund order={number}"), ("asked", "wrong call"), -0.25),
        ((ASK, 'CALL change_address order={number} address="7 Oak St"'), ("asked", "wrong change"), -0.75),
        ((ASK, "CALL cancel order={number}"), ("asked", "called"), 0.25),
        ((ASK, "CALL cancel order=#{number}."), ("asked", "called"), 0.25),
        ((ASK, "Let me see.\nCALL cancel order={number}"), ("asked", "called"), 0.25),
    ],
)
def test_each_kind_of_reply_has_its_price(
    replies: tuple[str, ...], events: tuple[str, ...], reward: float
) -> None:
    steps = script(1, "cancel", status("processing"), *replies)
    assert tuple(step.info["event"] for step in steps) == events
    assert steps[-1].reward == reward
    assert steps[-1].terminated is (events[-1] == "wrong change")


def test_a_question_wrapped_in_claims_is_answered_but_not_paid() -> None:
    steps = script(1, "cancel", lambda env: True, f"It has shipped. {ASK}", "Your order number, please.")
    assert [step.reward for step in steps] == [0.0, -0.125]
    assert any(character.isdigit() for character in steps[0].messages[0].content)


def test_no_conversation_totals_less_than_minus_one() -> None:
    change = 'CALL change_address order={number} address="7 Oak St"'
    steps = script(1, "cancel", status("processing"), "", "!", change)
    assert [step.reward for step in steps] == [-0.25, -0.25, -0.5]
    assert steps[-1].info["penalty"] == -1.0


def test_a_malformed_call_is_corrected_and_can_be_made_good() -> None:
    steps = script(
        1, "cancel", status("processing"), ASK, "CALL cancel {number}", "CALL cancel order={number}"
    )
    assert steps[1].messages[0].role == "tool" and "CALL tool name=value" in steps[1].messages[0].content
    assert steps[2].info["called"] == 0.25


def test_at_difficulty_2_acting_against_the_rules_or_without_a_look_costs() -> None:
    act = "CALL cancel order={number}"
    forbidden = script(2, "cancel", status("shipped"), ASK, LOOK, act)
    assert [step.reward for step in forbidden] == [0.25, 0.25, -0.75] and forbidden[-1].terminated
    hasty = script(2, "cancel", status("processing"), ASK, act, "Cancelled, you get ${price} back.")
    assert [step.reward for step in hasty] == [0.25, 0.125, 0.5]
    careful = script(2, "cancel", status("processing"), ASK, LOOK, act, "Cancelled, you get ${price} back.")
    assert [step.reward for step in careful] == [0.25, 0.125, 0.125, 0.5]


def test_an_address_must_be_right_but_may_be_spelled_otherwise() -> None:
    change = "CALL change_address order={number} address="
    wanted = lambda env: env._case.action and env._case.address.endswith("Oak St")  # noqa: E731
    for said, reward in (('"{address}"', 0.25), ('"{address}reet, please"', 0.25), ('"1000 Elm St"', -0.75)):
        assert script(1, "change_address", wanted, ASK, change + said)[-1].reward == reward


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_intent_outcome_and_twist_occurs(difficulty: int) -> None:
    env = CustomerService(difficulty)
    seen: set[tuple[str, bool]] = set()
    stages: set[int] = set()
    changed_mind = False
    for index in range(80):
        task = env.task("train", index)
        asyncio.run(env.reset(task, 0))
        seen.add((env._case.intent, bool(env._case.against)))
        stages.add(len(env._case.facts[0].answers))
        changed_mind |= env._case.intent != task.data["intent"]
    assert seen == {(intent, refused) for intent in INTENTS for refused in (False, True)} - {
        ("order_status", True)
    }
    assert stages == ({1, 2} if difficulty == 3 else {1})
    assert changed_mind is (difficulty == 3)


def test_the_customer_words_things_differently_by_seed_only() -> None:
    env = CustomerService()
    task = env.task("train", 0)

    def told(seed: int) -> str:
        async def run() -> str:
            await env.reset(task, seed)
            return (await env.step(Message("assistant", ASK))).messages[0].content

        return asyncio.run(run())

    assert len({told(seed) for seed in range(12)}) > 1
    assert told(3) == told(3)


def test_messages_are_short() -> None:
    env = CustomerService()
    for index in range(60):
        opening = asyncio.run(env.reset(env.task("train", index), 0)).messages
        assert len(opening[0].content) <= 210 and len(opening[1].content) <= 60
        _, steps = play(env, env.task("train", index), lambda log, turn, rng: env.expert())
        assert all(len(m.content) <= 70 for step in steps for m in step.messages)
