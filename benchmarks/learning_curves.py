"""From the records of runs to numbers over seeds, and to a table. Plain Python, no model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "LAST",
    "NOTHING",
    "SHARE",
    "WINDOW",
    "Curve",
    "curve",
    "smoothed",
    "summary",
    "table",
    "whole",
]

WINDOW = 5
"""Steps that a smoothed reward is the mean of: the step and those before it."""
LAST = 10
"""Steps at the end whose mean reward is what a run reached."""
SHARE = 0.8
"""Of the way from start to reached."""
NOTHING = 0.1
"""A change of reward below which nothing was learned."""

Record = Mapping[str, Any]


class Curve(NamedTuple):
    """One run in numbers.

    Attributes:
        start: training reward of step 0, which the untouched policy plays.
        reached: mean training reward of the last `LAST` steps.
        steps_to: steps done when the smoothed reward first had covered `SHARE` of the way from start to
            reached; None where that way is shorter than `NOTHING`.
        area: mean training reward of all steps: high for who gets far, and for who gets there early.
    """

    start: float
    reached: float
    steps_to: int | None
    area: float


def whole(record: Record) -> list[float]:
    """The rewards of all steps; a run that nothing more could be learned in stays where it was."""
    rewards = list(record["rewards"])
    return rewards + [statistics.fmean(rewards[-WINDOW:])] * (record["steps"] - len(rewards))


def smoothed(rewards: Sequence[float]) -> list[float]:
    """The mean of each step and the up to `WINDOW - 1` before it.

    Example:
        >>> smoothed([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    """
    return [statistics.fmean(rewards[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(rewards))]


def curve(rewards: Sequence[float]) -> Curve:
    """See `Curve`.

    Example:
        >>> curve([-1.0] * 10 + [1.0] * 20)
        Curve(start=-1.0, reached=1.0, steps_to=14, area=0.3333333333333333)
    """
    start, reached = rewards[0], statistics.fmean(rewards[-LAST:])
    way = reached - start
    steps = (i + 1 for i, value in enumerate(smoothed(rewards)) if value - start >= SHARE * way)
    return Curve(start, reached, next(steps, None) if way >= NOTHING else None, statistics.fmean(rewards))


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1), and every value."""
    return {
        "mean": round(statistics.fmean(values), 4) if values else None,
        "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "all": [round(value, 4) for value in values],
    }


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The runs of one arm, in the order of their seeds, as numbers over seeds."""
    records = sorted(records, key=lambda record: record["seed"])
    curves = [curve(whole(record)) for record in records]
    changes = [record["heldout_after"] - record["heldout_before"] for record in records]
    norms = [norm for record in records for norm in record["grad_norm"] if norm is not None]
    clipped = [share for record in records for share in record["clipped"] if share is not None]
    return {
        "seeds": [record["seed"] for record in records],
        "learning_rate": records[0]["learning_rate"],
        "heldout_before": _over_seeds([record["heldout_before"] for record in records]),
        "heldout_after": _over_seeds([record["heldout_after"] for record in records]),
        "heldout_change": _over_seeds(changes),
        "start": _over_seeds([c.start for c in curves]),
        "reached": _over_seeds([c.reached for c in curves]),
        "change": _over_seeds([c.reached - c.start for c in curves]),
        "steps_to": _over_seeds([c.steps_to for c in curves if c.steps_to is not None]),
        "area": _over_seeds([c.area for c in curves]),
        "entropy_at_end": _over_seeds([_last(record["entropy"]) for record in records]),
        "grad_norm_max": round(max(norms), 4),
        "grad_scaled_share": round(statistics.fmean(norm > 1 for norm in norms), 4),
        "clipped_mean": round(statistics.fmean(clipped), 4),
        "stopped": {str(r["seed"]): r["stopped"] for r in records if r["stopped"]},
        "curve": [round(value, 4) for value in _mean_curve(records)],
        "commits": sorted({record["commit"] for record in records}),
    }


def _last(values: Sequence[float | None]) -> float:
    return next((value for value in reversed(values) if value is not None), 0.0)


def _mean_curve(records: Sequence[Record]) -> list[float]:
    return [statistics.fmean(step) for step in zip(*map(whole, records), strict=True)]


def table(arms: Mapping[str, Mapping[str, Any]], what: str) -> str:
    """Markdown: a row per arm, `mean ± standard deviation` over its seeds.

    Args:
        arms: `summary` by name.
        what: the heading of the names.
    """
    heads = (what, "learning rate", "seeds", "held-out before", "held-out after", "reached", "steps to 0.8")
    heads = (*heads, "mean of all steps", "tokens clipped", "entropy at end")
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for name, arm in arms.items():
        before, after, steps = arm["heldout_before"], arm["heldout_after"], arm["steps_to"]
        missing = len(arm["seeds"]) - len(steps["all"])
        to = "-" if not steps["all"] else _spread(steps, 0) + (f" ({missing} never)" if missing else "")
        cells = [
            f"`{name}`", f"{arm['learning_rate']:g}", str(len(arm["seeds"])), _spread(before, 2),
            _spread(after, 2), _spread(arm["reached"], 2), to, _spread(arm["area"], 2),
            f"{arm['clipped_mean']:.1%}", _spread(arm["entropy_at_end"], 2),
        ]  # fmt: skip
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(values: Mapping[str, Any], digits: int) -> str:
    text = f"{values['mean']:.{digits}f}"
    return text if values["std"] is None else f"{text} ± {values['std']:.{digits}f}"
