"""What the trials of a sweep came to: read from Tune's books, ranked, and written beside them.

<sweep>/
  config.toml space.toml   what was asked for
  results.json             every trial: values, curve, how it ended
  best.toml                the whole configuration of the best trial; `stateset-ray train` takes it
  sweep.svg                the same as a picture
  trials/<trial>/          the run of each trial: metrics, conversations, checkpoints
  tune/                    Tune's own books
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from stateset_ray.config import Config
from stateset_ray.errors import RunError
from stateset_ray.manifest import replace_whole
from stateset_ray.sweep.picture import Curve, picture
from stateset_ray.sweep.plan import Plan
from stateset_ray.sweep.space import Values, varied

__all__ = ["Outcome", "Status", "best_of", "read_outcome", "write_results"]

Status = Literal["finished", "ended early", "failed", "unfinished"]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        trial: its name; that of its run, too.
        status: it took all steps, the scheduler ended it, it failed for good, or the sweep was interrupted.
        steps: that it took.
        value: of what is compared, after the last of them; not a number where none is known.
        values: what it set; where it took over from others, at the end.
        curve: (step, value) of every step.
        changes: (step, values) where it took over from others: the first step with these values.
        error: why it failed.
        in_force: of what was varied, what its learner worked with in the last step.
    """

    trial: str
    status: Status
    steps: int
    value: float
    values: Values
    curve: list[tuple[int, float]] = field(default_factory=list)
    changes: list[tuple[int, Values]] = field(default_factory=list)
    error: str = ""
    in_force: dict[str, Any] = field(default_factory=dict)


def read_outcome(
    books: Path, plan: Plan, values: Values, error: str = ""
) -> Outcome:  # fmt: skip
    """Read what Tune wrote down of a trial.

    Args:
        books: Tune's folder of the trial.
        values: what it set last.
        error: why it failed for good, if it did.
    """
    curve: dict[int, float] = {}
    changes: list[tuple[int, Values]] = []
    last: dict[str, Any] = {}
    for line in _lines(books / "result.json"):
        step = int(line["training_iteration"])
        curve = {s: v for s, v in curve.items() if s < step}  # it went back to a checkpoint
        curve[step] = float(line.get(plan.metric, math.nan))
        acting = line.get("config", {}).get("values", {})
        if last and acting != last.get("config", {}).get("values", {}):
            changes.append((step, acting))
        last = line
    steps = max(curve, default=0)
    status: Status = "unfinished"
    if error:
        status = "failed"
    elif last.get("done"):
        status = "finished" if steps >= plan.config.train.steps else "ended early"
    return Outcome(
        books.name, status, steps, curve.get(steps, math.nan), values, sorted(curve.items()), changes, error,
        dict(last.get("in_force", {})),
    )  # fmt: skip


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short by a crash
            continue
    return found


def best_of(outcomes: Sequence[Outcome], mode: Literal["max", "min"]) -> Outcome | None:
    """The best of those trials that took the most steps; None where no trial says what is compared.

    A trial that a scheduler ended early is compared with nobody who went further: what it earned was
    earned with less.
    """
    known = [o for o in outcomes if o.status in ("finished", "ended early") and math.isfinite(o.value)]
    return max(known, key=lambda o: (o.steps, o.value if mode == "max" else -o.value), default=None)


def write_results(folder: Path, plan: Plan, outcomes: Sequence[Outcome]) -> Config | None:
    """Write `results.json`, `sweep.svg` and, where there is a best trial, `best.toml`.

    Returns:
        The best configuration.

    Raises:
        RunError: the disk refuses.
    """
    best = best_of(outcomes, plan.sweep.mode)
    config = None
    told = {
        "name": folder.name,
        "metric": plan.metric,
        "mode": plan.sweep.mode,
        "scheduler": plan.sweep.scheduler,
        "searcher": plan.sweep.searcher,
        "space": {dimension.name: dimension.describe() for dimension in plan.space.dimensions},
        "best": best.trial if best else None,
        "trials": [asdict(outcome) for outcome in outcomes],
    }
    try:
        text = json.dumps(_plain(told), indent=2, allow_nan=False)
        replace_whole(folder / "results.json", text.encode() + b"\n")  # first: it is known nowhere else
        if best is not None:
            config = varied(plan.config, best.values | {"run.name": f"{folder.name}-best"})
            replace_whole(folder / "best.toml", config.to_toml().encode())
        curves = [Curve(o.values, o.curve, o.value, o is best) for o in outcomes]
        title = f"{folder.name}: {plan.metric} of {len(outcomes)} trials"
        (folder / "sweep.svg").write_text(picture(plan.space, curves, plan.metric, title), encoding="utf-8")
    except OSError as error:
        raise RunError(f"the results cannot be written: {error.strerror}", given=str(folder)) from error
    return config


def _plain(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
