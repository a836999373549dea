"""A sweep from its folder to its results.

Who waits for whom: the driver for Tune, Tune for its trials; a trial that gets no room waits until another
one ends. Whether one can ever get it is found out before the first begins.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateset_ray.actors.placement import check_room, cluster
from stateset_ray.actors.run_folder import check_same, write_config
from stateset_ray.config import Config, load_config
from stateset_ray.errors import ConfigError, RunError, StatesetError
from stateset_ray.manifest import replace_whole
from stateset_ray.sweep.plan import Plan, trials_to_run
from stateset_ray.sweep.results import Outcome, Reports, read_outcome, write_results
from stateset_ray.sweep.space import Dice, Values, draw_valid, varied
from stateset_ray.sweep.trial import VALUES, request
from stateset_ray.sweep.tuning import OnEvent, build_tuner, restored_tuner, told, unwatched
from stateset_ray.types import derive_seed

__all__ = ["Swept", "run_sweep"]

_FIXED = ("evaluate.", "train.steps", "train.evaluate_every")
"""What a run may change when it is resumed and a sweep may not: its trials are compared."""
_PROBES = 32  # draws that stand for what a searcher may ask for


@dataclass(frozen=True)
class Swept:
    """A sweep that was run.

    Attributes:
        folder: its folder; see `results`.
        outcomes: of all trials, in the order in which they were begun.
        best: the configuration of the best, which is in `best.toml`; None where no trial came to anything.
        interrupted: some trials have not ended; `resume` goes on with them.
    """

    folder: Path
    outcomes: list[Outcome]
    best: Config | None
    interrupted: bool


def run_sweep(plan: Plan, *, name: str, resume: bool, on_event: OnEvent) -> Swept:
    """Try what a plan says, and write down what came of it.

    Args:
        name: of the sweep's folder in `run.dir`; by default the run's name and `-sweep`.
        resume: go on with the sweep of this name: trials that ended stay, the others are continued.
        on_event: called with each event ("sweep_opened", "trial_step", ...).

    Raises:
        ConfigError: this is not what the sweep began with, or the name is none of a run.
        ClusterError: a trial can never be placed.
        RunError: there is no sweep to resume, its folder cannot be written, or every trial failed.
    """
    name = name or f"{plan.config.run.name}-sweep"
    plan.config.with_overrides([f"run.name={json.dumps(name)}"])  # the best configuration's is made of it
    trials: Sequence[Values] = ()
    notes: list[str] = []
    if plan.sweep.searcher == "random":
        trials, notes = trials_to_run(plan)
    folder = _open_folder(plan, name, resume=resume)
    on_event({"event": "sweep_opened", "folder": str(folder), "notes": notes})
    largest = _largest(plan, trials)
    at_once = max(1, plan.sweep.max_concurrent)
    with cluster(plan.config, at_least_cpus=math.ceil(at_once * sum(b.get("CPU", 0) for b in largest))):
        check_room(plan.config, largest, "a trial of this sweep")
        if resume:
            tuner = restored_tuner(plan, folder, on_event)
        else:
            tuner = build_tuner(plan, trials, folder, on_event)
        try:
            with _quiet():
                grid = tuner.fit()
        except Exception as error:
            raise _said(error) from error
        finally:
            unwatched(folder)
        outcomes = [_outcome(plan, folder, result) for result in grid]
    best = write_results(folder, plan, outcomes)
    planned = len(trials) or plan.sweep.samples
    interrupted = len(outcomes) < planned or any(outcome.status == "unfinished" for outcome in outcomes)
    if best is None and not interrupted:
        raise RunError(
            f"none of the {len(outcomes)} trials came to anything",
            given=next((o.error for o in outcomes if o.error), f"no trial says {plan.metric}"),
            mend=f"look at {folder / 'results.json'}; --resume tries those that failed again",
        )
    return Swept(folder, outcomes, best, interrupted)


def _said(error: Exception) -> Exception:
    """What was raised on purpose within Tune, which hands it on as text."""
    within: BaseException | None = error
    while within is not None:
        if isinstance(within, StatesetError):
            return within
        within = within.__cause__ or within.__context__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune's own tables and tracebacks are left out: whoever watches is told by events."""
    wanted = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, previous in before.items():
            if previous is None:
                del os.environ[name]


def _outcome(plan: Plan, folder: Path, result: Any) -> Outcome:
    values = dict((result.config or {}).get(VALUES, {}))
    error = told(result.error) if result.error else ""
    # Tune's folder of a trial has the trial's name.
    return read_outcome(Reports(folder), Path(result.path).name, plan, values, error)


def _largest(plan: Plan, trials: Sequence[Values]) -> list[dict[str, float]]:
    """The bundles of the trial that asks for most."""
    if not trials:
        dice = (Dice(derive_seed(plan.sweep.seed, "probe", index)) for index in range(_PROBES))
        trials = [draw_valid(plan.space, one)[0] for one in dice]
    asked = [request(varied(plan.config, values), plan.sweep.trial_cpus) for values in trials]
    return max(asked, key=lambda bundles: [sum(b.get(n, 0) for b in bundles) for n in ("GPU", "CPU")])


def _open_folder(plan: Plan, name: str, *, resume: bool) -> Path:
    """Make or find the folder of a sweep, and write what was asked for into it."""
    folder = (plan.config.run.dir / name).absolute()
    asked = {
        "space.toml": plan.text,
        "sweep.json": json.dumps(plan.sweep.model_dump(mode="json"), indent=2) + "\n",
    }
    if resume:
        if not (folder / "tune").is_dir():
            raise RunError(
                "there is no sweep of this name to resume", given=str(folder),
                mend="check --name and run.dir, or start without --resume",
            )  # fmt: skip
        _check_asked(plan, folder, asked)
        return folder
    number, first = 1, folder
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        write_config(plan.config, folder)
        for file, text in asked.items():
            replace_whole(folder / file, text.encode())
    except OSError as error:
        raise RunError(
            f"the sweep's folder cannot be written: {error.strerror}", given=str(folder),
            mend="set run.dir to a folder you may write to",
        ) from error  # fmt: skip
    return folder


def _check_asked(plan: Plan, folder: Path, asked: Mapping[str, str]) -> None:
    """Refuse to go on with what a sweep did not begin with."""
    for file in ("config.toml", *asked):
        try:
            before = (folder / file).read_text(encoding="utf-8")
        except OSError as error:
            raise RunError(
                f"{file} of the sweep cannot be read: {error.strerror}", given=str(folder / file),
                mend="restore it, or start a new sweep",
            ) from error  # fmt: skip
        if file in asked and before != asked[file]:
            raise ConfigError(
                f"this is not what the sweep began with: {file} differs", given=str(folder / file),
                mend="resume with the same space and options, or start a new sweep",
            )  # fmt: skip
    check_same(load_config(folder / "config.toml"), plan.config, fixed=_FIXED)
