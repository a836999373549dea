"""What a person sees of a sweep: a line per step of a trial, and at the end a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stateset_ray.report import clean
from stateset_ray.sweep.plan import Plan
from stateset_ray.sweep.results import Outcome, best_of

__all__ = ["SweepProgress", "table"]


class SweepProgress:
    """Prints the events of a sweep; give it to `sweep` as `on_event`.

    Args:
        console: where to print; standard output by default.
        steps: of a whole trial.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._steps = steps

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event; kinds that are not known are passed over."""
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)

    def _say(self, *parts: str | tuple[str, str]) -> None:
        self._console.print(Text.assemble(*parts), soft_wrap=True)

    def _trial(self, event: Mapping[str, Any]) -> tuple[str, str]:
        return (f"trial {event['number'] + 1} ({event['trial']})  ", "bold")

    def _on_sweep_opened(self, event: Mapping[str, Any]) -> None:
        self._say(("sweep  ", "bold"), str(event["folder"]))
        for note in event["notes"]:
            self._say(f"  {note}")

    def _on_sweep_waits(self, event: Mapping[str, Any]) -> None:
        self._say((f"no trial got room for {event['seconds']} s; free: {event['free']}", "yellow"))

    def _on_trial_started(self, event: Mapping[str, Any]) -> None:
        self._say(self._trial(event), ", ".join(f"{k} = {_short(v)}" for k, v in event["values"].items()))

    def _on_trial_step(self, event: Mapping[str, Any]) -> None:
        self._say(
            self._trial(event),
            f"step {event['step']}/{self._steps}  {event['metric']} ",
            _short(event["value"]),
        )

    def _on_trial_ended(self, event: Mapping[str, Any]) -> None:
        early = "" if event["step"] >= self._steps else ", early"
        self._say(self._trial(event), f"ended after {event['step']} steps{early}")

    def _on_trial_recovers(self, event: Mapping[str, Any]) -> None:
        self._say(
            self._trial(event), ("failed, and goes on from its last checkpoint: ", "yellow"), _line(event)
        )

    def _on_trial_failed(self, event: Mapping[str, Any]) -> None:
        self._say(
            self._trial(event), (f"failed {event['failures']} times and is given up: ", "red"), _line(event)
        )


def table(plan: Plan, outcomes: Sequence[Outcome]) -> Table:
    """All trials, the best first; those of fewer steps below those of more."""
    keys = list(dict.fromkeys(dimension.key for dimension in plan.space.dimensions))
    shown = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for name in ("", *[key.partition(".")[2] for key in keys], plan.metric, "steps", "ended"):
        shown.add_column(name, overflow="fold")
    best = best_of(outcomes, plan.sweep.mode)
    sign = -1 if plan.sweep.mode == "max" else 1
    order = sorted(
        enumerate(outcomes, 1),
        key=lambda row: (-row[1].steps, sign * row[1].value if math.isfinite(row[1].value) else math.inf),
    )
    for number, outcome in order:
        values = [_short(outcome.values[key]) if key in outcome.values else "-" for key in keys]
        style = "green" if outcome is best else "red" if outcome.status == "failed" else ""
        row = [str(number), *values, _short(outcome.value), str(outcome.steps), outcome.status]
        shown.add_row(*row, style=style)
    return shown


def _line(event: Mapping[str, Any]) -> str:
    """The first line of an error, without what a terminal would obey."""
    return clean(str(event["error"]).partition("\n")[0], 200)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)
