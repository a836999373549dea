"""A small shop: its orders, the rules for changing them, and the tools that do it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Literal

from stateset_ray.environments.tools import Tool, Toolbox, describe
from stateset_ray.types import ToolCall

__all__ = [
    "ACTIONS",
    "DAYS",
    "TOOLS",
    "Order",
    "Shop",
    "ShopTools",
    "Status",
    "draw_address",
    "draw_order",
    "find_addresses",
    "objection",
    "plain",
]

ACTIONS = ("refund", "cancel", "change_address")
"""The tools that change an order; a customer's wish for one of them has the same name."""

TOOLS = (
    Tool("lookup", parameters={"order": "N"}),
    Tool("refund", parameters={"order": "N"}),
    Tool("cancel", parameters={"order": "N"}),
    Tool("change_address", parameters={"order": "N", "address": '"A"'}),
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_ITEMS = ("lamp", "kettle", "chair", "jacket", "camera", "table", "clock", "radio", "guitar", "mirror")
_STREETS = ("Oak St", "Elm St", "Park Rd", "Hill Rd", "Lake Ave", "Mill Ln", "High St", "King Rd")
_ADDRESS = re.compile(
    rf"\b([1-9][0-9]?) ({'|'.join(street.split()[0] for street in _STREETS)})\b", re.IGNORECASE
)
_WHEN = {"processing": "ships", "shipped": "arrives", "delivered": "came"}

Status = Literal["processing", "shipped", "delivered"]


@dataclass(frozen=True, slots=True)
class Order:
    """One order.

    Attributes:
        number: five digits.
        day: the weekday on which it ships, arrives or came, by `status`.
        price: in whole dollars; what a refund or a cancellation pays back.
        final_sale: never refunded.
        undone: "refunded" or "cancelled" once it is.
    """

    number: str
    item: str
    status: Status
    day: str
    price: int
    address: str
    final_sale: bool = False
    undone: str = ""

    def __str__(self) -> str:
        sale = ", final sale" if self.final_sale else ""
        return f"order {self.number}: {self.item}, {self.status}, {_WHEN[self.status]} {self.day}{sale}"


def objection(action: str, order: Order) -> str:
    """Why the rules forbid an action: the status that is in the way, "final sale", or "" if they do not.

    Refunds are for delivered orders that were no final sale; the rest is for orders not yet shipped.
    """
    if action == "refund":
        if order.status != "delivered":
            return order.status
        return "final sale" if order.final_sale else ""
    return "" if order.status == "processing" else order.status


class Shop:
    """The order database behind the tools.

    Args:
        orders: what it holds at first.
        strict: refuse what the rules forbid; a shop that is not strict does what it is told.

    Example:
        >>> shop = Shop([Order("48213", "lamp", "shipped", "Friday", 24, "1 Oak St")], strict=True)
        >>> shop.call(ToolCall("cancel", {"order": "48213"}))
        ('refused: order 48213 is shipped', False)
    """

    def __init__(self, orders: list[Order], *, strict: bool) -> None:
        self.orders = {order.number: order for order in orders}
        self._strict = strict

    def call(self, call: ToolCall) -> tuple[str, bool]:
        """Carry out a checked call: the result as text, and whether it changed an order."""
        order = self.orders.get(call.arguments["order"])
        if order is None:
            return "error: no such order", False
        if call.name == "lookup":
            return str(order), False
        against = order.undone or (objection(call.name, order) if self._strict else "")
        if against:
            return f"refused: order {order.number} is {against}", False
        if call.name == "change_address":
            changed = replace(order, address=call.arguments["address"])
            text = f"goes to {changed.address}"
        elif call.name == "cancel":
            changed, text = replace(order, undone="cancelled"), f"cancelled, ${order.price} back"
        else:
            changed, text = replace(order, undone="refunded"), f"refunded, ${order.price} back"
        self.orders[order.number] = changed
        return f"order {order.number} {text}", True


class ShopTools(Toolbox):
    """The tools of a shop for one who serves its customers.

    Args:
        shop: what they look up and change.
        task: what the policy is told to do, without the tools, which are added to it.
    """

    def __init__(self, shop: Shop, task: str) -> None:
        self.shop = shop
        self.system = f"{task}\n{describe(TOOLS)}"
        self.tools = TOOLS

    def read(self, text: str) -> ToolCall | None:
        """See `Toolbox.read`; what stands around an order's number is left out."""
        call = super().read(plain(text))
        if call is None:
            return None
        return ToolCall(
            call.name, {**call.arguments, "order": re.sub(r"^\W+|\W+$", "", call.arguments["order"])}
        )

    def call(self, call: ToolCall, caller: str) -> str:
        """See `Toolbox.call`; everyone may see and change every order of a shop that is made up."""
        return self.shop.call(call)[0]


def plain(text: str) -> str:
    """A reply as the shop reads it: with straight apostrophes."""
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").strip()


def draw_order(rng: random.Random, *, action: str = "", allowed: bool = True) -> Order:
    """A random order on which the rules allow or forbid `action`; "" is for any order."""
    while True:
        order = Order(
            number=str(rng.randrange(10_000, 100_000)),
            item=rng.choice(_ITEMS),
            status=rng.choice(("processing", "shipped", "delivered")),
            day=rng.choice(DAYS),
            price=rng.randrange(12, 100),
            address=draw_address(rng),
            final_sale=rng.random() < 0.25,
        )
        if not action or (objection(action, order) == "") == allowed:
            return order


def draw_address(rng: random.Random) -> str:
    """A random street address, like "12 Oak St"."""
    return f"{rng.randrange(2, 100)} {rng.choice(_STREETS)}"


def find_addresses(text: str) -> frozenset[str]:
    """The addresses in a text, in one spelling: house number and first word of the street.

    Example:
        >>> find_addresses("It goes to 12 OAK Street now.")
        frozenset({'12 oak'})
    """
    return frozenset(f"{number} {street.lower()}" for number, street in _ADDRESS.findall(text))
