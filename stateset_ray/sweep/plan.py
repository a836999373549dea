"""What a sweep is to do, read from TOML: `[space]`, which settings vary, and `[sweep]`, how they are tried.

Everything that can be known to be wrong is refused here, before anything heavy loads.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from stateset_ray.config import Config
from stateset_ray.errors import ConfigError
from stateset_ray.sections import Section
from stateset_ray.settings import leaves, validated
from stateset_ray.sweep.checks import check_dimension, check_together, is_setting, metric_of
from stateset_ray.sweep.sections import SweepConfig
from stateset_ray.sweep.space import Dice, Dimension, Kind, Space, Values, draw_valid
from stateset_ray.types import derive_seed

__all__ = ["Plan", "read_plan", "shipped", "trials_to_run"]

_SPACES = Path(__file__).with_name("spaces")


class _File(Section):
    """A file of a sweep."""

    sweep: SweepConfig = SweepConfig()
    space: Mapping[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A sweep that can be run.

    Attributes:
        config: what is varied.
        sweep: how.
        space: what varies.
        metric: what is compared.
        source: where the space was read from.
        text: the same, as it was written.
    """

    config: Config
    sweep: SweepConfig
    space: Space
    metric: str
    source: str
    text: str


def shipped() -> list[str]:
    """The names of the search spaces that come with the package."""
    return sorted(path.stem for path in _SPACES.glob("*.toml"))


def read_plan(config: Config, space: str | Path, *, samples: int = 0) -> Plan:
    """Read a search space and check it against a configuration.

    Args:
        config: what is varied; not corrected for staleness.
        space: a TOML file, or the name of a space that comes with the package.
        samples: instead of `sweep.samples`, if above 0.

    Raises:
        ConfigError: a key, a range or a choice is wrong; the message names it, and the nearest key.
    """
    path = _SPACES / f"{space}.toml" if str(space) in shipped() else Path(space)
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"the search space cannot be read: {error.strerror}",
            given=str(space),
            mend=f"give a TOML file, or one of {', '.join(shipped())}",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the search space is not valid TOML: {error}", given=str(space)) from error
    file = validated(_File, tree, str(path))
    sweep = file.sweep.model_copy(update={"samples": samples}) if samples else file.sweep
    dimensions = [d for key, value in _entries(file.space) for d in _dimensions(key, value)]
    if not dimensions:
        raise ConfigError(
            "this search space varies nothing", given=str(path),
            mend='say what does, for example [space] "learner.learning_rate" = {loguniform = [1e-6, 1e-4]}',
        )  # fmt: skip
    for dimension in dimensions:
        check_dimension(config, sweep, dimension)
    check_together(config, sweep, dimensions)
    plan = Plan(config, sweep, Space(config, dimensions), metric_of(config, sweep), str(path), text)
    draw_valid(plan.space, Dice(sweep.seed))  # a space that gives nothing valid is refused here
    return plan


def trials_to_run(plan: Plan) -> tuple[list[Values], list[str]]:
    """The values of every trial, drawn before the first begins. A searcher's are not known yet.

    Returns:
        The values, each set once, and what there is to say about the draw.

    Raises:
        ConfigError: nothing valid was drawn.
    """
    found: dict[str, Values] = {}
    refused, skipped, doubles, reason = 0, 0, 0, ""
    varies = any(d.kind != "grid" for d in plan.space.dimensions)
    for place, point in enumerate(plan.space.grid()):
        for index in range(plan.sweep.samples if varies else 1):
            dice = Dice(derive_seed(plan.sweep.seed, "sweep", place, index))
            try:
                values, again = draw_valid(plan.space, dice, point)
            except ConfigError as error:
                skipped, reason = skipped + 1, error.problem
                break
            refused += again
            doubles += repr(values) in found
            found.setdefault(repr(values), values)
    if not found:
        raise ConfigError(f"no point of this grid gives a valid configuration: {reason}", given=plan.source)
    notes = [f"{refused} draws were refused by the configuration's checks and drawn again"] * (refused > 0)
    notes += [f"{skipped} points of the grid give no valid configuration: {reason}"] * (skipped > 0)
    notes += [f"{doubles} trials would have repeated others and are left out"] * (doubles > 0)
    return list(found.values()), notes


def _entries(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, how it varies): keys may be quoted, or sections of their own."""
    for name, value in tree.items():
        inside = isinstance(value, Mapping) and not value.keys() & {*get_args(Kind), "when"}
        if inside and not is_setting(f"{prefix}{name}"):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _dimensions(key: str, given: Any) -> list[Dimension]:
    """One entry of `[space]`: one way to vary, or several, each under conditions of its own."""
    if not isinstance(given, list):
        return [_dimension(key, key, given)]
    for way in given:
        if not isinstance(way, Mapping) or not way.get("when"):
            raise ConfigError(
                f"{key}: where a setting varies in several ways, each says with `when` where it holds",
                given=way,
            )
    return [_dimension(f"{key} ({n})" if n > 1 else key, key, way) for n, way in enumerate(given, 1)]


def _dimension(name: str, key: str, given: Any) -> Dimension:
    kinds = [k for k in get_args(Kind) if isinstance(given, Mapping) and k in given]
    if len(kinds) != 1 or set(given) - {*kinds, "when"}:
        raise ConfigError(
            f"{key} must vary in exactly one way: {', '.join(get_args(Kind))}, and `when` beside it",
            given=given, mend=f'for example "{key}" = {{choice = [...]}}',
        )  # fmt: skip
    kind, values = kinds[0], given[kinds[0]]
    if problem := _wrong(kind, values):
        raise ConfigError(f"{key}: {kind} {problem}", given=values)
    when = given.get("when", {})
    if not isinstance(when, Mapping):
        raise ConfigError(
            f"{key}: `when` names other settings and the values they must have", given=when,
            mend='for example when = {"grpo.loss" = ["ppo", "cispo"]}',
        )  # fmt: skip
    conditions = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in leaves(when)}
    if kind in ("uniform", "loguniform"):
        values = [float(v) for v in values]
    return Dimension(name, key, kind, tuple(values), conditions)


def _wrong(kind: Kind, values: Any) -> str:
    """What is wrong with the values of a dimension; empty if nothing is."""
    if not isinstance(values, list) or not values:
        return "needs a list of values"
    if kind in ("choice", "grid"):
        return "" if len({repr(v) for v in values}) == len(values) else "names a value twice"
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not numbers or not all(math.isfinite(v) for v in values):
        return "needs two finite numbers, [low, high]"
    if values[0] >= values[1]:
        return "needs a low end below its high end"
    if kind == "loguniform" and values[0] <= 0:
        return "needs a low end above 0"
    if kind == "randint" and not all(isinstance(v, int) for v in values):
        return "needs two whole numbers"
    return ""
