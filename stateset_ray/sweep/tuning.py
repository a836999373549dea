"""A plan as a Tuner of Ray Tune: who chooses values, who ends trials early, who takes over from whom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import Searcher

from stateset_ray.actors.placement import free_room
from stateset_ray.actors.remote import cause_of
from stateset_ray.errors import CheckpointError, RunError
from stateset_ray.sweep.handover import Pointer, hand_over
from stateset_ray.sweep.plan import Plan
from stateset_ray.sweep.results import Reports
from stateset_ray.sweep.space import Dice, Source, Values, draw_valid
from stateset_ray.sweep.trial import VALUES, trial_class

__all__ = [
    "OnEvent", "OptunaSearcher", "Population", "Watch", "build_tuner", "restored_tuner", "told",
    "trainable_of", "unwatched",
]  # fmt: skip

OnEvent = Callable[[Mapping[str, Any]], None]

_log = logging.getLogger(__name__)
_IDLE = 30  # seconds without any trial after which that is said
_TUNE = "tune"  # the folder that Tune keeps its books in
_watching: dict[str, OnEvent] = {}  # by the sweep's folder: what watches cannot travel with Tune's state


def build_tuner(plan: Plan, trials: Sequence[Values], folder: Path, on_event: OnEvent) -> tune.Tuner:
    """A Tuner for a new sweep.

    Args:
        trials: the values of each; of a searcher, which chooses them one by one, none.
        folder: of the sweep.
    """
    sweep = plan.sweep
    _watching[str(folder)] = on_event
    searcher = None
    if sweep.searcher == "optuna":
        searcher = OptunaSearcher(plan)
    space = {VALUES: tune.grid_search([dict(values) for values in trials])} if searcher is None else {}
    return tune.Tuner(
        trainable_of(plan, folder),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=plan.metric, mode=sweep.mode, search_alg=searcher, scheduler=_scheduler(plan, folder),
            num_samples=1 if searcher is None else sweep.samples,
            max_concurrent_trials=sweep.max_concurrent or None, reuse_actors=True,
            trial_dirname_creator=_trial_id, trial_name_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=_TUNE, storage_path=str(folder), verbose=0,
            failure_config=tune.FailureConfig(max_failures=sweep.failures),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=plan.config.train.checkpoint_every, checkpoint_at_end=True
            ),
            callbacks=[Watch(str(folder), plan.metric)],
        ),
    )  # fmt: skip


def restored_tuner(plan: Plan, folder: Path, on_event: OnEvent) -> tune.Tuner:
    """The Tuner of a sweep that was interrupted; trials that had failed are continued, too."""
    _watching[str(folder)] = on_event
    return tune.Tuner.restore(str(folder / _TUNE), trainable_of(plan, folder), resume_errored=True)


def unwatched(folder: Path) -> None:
    """Nobody watches the sweep of this folder any more."""
    _watching.pop(str(folder), None)


def trainable_of(plan: Plan, folder: Path) -> type[tune.Trainable]:
    """The Trainable of a sweep's trials."""
    keep = 1
    if plan.sweep.scheduler == "pbt":
        # A taker finds its giver's checkpoint of the last comparison, however many came after it.
        keep = math.ceil(plan.sweep.pbt.interval / plan.config.train.checkpoint_every) + 2
    return trial_class(
        plan.config, folder / "trials", metric=plan.metric, trial_cpus=plan.sweep.trial_cpus, keep=keep
    )


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


def _scheduler(plan: Plan, folder: Path) -> Any:
    sweep, steps = plan.sweep, plan.config.train.steps
    if sweep.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr="training_iteration", max_t=steps, grace_period=sweep.asha.grace,
            reduction_factor=sweep.asha.reduction,
        )  # fmt: skip
    if sweep.scheduler == "pbt":
        return Population(plan, folder / "trials")
    return FIFOScheduler()


class Population(PopulationBasedTraining):
    """Population-based training with our own perturbations, and checkpoints that outlive who wrote them.

    Tune's perturbations know no ends, no conditions, and nothing of what a configuration allows.
    """

    def __init__(self, plan: Plan, trials: Path) -> None:
        pbt, dice = plan.sweep.pbt, Dice(plan.sweep.seed)
        self._trials = trials
        self._seen: dict[str, str] = {}

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            moved = plan.space.perturb(dict(config[VALUES]), dice, pbt.resample, pbt.factors)
            return config | {VALUES: moved}

        super().__init__(
            time_attr="training_iteration", perturbation_interval=pbt.interval, log_config=False,
            quantile_fraction=pbt.quantile, synch=pbt.synchronous, custom_explore_fn=explore,
        )  # fmt: skip

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Compare, and hand checkpoints over to those who were told to go on from them."""
        decision = super().on_trial_result(tune_controller, trial, result)
        for taker in tune_controller.get_trials():
            if taker.checkpoint is not None and self._seen.get(taker.trial_id) != taker.checkpoint.path:
                self._seen[taker.trial_id] = taker.checkpoint.path
                self._hand_over(taker)
        return str(decision)

    def _hand_over(self, taker: Any) -> None:
        try:
            pointer = Pointer.read(taker.checkpoint.path)
            if pointer.trial != taker.trial_id:
                hand_over(self._trials, pointer, taker.trial_id)
        except CheckpointError as error:  # the taker will say so again, and may fail; the others go on
            _log.warning("trial %s cannot take over: %s", taker.trial_id, error)


class OptunaSearcher(Searcher):
    """Optuna's TPE sampler, asked for one valid configuration after the other."""

    def __init__(self, plan: Plan) -> None:
        import optuna

        super().__init__(metric=plan.metric, mode=plan.sweep.mode)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._states = optuna.trial.TrialState
        self._plan = plan
        self._asked: dict[str, Any] = {}
        self._study = optuna.create_study(
            direction="maximize" if plan.sweep.mode == "max" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=plan.sweep.seed),
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The values of the next trial; those that cannot be are told to the sampler as failed."""
        tried: list[Any] = []

        def ask() -> Iterator[Source]:
            while True:
                if tried:
                    self._study.tell(tried[-1], state=self._states.FAIL)
                tried.append(self._study.ask())
                yield _Asked(tried[-1])

        values, _ = draw_valid(self._plan.space, ask())
        self._asked[trial_id] = tried[-1]
        return {VALUES: values}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the sampler what a trial came to; one that failed is no evidence."""
        asked = self._asked.pop(trial_id, None)
        if asked is None:
            return
        value = (result or {}).get(self.metric)
        if error or value is None or not math.isfinite(value):
            self._study.tell(asked, state=self._states.FAIL)
        else:
            self._study.tell(asked, float(value))

    def save(self, checkpoint_path: str) -> None:
        """Write what a resumed sweep goes on with."""
        Path(checkpoint_path).write_bytes(cloudpickle.dumps((self._study, self._asked)))

    def restore(self, checkpoint_path: str) -> None:
        """Go on with what was written."""
        self._study, self._asked = cloudpickle.loads(Path(checkpoint_path).read_bytes())


class _Asked:
    """A trial of Optuna as a source of values."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def real(self, name: str, low: float, high: float, *, log: bool) -> float:
        return float(self._trial.suggest_float(name, low, high, log=log))

    def integer(self, name: str, low: int, high: int) -> int:
        return int(self._trial.suggest_int(name, low, high))

    def option(self, name: str, options: Sequence[Any]) -> Any:
        # Optuna wants plain options; lists and tables are chosen by their place.
        return options[self._trial.suggest_categorical(name, list(range(len(options))))]


class Watch(tune.Callback):
    """Notes what the trials of a sweep report, and tells whoever watches what happens in it.

    Args:
        folder: of the sweep, where it is noted, and by which the one who watches is found.
        metric: what is compared.
    """

    def __init__(self, folder: str, metric: str) -> None:
        self._folder = folder
        self._metric = metric
        self._idle_since = math.inf  # seconds of `time.monotonic`

    def setup(self, *args: Any, **info: Any) -> None:
        """The sweep begins, or goes on.

        Raises:
            RunError: its folder is not where it was when it began.
        """
        if self._folder not in _watching:
            raise RunError(
                "the folder of this sweep was moved",
                given=self._folder,
                mend="move it back, or start a new one",
            )
        Reports(Path(self._folder)).begin()
        self._idle_since = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Say so where no trial gets room."""
        now = time.monotonic()
        if any(trial.status == "RUNNING" for trial in trials):
            self._idle_since = now
        elif now - self._idle_since > _IDLE and any(trial.status == "PENDING" for trial in trials):
            self._idle_since = now
            self._tell({"event": "sweep_waits", "seconds": _IDLE, "free": free_room()})

    def _emit(self, event: str, trials: Sequence[Any], trial: Any, **facts: Any) -> None:
        number = next((n for n, t in enumerate(trials) if t.trial_id == trial.trial_id), -1)
        about = {"trial": trial.trial_id, "number": number, "trials": len(trials)}
        self._tell({"event": event, **about, **facts})

    def _tell(self, event: Mapping[str, Any]) -> None:
        _watching.get(self._folder, lambda _: None)(event)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial got its room: it begins, or goes on."""
        self._emit("trial_started", trials, trial, values=dict(trial.config.get(VALUES, {})))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial took a step. It is noted first: whatever comes of the trial, this has happened."""
        Reports(Path(self._folder)).append(trial.trial_id, result, self._metric)
        step, value = result["training_iteration"], result.get(self._metric, math.nan)
        self._emit("trial_step", trials, trial, step=step, value=value, metric=self._metric)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial took its last step, or was ended early."""
        self._emit("trial_ended", trials, trial, step=trial.last_result.get("training_iteration", 0))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed and goes on from its last checkpoint."""
        error = _failure(trial)
        self._emit("trial_recovers", trials, trial, failures=trial.num_failures, error=error)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for good."""
        error = _failure(trial)
        self._emit("trial_failed", trials, trial, failures=trial.num_failures, error=error)


def _failure(trial: Any) -> str:
    """Why a trial has failed just now: what Tune wrote down here, before it is where its books lie."""
    path = Path(trial.pickled_error_file or "")
    return told(cloudpickle.loads(path.read_bytes())) if path.is_file() else "see its error.txt"


def told(error: BaseException | None) -> str:
    """What a trial's failure was, in the words of whoever raised it."""
    return str(cause_of(error) if isinstance(error, RayTaskError) else error)
