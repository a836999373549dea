"""Cases of customer service: who calls about which order, what is true, and how both sides word it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from stateset_ray.environments.dialogue import Fact, pick
from stateset_ray.environments.shop import ACTIONS, Order, draw_address, draw_order, objection

__all__ = ["COMPLAINTS", "INTENTS", "Case", "draw_case", "word_answer", "word_question"]

INTENTS = ("order_status", *ACTIONS)

COMPLAINTS = {
    "": ("I do not understand.", "That does not help me.", "Sorry, what do you mean?"),
    "empty": ("Hello?", "Are you there?"),
    "repeated": ("You said that already.", "You keep saying that."),
    "unfounded": ("Did you even check?", "You have not looked, have you?"),
}

_NUMBER_TOPIC = r"\border (?:number|no\b|id\b|code)|\bnumber\b|#|\b(?:which|what) order\b|\bdigits\b"
_ADDRESS_TOPIC = r"\baddress\b|\bstreet\b|\bwhere\b.*\b(?:to|live|go|send|ship|deliver)\b"

_OPENINGS = {
    "order_status": (
        "Where is my {item}?",
        "When will my {item} come?",
        "I am still waiting for my {item}. Where is it?",
        "Can you check on my {item}?",
    ),
    "refund": (
        "I want a refund for my {item}.",
        "Please refund my {item}.",
        "I would like my money back for the {item}.",
        "The {item} is not what I wanted. I need a refund.",
    ),
    "cancel": (
        "Please cancel my order.",
        "I do not want the {item} any more. Cancel it.",
        "I need to cancel the {item} I bought.",
        "Can you cancel my {item}?",
    ),
    "change_address": (
        "Please send my {item} to {address}.",
        "I moved. Can you send my {item} to {address}?",
        "Change my address to {address}.",
        "My {item} has to go to {address}.",
    ),
}
_OPENINGS_WITHOUT_ADDRESS = (
    "I moved. Please send my {item} there.",
    "I have a new home. Send the {item} there.",
)
_CHATTER = (
    "{opening} It is not {other}, that one came.",
    "I called on {day} already. {opening}",
    "{opening} I bought it on {day} for my sister.",
    "My other order, {other}, was fine. {opening}",
)
_CHANGES_OF_MIND = {
    "order_status": "Leave that. Just tell me when it comes.",
    "refund": "Wait, I want a refund instead.",
    "cancel": "Actually, just cancel it.",
    "change_address": "Actually, just send it to {address}.",
}

_TELLS_NUMBER = ("{number}.", "It is {number}.", "My number is {number}.", "Sure, {number}.")
_FORGETS = ("One moment, I have to look for it.", "I do not have it here. Wait.", "Hm, where did I put it?")
_STARTS = ("It starts with {head}.", "I can read {head}, then a stain.", "The first three are {head}.")
_ENDS = ("The rest is {tail}.", "It ends with {tail}.", "Then {tail}.")
_TELLS_ADDRESS = ("{address}.", "It is {address}.", "I live at {address} now.")

_ASKS = {
    ("order",): (
        "What is your order number?",
        "Could you tell me your order number?",
        "May I have your order number?",
    ),
    ("order", "address"): (
        "What is your order number, and what is the new address?",
        "Could you tell me your order number and your new address?",
    ),
    ("address",): ("What is the new address?", "Which address should it go to?"),
}
_ASKS_AGAIN = (
    "Could you tell me the rest of the number?",
    "What is the full number?",
    "May I have the whole number?",
)

_STATUS_RESULTS = {
    "processing": ("Your {item} is still processing and ships {day}.", "It is processing and ships {day}."),
    "shipped": ("Your {item} has shipped and arrives {day}.", "It has shipped. It arrives on {day}."),
    "delivered": ("Your {item} was delivered on {day}.", "It was delivered on {day}."),
}
_DONE_RESULTS = {
    "refund": ("I have refunded your {item}. You get ${price} back.", "Done, ${price} is refunded."),
    "cancel": ("Your {item} is cancelled. You get ${price} back.", "It is cancelled. ${price} comes back."),
    "change_address": ("Done, your {item} now goes to {address}.", "I changed it. It goes to {address}."),
}
_REFUSALS = {
    "refund": "Sorry, I cannot refund your {item}: {why}.",
    "cancel": "Sorry, I cannot cancel your {item}: {why}.",
    "change_address": "Sorry, I cannot change the address: {why}.",
}
_REASONS = {
    "processing": ("it is still processing",),
    "shipped": ("it has shipped", "it is already shipped"),
    "delivered": ("it was delivered", "it is already delivered"),
    "final sale": ("it was a final sale", "it is a final sale"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One customer and what is true about its wish.

    Attributes:
        intent: what the customer wants in the end, one of `INTENTS`.
        order: the order in question, as it is when the conversation begins.
        other: an order of somebody else, or one that the customer mentions for no reason.
        address: where it wants the order to go, if that is its wish.
        against: why the rules forbid the wish; empty if they allow it.
        opening: what the customer says first.
        facts: what it tells when asked: "order", perhaps "address".
    """

    intent: str
    order: Order
    other: Order
    address: str
    against: str
    opening: str
    facts: tuple[Fact, ...]

    @property
    def action(self) -> str:
        """The tool that has to change the order; empty if nothing is to be changed."""
        return self.intent if self.intent in ACTIONS and not self.against else ""


def draw_case(rng: random.Random, intent: str, difficulty: int, intents: Sequence[str] = INTENTS) -> Case:
    """A random case; at difficulty 3 with a twist: the customer forgets, halves its number, changes its mind.

    Args:
        rng: all its randomness.
        intent: the wish with which the customer opens.
        difficulty: 1 to 3.
        intents: what it may change its mind to.
    """
    hard = difficulty >= 3
    wish, twist = intent, rng.choice(("forgets", "halves", "changes its mind")) if hard else ""
    if twist == "changes its mind":
        wish = rng.choice([other for other in intents if other != intent] or [intent])
    order = draw_order(rng, action=wish if wish in ACTIONS else "", allowed=rng.random() < 0.5)
    other = draw_order(rng)
    while other.number == order.number:
        other = draw_order(rng)
    address = draw_address(rng)
    while address.split()[:2] == order.address.split()[:2]:
        address = draw_address(rng)
    # A wish for a new address names it, unless the agent is to ask: the first at 1 and 2, the second at 3.
    asks_address = hard and wish == intent == "change_address"
    phrasings = _OPENINGS_WITHOUT_ADDRESS if hard and intent == "change_address" else _OPENINGS[intent]
    opening = pick(rng, phrasings, item=order.item, address=address)
    if hard:
        opening = pick(rng, _CHATTER, opening=opening, other=other.number, day=other.day)
    facts = [_number_fact(order.number, twist if wish == intent else "", _mind(wish, intent, address))]
    if asks_address:
        facts.append(_fact("address", _ADDRESS_TOPIC, (_TELLS_ADDRESS,), address=address))
    return Case(
        intent=wish,
        order=order,
        other=other,
        address=address if wish == "change_address" else "",
        against=objection(wish, order) if wish in ACTIONS else "",
        opening=opening,
        facts=tuple(facts),
    )


def word_question(rng: random.Random, untold: tuple[str, ...], *, again: bool) -> str:
    """How an expert asks for what was not told yet; `again` if it asked for the order number before."""
    return rng.choice(_ASKS_AGAIN if again and untold == ("order",) else _ASKS[untold])


def word_answer(rng: random.Random, case: Case) -> str:
    """How an expert tells the customer the outcome."""
    order = case.order
    if case.against:
        why = rng.choice(_REASONS[case.against])
        return _REFUSALS[case.intent].format(item=order.item, why=why)
    results = _DONE_RESULTS[case.intent] if case.action else _STATUS_RESULTS[order.status]
    return pick(rng, results, item=order.item, day=order.day, price=order.price, address=case.address)


def _mind(wish: str, intent: str, address: str) -> str:
    return "" if wish == intent else " " + _CHANGES_OF_MIND[wish].format(address=address)


def _number_fact(number: str, twist: str, added: str) -> Fact:
    stages: tuple[tuple[str, ...], ...] = (_TELLS_NUMBER,)
    if twist == "forgets":
        stages = (_FORGETS, _TELLS_NUMBER)
    elif twist == "halves":
        stages = (_STARTS, _ENDS)
    stages = (*stages[:-1], tuple(phrasing + added for phrasing in stages[-1]))
    return _fact("order", _NUMBER_TOPIC, stages, number=number, head=number[:3], tail=number[3:])


def _fact(name: str, topic: str, stages: tuple[tuple[str, ...], ...], **values: str) -> Fact:
    answers = tuple(tuple(phrasing.format(**values) for phrasing in stage) for stage in stages)
    told = values.get("number", values.get("address", ""))
    return Fact(name, topic, answers, reminder=f"I told you: {told}.")
