"""Customer service in a shop: ask for what is missing, use the tools, tell the customer the truth.

What a reply earns is computed from the order database and from what was said, never from how it sounds:

| a reply that                                                 | earns                               |
|--------------------------------------------------------------|-------------------------------------|
| asks for what the customer has not told yet                  | 0.25, shared among all such replies |
| makes the tool call that the case needs                      | 0.25, shared among all such calls   |
| tells both facts of the outcome, and so ends it              | 0.5, or 0.25 for one of them        |
| states something false in that last answer                   | -0.375 a topic, at most -0.75       |
| claims what the tools have not shown                         | -0.25                               |
| says nothing, or the same again                              | -0.25                               |
| names a wrong order, or attempts what nobody wished          | -0.25                               |
| does not help: off topic, asked before, needless, malformed  | -0.125                              |
| changes an order as it must not be changed, and so ends it   | -0.75                               |

Every positive amount is paid once, and almost every other reply costs patience, which ends the
conversation when it runs out; so nothing is gained by stretching it. A perfect conversation totals 1.0,
none totals less than -1.0, and as all amounts are sums of powers of two, totals are exact.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stateset_ray.environments.base import Environment
from stateset_ray.environments.cases import COMPLAINTS, INTENTS, Case, draw_case, word_answer, word_question
from stateset_ray.environments.dialogue import Memory, SimulatedUser, stated
from stateset_ray.environments.shop import ACTIONS, DAYS, Shop, ShopTools, draw_order, find_addresses, plain
from stateset_ray.environments.tools import ToolSyntaxError, format_call
from stateset_ray.errors import ConfigError
from stateset_ray.types import Message, Split, Step, Task, ToolCall, derive_seed

__all__ = ["CustomerService"]

_ASK, _CALL, _TELL = 0.25, 0.25, 0.25
_PENALTIES = {
    "empty": 0.25,
    "repeated": 0.25,
    "irrelevant": 0.125,
    "asked again": 0.125,
    "premature": 0.125,
    "malformed": 0.125,
    "needless call": 0.125,
    "unfounded": 0.25,
    "wrong order": 0.25,
    "wrong call": 0.25,
    "wrong change": 0.75,
}
_FALSE, _FALSE_TOPICS = 0.375, 2
_PATIENCE = {1: 3, 2: 3, 3: 2}

_TASK_TEXT = (
    "You help the customers of a shop. Ask for the order number, call one tool, then tell the result."
)
_RULES_TEXT = (
    "You help the customers of a shop. Ask for what is missing. Always look up the order first. Refund only "
    "what was delivered and no final sale. Cancel or change only what has not shipped. Then tell the result."
)

_WORDINGS: Mapping[str, Mapping[str, str]] = {
    "status": {
        "processing": r"\bprocessing\b(?! (?:the|your|a)\b)|\bbeing (?:processed|prepared|packed)\b"
        r"|\bnot (?:yet )?(?:been )?shipped\b|n't (?:been )?shipped\b",
        "shipped": r"(?<!\bbe )\bshipped\b|\bon (?:its|the) way\b|\bin transit\b",
        "delivered": r"(?<!\bbe )\bdelivered\b|\barrived\b|\bcame\b",
    },
    "sale": {"final sale": r"\bfinal sale\b|\bnon-?refundable\b|\bnot refundable\b"},
    "day": {day: rf"\b{day}\b" for day in DAYS},
    "outcome": {
        "refund": r"\brefunded\b|\brefund (?:of \$\d+ )?(?:is|was|has|will be)\b(?! not)|\$\d+ back\b"
        r"|\bwill refund\b|\bhave refund",
        "cancel": r"\bcancell?ed\b",
        "change_address": r"\b(?:changed|updated)\b|\bgoes? to\b|\bwill (?:now )?(?:go|be sent) to\b",
        "refused": r"\bcannot\b|\bcan't\b|\bcan not\b|\bunable\b|\bnot possible\b|\bimpossible\b|\brefused\b"
        r"|\bnot eligible\b|\btoo late\b|\bcould not\b|\bcouldn't\b",
    },
}
"""By topic and value, how a reply may state it."""
_AMOUNT = re.compile(r"\$ ?(\d+)")


class CustomerService(Environment):
    """A customer with a problem, a shop with tools, and rules between them.

    At difficulty 1 the customer withholds only its order number, and the tools refuse what the rules
    forbid: ask, call, tell. At 2 the rules are the agent's to keep: it must look up the order before it
    changes anything, and an order changed against the rules is changed. At 3 the customer also rambles,
    forgets, tells things in halves or changes its mind, and has less patience.

    Args:
        difficulty: 1 to 3.
        intents: which wishes occur; all of "order_status", "refund", "cancel" and "change_address" if None.

    Raises:
        ConfigError: an option is not one of these.
    """

    def __init__(self, difficulty: int = 1, intents: Sequence[str] | None = None) -> None:
        if difficulty not in _PATIENCE or isinstance(difficulty, bool):
            raise ConfigError(
                "there is no such difficulty of CustomerService",
                given=difficulty,
                mend="set environment.options.difficulty to 1, 2 or 3",
            )
        wishes = INTENTS if intents is None else intents
        if isinstance(wishes, str) or not wishes or not set(wishes) <= set(INTENTS):
            raise ConfigError(
                "CustomerService does not know these intents",
                given=intents,
                mend=f"set environment.options.intents to a list of {', '.join(INTENTS)}, or leave it out",
            )
        self._difficulty = difficulty
        self._intents = tuple(dict.fromkeys(wishes))

    def task(self, split: Split, index: int) -> Task:
        """The base's task with its opening wish as data; the wishes take turns."""
        base = super().task(split, index)
        intent = self._intents[index % len(self._intents)]
        return Task(base.id, base.seed, split, {"intent": intent})

    async def reset(self, task: Task, seed: int) -> Step:
        """Open the shop and let the customer speak; `seed` chooses its words from then on."""
        self._case, self._tools = self._world(task)
        self._seed = derive_seed("customer", task.seed, seed)
        self._user = SimulatedUser(
            self._case.facts,
            patience=_PATIENCE[self._difficulty],
            rng=random.Random(self._seed),
            complaints=COMPLAINTS,
        )
        self._memory = Memory()
        self._needed = _needed_calls(self._case, self._difficulty)
        self._looked_up = False
        self._parts = {"asked": 0.0, "called": 0.0, "told": 0.0, "penalty": 0.0}
        self._solved = False
        self._turns = 0
        opening = (Message("system", self._tools.system), Message("user", self._case.opening))
        return Step(opening, info=self._info("opened"))

    async def step(self, message: Message) -> Step:
        """Judge one reply; malformed calls are answered with a correction, not with the end."""
        self._turns += 1
        text = plain(message.content)
        fault = self._memory.fault(text)
        if fault:
            return self._fail(fault)
        try:
            call = self._tools.read(text)
        except ToolSyntaxError as error:
            return self._fail("malformed", Message("tool", error.correction))
        return self._hear(text) if call is None else self._carry_out(call)

    def toolbox(self, task: Task) -> ShopTools:
        """The tools over the orders of a task, which no conversation of training sees change."""
        return self._world(task)[1]

    def expert(self) -> str:
        """Ask for what is missing, make the next needed call, or tell the outcome."""
        rng = random.Random(derive_seed(self._seed, "expert", self._turns))
        if self._user.untold:
            return word_question(rng, self._user.untold, again=self._user.times_asked("order") > 0)
        if not self._needed:
            return word_answer(rng, self._case)
        (name, *_), _ = self._needed[0]
        address = {"address": self._case.address} if name == "change_address" else {}
        return format_call(ToolCall(name, {"order": self._case.order.number, **address}))

    def _world(self, task: Task) -> tuple[Case, ShopTools]:
        world = random.Random(task.seed)
        intent = task.data.get("intent") or world.choice(self._intents)
        if intent not in INTENTS:
            raise ConfigError("the task has no known intent", given=intent, mend=f"use {', '.join(INTENTS)}")
        case = draw_case(world, intent, self._difficulty, self._intents)
        orders = [*(draw_order(world) for _ in range(3)), case.other, case.order]
        shop = Shop(orders, strict=self._difficulty == 1)
        return case, ShopTools(shop, _TASK_TEXT if self._difficulty == 1 else _RULES_TEXT)

    def _hear(self, text: str) -> Step:
        claims = _claims(text)
        known = self._looked_up or not self._needed
        unfounded = bool(claims) and (not known or bool(self._false_topics(claims)))
        answer = self._user.answer(text)
        if answer.advanced:
            earned = 0.0 if unfounded else sum(map(self._ask_share, answer.advanced))
            return self._pay("asked", {"asked": earned}, Message("user", answer.text))
        if claims and not self._needed:
            return self._conclude(text, claims)
        if claims:
            return self._fail("unfounded" if unfounded else "premature")
        if answer.again:
            return self._fail("asked again", Message("user", answer.text))
        return self._fail("irrelevant")

    def _carry_out(self, call: ToolCall) -> Step:
        """One well-formed call: what the tool does, and what that is worth."""
        case, tool = self._case, call.name
        result, changed = self._tools.shop.call(call)
        reply = Message("tool", result)
        right = call.arguments["order"] == case.order.number
        stage = next((i for i, (names, _) in enumerate(self._needed) if tool in names), None)
        wished = tool == case.action and stage is not None
        if wished and tool == "change_address":
            wished = find_addresses(call.arguments["address"]) == find_addresses(case.address)
        if changed and not (right and wished):
            step = self._pay("wrong change", {"penalty": -_PENALTIES["wrong change"]})
            return replace(step, terminated=True)
        if not right:
            return self._fail("wrong order", reply)
        first_look = tool == "lookup" and not self._looked_up
        self._looked_up |= tool == "lookup"
        if stage is not None:
            earned = self._needed[stage][1]
            self._needed = self._needed[stage + 1 :]
            return self._pay("called", {"called": earned}, reply)
        if first_look:
            return self._pay("looked up", {}, reply)
        return self._fail("needless call" if tool in ("lookup", case.intent) else "wrong call", reply)

    def _conclude(self, text: str, claims: Mapping[str, frozenset[str]]) -> Step:
        """The customer takes a reply for the answer: pay for what is true in it, charge for what is not."""
        claims = {**claims, "address": find_addresses(text)}
        false = self._false_topics(claims)
        told = [
            topic
            for topic, value in self._required().items()
            if topic not in false and value in claims.get(topic, ())
        ]
        self._solved = not false and len(told) == len(self._required())
        lies = min(len(false), _FALSE_TOPICS) * _FALSE
        step = self._pay("concluded", {"told": _TELL * len(told), "penalty": -lies})
        return replace(step, terminated=True)

    def _false_topics(self, claims: Mapping[str, frozenset[str]]) -> list[str]:
        truth = self._truth()
        return [topic for topic, values in claims.items() if not values <= truth[topic]]

    def _truth(self) -> Mapping[str, frozenset[str]]:
        """By topic, everything that may be said now."""
        case, order = self._case, self._case.order
        outcome: set[str] = set()
        if not self._needed and case.intent in ACTIONS:
            outcome = {"refused"} if case.against else {case.intent}
            if case.action == "cancel":
                outcome.add("refund")  # A cancelled order is paid back.
        return {
            "status": frozenset({order.status}),
            "sale": frozenset({"final sale"} if order.final_sale else ()),
            "day": frozenset({order.day}),
            "amount": frozenset({str(order.price)}),
            "address": find_addresses(case.address),
            "outcome": frozenset(outcome),
        }

    def _required(self) -> Mapping[str, str]:
        """The two facts that the customer must hear, by topic."""
        case, order = self._case, self._case.order
        if case.against:
            return {"outcome": "refused", "sale" if case.against == "final sale" else "status": case.against}
        if case.action == "change_address":
            return {"outcome": case.action, "address": next(iter(find_addresses(case.address)))}
        if case.action:
            return {"outcome": case.action, "amount": str(order.price)}
        return {"status": order.status, "day": order.day}

    def _ask_share(self, name: str) -> float:
        stages = next(len(fact.answers) for fact in self._case.facts if fact.name == name)
        return _ASK / len(self._case.facts) / stages

    def _fail(self, kind: str, reply: Message | None = None) -> Step:
        """A reply that did not help: charge for it, and answer it while there is patience."""
        complaint = Message("user", self._user.complain(kind))
        step = self._pay(kind, {"penalty": -_PENALTIES[kind]})
        if self._user.left:
            return replace(step, truncated=True)
        return replace(step, messages=(reply or complaint,))

    def _pay(self, event: str, amounts: Mapping[str, float], *messages: Message) -> Step:
        """A step that earns the amounts; what would take the total below -1 is forgiven."""
        before = sum(self._parts.values())
        for part, amount in amounts.items():
            self._parts[part] += amount
        self._parts["penalty"] -= min(0.0, sum(self._parts.values()) + 1.0)
        return Step(messages, reward=sum(self._parts.values()) - before, info=self._info(event))

    def _info(self, event: str) -> dict[str, Any]:
        return {
            "intent": self._case.intent,
            "difficulty": self._difficulty,
            "event": event,
            "solved": self._solved,
            **self._parts,
        }


def _needed_calls(case: Case, difficulty: int) -> tuple[tuple[tuple[str, ...], float], ...]:
    """The calls that establish the outcome, in order: any of these tools, worth that much."""
    if case.intent not in ACTIONS:
        return ((("lookup",), _CALL),)
    if difficulty == 1:
        return (((case.intent,) if case.action else (case.intent, "lookup"), _CALL),)
    if not case.action:
        return ((("lookup",), _CALL),)
    return ((("lookup",), _CALL / 2), ((case.action,), _CALL / 2))


def _claims(text: str) -> dict[str, frozenset[str]]:
    """By topic, what a reply states about an order; topics of which it says nothing are left out."""
    found = {topic: stated(text, wordings) for topic, wordings in _WORDINGS.items()}
    found["amount"] = frozenset(_AMOUNT.findall(text))
    return {topic: values for topic, values in found.items() if values}
