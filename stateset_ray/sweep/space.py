"""The search space: which settings vary, how each is drawn, and when it matters at all.

Values are drawn from a `Source`, which is dice here and a searcher elsewhere, so that all of this knows
neither Ray nor Optuna. What is drawn is only ever handed out as a configuration that has passed the
configuration's own checks (`varied`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from stateset_ray.config import Config, corrected
from stateset_ray.errors import ConfigError
from stateset_ray.objective import PRESETS
from stateset_ray.settings import leaves, put, validated

__all__ = ["Dice", "Dimension", "Kind", "Source", "Space", "Values", "draw_valid", "problem", "varied"]

Kind = Literal["uniform", "loguniform", "randint", "choice", "grid"]
Values = dict[str, Any]
"""Dotted key -> what a trial sets it to."""

_TRIES = 200  # draws in a row that the configuration's checks may refuse
_PRESET = "grpo.preset"


class Source(Protocol):
    """Where values come from; each draw is asked for by the dimension's name."""

    def real(self, name: str, low: float, high: float, *, log: bool) -> float:
        """A number between two others; `log`: alike in every order of magnitude."""
        ...

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number, both ends included."""
        ...

    def option(self, name: str, options: Sequence[Any]) -> Any:
        """One of them."""
        ...


class Dice(random.Random):
    """A source of independent values, from a seed."""

    def real(self, name: str, low: float, high: float, *, log: bool) -> float:
        """See `Source.real`."""
        if not log:
            return self.uniform(low, high)
        # A ratio to the power of at most 1 may exceed `high` by a rounding.
        return float(min(high, low * (high / low) ** self.random()))

    def integer(self, name: str, low: int, high: int) -> int:
        """See `Source.integer`."""
        return self.randint(low, high)

    def option(self, name: str, options: Sequence[Any]) -> Any:
        """See `Source.option`."""
        return self.choice(options)


@dataclass(frozen=True)
class Dimension:
    """One setting that varies, or one way in which it does.

    Attributes:
        name: its key, or where the setting varies in several ways, one of its own.
        key: dotted, as in `--set`.
        kind: how it is drawn.
        values: the two ends of a range, both included, or the options.
        when: other key -> the values of it with which this setting varies; without them it stays as it is.
    """

    name: str
    key: str
    kind: Kind
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]]

    def draw(self, source: Source) -> Any:
        """A value."""
        match self.kind:
            case "uniform" | "loguniform":
                return source.real(self.name, *self.values, log=self.kind == "loguniform")
            case "randint":
                return source.integer(self.name, *self.values)
            case _:
                return source.option(self.name, self.values)

    def nudge(self, value: Any, dice: Dice, factors: Sequence[float]) -> Any:
        """A value near another one: times one of the factors, within the range, or an option beside it."""
        if self.kind in ("choice", "grid"):
            place = self.values.index(value) if value in self.values else 0
            beside = [i for i in (place - 1, place + 1) if 0 <= i < len(self.values)]
            return self.values[dice.choice(beside) if beside else place]
        factor = dice.choice(factors)
        moved = value * factor
        if self.kind == "randint":
            moved = round(moved)
            if moved == value:  # small numbers move, too
                moved += 1 if factor > 1 else -1
        return type(value)(min(max(moved, self.values[0]), self.values[1]))

    def describe(self) -> str:
        """How it is drawn, in words."""
        shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in self.values)
        text = f"{self.kind} [{shown}]"
        if self.when:
            conditions = (f"{key} is {' or '.join(map(str, vs))}" for key, vs in self.when.items())
            text += f" when {' and '.join(conditions)}"
        return text


class Space:
    """Dimensions over a configuration, those that others depend on first.

    Args:
        config: what the dimensions vary; not corrected for staleness (`config.corrected`).
        dimensions: in any order.

    Raises:
        ConfigError: conditions lead in a circle.
    """

    def __init__(self, config: Config, dimensions: Sequence[Dimension]) -> None:
        self.config = config
        self.dimensions = tuple(_ordered(dimensions))
        self._settings: dict[Any, dict[str, Any]] = {}

    def draw(self, source: Source, given: Mapping[str, Any] | None = None) -> Values:
        """Values for the dimensions that matter, valid or not.

        Args:
            given: values that are not to be drawn.
        """
        values: Values = {}
        for dimension in self.dimensions:
            if self._matters(dimension, values):
                known = given is not None and dimension.key in given
                values[dimension.key] = (
                    given[dimension.key] if known and given else dimension.draw(source)
                )  # fmt: skip
        return values

    def grid(self) -> list[Values]:
        """Every combination of what is to be tried in full; one empty one where nothing is."""
        grids = [d for d in self.dimensions if d.kind == "grid"]
        points = itertools.product(*(d.values for d in grids))
        return [dict(zip((d.key for d in grids), point, strict=True)) for point in points]

    def perturb(self, values: Values, dice: Dice, resample: float, factors: Sequence[float]) -> Values:
        """Values near others: each is drawn anew with a probability, and nudged otherwise.

        Returns:
            A valid variation; the same values where none is found.
        """
        for _ in range(_TRIES):
            moved: Values = {}
            for dimension in self.dimensions:
                if not self._matters(dimension, moved):
                    continue
                if dimension.key not in values or dice.random() < resample:
                    moved[dimension.key] = dimension.draw(dice)
                else:
                    moved[dimension.key] = dimension.nudge(values[dimension.key], dice, factors)
            if problem(self.config, moved) is None:
                return moved
        return dict(values)

    def _matters(self, dimension: Dimension, values: Values) -> bool:
        """Whether a setting varies; of several ways, the first whose conditions hold."""
        return dimension.key not in values and all(
            self._value(key, values) in allowed for key, allowed in dimension.when.items()
        )

    def _value(self, key: str, values: Values) -> Any:
        """What a setting is under values that were drawn: one of them, or what the configuration says."""
        if key in values:
            return values[key]
        preset = values.get(_PRESET)
        if preset not in self._settings:
            beside = {_PRESET: preset} if preset is not None else {}
            settled = varied(self.config, beside).model_dump(mode="json")
            self._settings[preset] = dict(leaves(settled))
        return self._settings[preset].get(key)


def varied(config: Config, values: Mapping[str, Any]) -> Config:
    """A configuration with some settings replaced, checked, and corrected for staleness like any other.

    What was set on purpose stays; what the configuration had by a preset goes where the preset is replaced.

    Raises:
        ConfigError: these values cannot be.

    Example:
        >>> varied(Config(), {"learner.learning_rate": 0.001}).learner.learning_rate
        0.001
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
    if _PRESET in values and "grpo" in tree:
        parts = PRESETS.get(config.grpo.preset, {})
        tree["grpo"] = {k: v for k, v in tree["grpo"].items() if k not in parts or v != parts[k]}
    for key, value in values.items():
        put(tree, key.split("."), value, given=key)
    return corrected(validated(Config, tree, "with the values of a trial"))


def problem(config: Config, values: Mapping[str, Any]) -> ConfigError | None:
    """Why these values cannot be; None if they can."""
    try:
        varied(config, values)
    except ConfigError as error:
        return error
    return None


def draw_valid(
    space: Space, source: Iterator[Source] | Source, given: Mapping[str, Any] | None = None
) -> tuple[Values, int]:
    """Draw until the configuration's checks are content.

    Args:
        source: one for all draws, or a new one for each.
        given: values that are not to be drawn.

    Returns:
        The values, and how many draws were refused before.

    Raises:
        ConfigError: a great many draws in a row were refused; the last reason is told.
    """
    error: ConfigError | None = None
    for refused in range(_TRIES):
        values = space.draw(next(source) if isinstance(source, Iterator) else source, given)
        error = problem(space.config, values)
        if error is None:
            return values, refused
        if all(d.key in (given or {}) for d in space.dimensions):
            break  # nothing would come out differently
    assert error is not None
    raise ConfigError(
        f"{refused + 1} draws from this search space gave no valid configuration; the last: {error.problem}",
        given=values,
        mend="narrow the ranges, or say with `when` which values belong together",
    )


def _ordered(dimensions: Sequence[Dimension]) -> Iterator[Dimension]:
    """Each after those that its conditions name, otherwise as given."""
    # A preset decides parts of the objective that conditions may name.
    waiting = sorted(dimensions, key=lambda dimension: dimension.key != _PRESET)
    while waiting:
        keys = {dimension.key for dimension in waiting}
        ready = [dimension for dimension in waiting if not keys & dimension.when.keys()]
        if not ready:
            raise ConfigError(
                "the conditions of these settings lead in a circle", given=sorted(keys),
                mend="a setting may depend on others that do not depend on it",
            )  # fmt: skip
        yield from ready
        waiting = [dimension for dimension in waiting if dimension not in ready]
