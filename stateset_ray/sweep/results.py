"""What the trials of a sweep came to: noted as they report it, ranked, and written down.

<sweep>/
  config.toml space.toml   what was asked for
  reports.jsonl            every step that a trial reported, as it came
  results.json             every trial: values, curve, how it ended
  best.toml                the whole configuration of the best trial; `stateset-ray train` takes it
  sweep.svg                the same as a picture
  trials/<trial>/          the run of each trial: metrics, conversations, checkpoints
  tune/                    Tune's own books
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from stateset_ray.config import Config
from stateset_ray.errors import RunError
from stateset_ray.manifest import replace_whole
from stateset_ray.sweep.picture import Curve, picture
from stateset_ray.sweep.plan import Plan
from stateset_ray.sweep.space import Values, varied

__all__ = ["Outcome", "Reports", "Status", "best_of", "read_outcome", "write_results"]

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


class Reports:
    """What the trials of a sweep have reported: `reports.jsonl`, written by the driver alone.

    Tune writes the same into a file of each trial, but loses lines of it: when a trial goes on from a
    checkpoint, Tune begins that file anew with its copy in the sweep's folder, which may be older by 10 s.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "reports.jsonl"

    def begin(self) -> None:
        """Make the file, or end a line in it that the death of an earlier driver cut short.

        Raises:
            RunError: the disk refuses.
        """
        whole = not self._path.is_file() or self._path.read_bytes().endswith(b"\n")
        self._write("" if whole else "\n")

    def append(self, trial: str, result: Mapping[str, Any], metric: str) -> None:
        """Note what a trial has just reported to Tune.

        Raises:
            RunError: the disk refuses.
        """
        report = {
            "trial": trial,
            "step": int(result["training_iteration"]),
            "value": float(result.get(metric, math.nan)),
            "values": dict(result.get("config", {}).get("values", {})),
            "in_force": dict(result.get("in_force", {})),
            "done": bool(result.get("done")),
        }
        self._write(json.dumps(_plain(report), allow_nan=False) + "\n")

    def of(self, trial: str) -> list[dict[str, Any]]:
        """What a trial has reported, in the order in which it came."""
        if not self._path.is_file():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                report = json.loads(line)
            except ValueError:  # cut short
                continue
            if report["trial"] == trial:
                found.append(report)
        return found

    def _write(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise RunError(
                f"what a trial reported cannot be written: {error.strerror}", given=str(self._path),
                mend="make room on the disk; --resume goes on with the sweep",
            ) from error  # fmt: skip


def read_outcome(
    reports: Reports, trial: str, plan: Plan, values: Values, error: str = ""
) -> Outcome:  # fmt: skip
    """Make out what a trial came to.

    Args:
        trial: its name.
        values: what it set last.
        error: why it failed for good, if it did.
    """
    curve: dict[int, float] = {}
    changes: list[tuple[int, Values]] = []
    last: dict[str, Any] = {}
    for report in reports.of(trial):
        step = report["step"]
        curve = {s: v for s, v in curve.items() if s < step}  # it went back to a checkpoint
        curve[step] = math.nan if report["value"] is None else report["value"]
        if last and report["values"] != last["values"]:
            changes.append((step, report["values"]))
        last = report
    steps = max(curve, default=0)
    status: Status = "unfinished"
    if error:
        status = "failed"
    elif last.get("done"):
        status = "finished" if steps >= plan.config.train.steps else "ended early"
    return Outcome(
        trial, status, steps, curve.get(steps, math.nan), values, sorted(curve.items()), changes, error,
        dict(last.get("in_force", {})),
    )  # fmt: skip


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
        replace_whole(folder / "sweep.svg", picture(plan.space, curves, plan.metric, title).encode())
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
