"""One run as a trial of Ray Tune: the same step as `train`, one at a time, in the room that the trial got.

Who waits for whom: Tune for `step`, `save` and `restore` of a trial; the trial, as its run's controller, for
workers and learner ranks (`train`). A run is opened by the first step or restore, not by `setup`, since
only then it is known where it begins.
"""

from __future__ import annotations

import difflib
import math
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from ray import tune

from stateset_ray.actors.placement import bundles, import_paths
from stateset_ray.actors.run import Run, open_run
from stateset_ray.actors.run_folder import write_config
from stateset_ray.config import Config
from stateset_ray.errors import RunError
from stateset_ray.learner.learner import learning_rate
from stateset_ray.metrics import JsonLines
from stateset_ray.settings import leaves
from stateset_ray.sweep.checks import HELDOUT
from stateset_ray.sweep.handover import Pointer, take_up
from stateset_ray.sweep.space import Values, varied
from stateset_ray.train import advance, train_step
from stateset_ray.train_async import train_async_step

__all__ = ["VALUES", "RunTrial", "request", "trial_class", "values_of"]

VALUES = "values"
"""Key of a trial's values in what Tune calls its config."""


def trial_class(
    config: Config, folder: Path, *, metric: str = "", trial_cpus: float = 1.0, keep: int = 1
) -> type[tune.Trainable]:
    """A Trainable that runs variations of a configuration.

    Args:
        config: what is varied; not corrected for staleness.
        folder: of all trials, on storage that all nodes share.
        metric: must be in every result; empty: no check.
        trial_cpus: room of the trial's own process.
        keep: checkpoints of a trial that stay, at least.
    """
    members = {
        "base": config,
        "folder": folder.absolute(),
        "metric": metric,
        "trial_cpus": trial_cpus,
        "keep": keep,
        "paths": tuple(import_paths()),
        "directory": Path.cwd(),
        "__doc__": RunTrial.__doc__,
        "__module__": "__main__",  # pickled with its members, not looked up where they are missing
    }
    return type("Run", (RunTrial,), members)


def values_of(config: Mapping[str, Any]) -> Values:
    """What a trial sets: `values`, as sweeps give it, or dotted keys of a space of Tune's own."""
    dotted = {key: value for key, value in config.items() if "." in key}
    return dotted | dict(config.get(VALUES, {}))


def request(config: Config, trial_cpus: float) -> list[dict[str, float]]:
    """The bundles of a trial: its own process, if it takes room, before those of its run."""
    own = [{"CPU": trial_cpus}] if trial_cpus else []
    return [*own, *bundles(config)]


class RunTrial(tune.Trainable):
    """A run of stateset_ray as a trial; made by `stateset_ray.sweep.trainable`.

    Its config holds settings by dotted key. Each result has the numbers of the step's line in
    `metrics.jsonl` by dotted name, `heldout_reward` (of the newest evaluation, where there is one) and
    `in_force` (what the learner works with, of what was varied). One step of Tune is one of the run.
    """

    base: ClassVar[Config]
    folder: ClassVar[Path]
    metric: ClassVar[str]
    trial_cpus: ClassVar[float]
    keep: ClassVar[int]
    paths: ClassVar[tuple[str, ...]]
    directory: ClassVar[Path]

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """The trial's own process, then the bundles of its run: one group, granted all or nothing."""
        settings = varied(cls.base, values_of(config))
        return tune.PlacementGroupFactory(
            [{"CPU": cls.trial_cpus}, *bundles(settings)], strategy=settings.cluster.strategy
        )

    def setup(self, config: dict[str, Any]) -> None:
        """Take the values; nothing is opened yet."""
        sys.path[:0] = [path for path in self.paths if path not in sys.path]
        if self.directory.is_dir():
            os.chdir(self.directory)  # relative paths in a configuration mean what they mean to `train`
        self._stack = ExitStack()
        self._run: Run | None = None
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Let this process go on as another trial, or with other values: whatever is open is closed."""
        self.cleanup()
        if self.directory.is_dir():
            os.chdir(self.directory)
        self._take(new_config)
        return True

    def _take(self, config: Mapping[str, Any]) -> None:
        self._values = values_of(config)
        # No mirror: trials are on storage that all nodes share, and what they hand on is found there only.
        place = {"run.name": self.trial_id, "run.dir": str(self.folder), "run.mirror": ""}
        keep = {"train.keep_checkpoints": max(self.keep, self.base.train.keep_checkpoints)}
        self._settings = varied(self.base, self._values | place | keep)
        self._record: Mapping[str, Any] = {}
        self._in_force: dict[str, Any] | None = None
        self._saved = -1

    def step(self) -> dict[str, Any]:
        """Take one step of the run, and say what `metrics.jsonl` says of it."""
        run = self._run or self._open(None)
        if run.step < self._settings.train.steps:
            advance(run, train_async_step if self._settings.train.max_staleness else train_step)
            if self._in_force is None:
                self._in_force = self._check_in_force(run)
        else:  # it had taken its last step when Tune lost sight of it
            self._record = JsonLines(run.folder / "metrics.jsonl").read()[-1]
        done = run.step >= self._settings.train.steps
        if done:
            run.evaluate("after")
            run.finish()
        result = {
            **_numbers(self._record),
            **_heldout(run.results),
            "training_iteration": run.step,
            "in_force": self._in_force or {},
            "done": done,
        }
        if self.metric and self.metric not in result and not self._learned():
            result[self.metric] = math.nan  # a step in which all rewards were equal says little
        if self.metric and self.metric not in result:
            near = difflib.get_close_matches(self.metric, result, n=3)
            raise RunError(
                f"no step of this run says {self.metric!r}", given=near or sorted(result),
                mend="set sweep.metric to one of these",
            )  # fmt: skip
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save the run where its checkpoints lie, unless it has just done so; Tune gets a pointer."""
        run = self._run
        if run is None:
            raise RunError("this trial has taken no step that could be saved")
        if self._saved != run.step:
            run.save()
        Pointer(self.trial_id, run.step).write(checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on exactly from a checkpoint, of this trial or of one that it takes over from."""
        self._open(Pointer.read(checkpoint))

    def cleanup(self) -> None:
        """End every actor of the run; what was saved stays."""
        self._run = None
        stack, self._stack = self._stack, ExitStack()
        stack.close()

    def _open(self, pointer: Pointer | None) -> Run:
        self.cleanup()
        self._in_force = None
        settings = self._settings
        folder = settings.run.folder
        if pointer is None:
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that died before its first checkpoint
        else:
            take_up(self.folder, pointer, self.trial_id)
            # The values may be new ones: `checks` knows which of them a checkpoint lets change.
            write_config(settings, folder)
        run = self._stack.enter_context(
            open_run(settings, resume=pointer is not None, on_event=self._on_event)
        )
        if pointer is not None and run.step != pointer.step:
            raise RunError(
                f"the trial should go on after step {pointer.step}, and its folder after {run.step}",
                given=str(folder),
                mend="no other process may write there; give the sweep another name",
            )
        if pointer is not None:
            self._saved = pointer.step
        self._run = run
        return run

    def _on_event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            self._record = event
        elif event["event"] == "checkpoint":
            self._saved = int(Path(event["path"]).name.rpartition("-")[2])

    def _check_in_force(self, run: Run) -> dict[str, Any]:
        """What was varied as every rank has it, compared with what it was varied to.

        Raises:
            RunError: a rank learns with something else; a checkpoint brought it along.
        """
        wanted = dict(leaves(self._settings.model_dump(mode="json")))
        wanted["learner.learning_rate"] = learning_rate(self._settings, run.step - 1)
        found: dict[str, Any] = {}
        for rank, told in enumerate(run.learners.in_force()):
            if not self._settings.grpo.kl_target:
                told["grpo.kl_coef"] = run.kl_coef  # each step is told it
            found = {key: told[key] for key in self._values if key in told}
            stale = {
                key: (value, wanted[key])
                for key, value in found.items()
                if value != wanted[key] and not (key == "learner.learning_rate" and not self._learned())
            }
            if stale:
                raise RunError(
                    f"learner rank {rank} works with other values than this trial was given",
                    given={key: f"{then!r} instead of {now!r}" for key, (then, now) in stale.items()},
                    mend="this is a bug of stateset_ray: please report it with the sweep's folder",
                )
        return found

    def _learned(self) -> bool:
        """Whether the last step moved the optimizer, which learns its rate step by step."""
        return bool(self._record.get("update"))


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step, by dotted name; what is not known is not a number."""
    kept = {
        key: float(value)
        for key, value in leaves(record)
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in ("step", "steps")
    }
    return {"reward_mean": math.nan} | kept


def _heldout(results: Mapping[str, Any]) -> dict[str, float]:
    """The newest held-out reward."""
    steps = {key: int(key.rpartition("_")[2]) for key in results if key.startswith("heldout_step_")}
    order = ["heldout_untrained", "heldout_before", *sorted(steps, key=steps.__getitem__), "heldout_after"]
    known = [results[key] for key in order if results.get(key) is not None]
    return {HELDOUT: float(known[-1])} if known else {}
