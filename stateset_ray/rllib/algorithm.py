"""GRPO: RLlib's Algorithm, whose training step is the one of `train`.

Of RLlib it uses what stands around a step: iterations, metrics, callbacks, evaluation intervals, checkpoints
and Tune. It has no EnvRunner, no RLModule and no Learner of RLlib, since none of them can hold a conversation
or a sharded model; `docs/rllib.md` says what follows. What it takes from RLlib that is not public is named in
`tests/unit/test_rllib_hooks.py`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSystem, LocalFileSystem, copy_files
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.utils import force_list
from ray.rllib.utils.checkpoints import Checkpointable
from ray.tune import PlacementGroupFactory
from ray.tune.result import DONE, TRAINING_ITERATION

from stateset_ray.actors.adoption import adopt
from stateset_ray.actors.credit import Batch
from stateset_ray.actors.flight import Collected
from stateset_ray.actors.jobs import GroupPayload, GroupReport
from stateset_ray.actors.placement import bundles
from stateset_ray.actors.remote import get
from stateset_ray.actors.run import Run, open_run
from stateset_ray.config import Config
from stateset_ray.errors import CheckpointError, ConfigError, RunError
from stateset_ray.rllib.configuration import GRPOConfig
from stateset_ray.rllib.results import episode_of, evaluated, log_played, log_step
from stateset_ray.train import advance, train_step, warm_start
from stateset_ray.train_async import train_async_step
from stateset_ray.types import Trajectory

__all__ = ["GRPO"]

_FOLDER = "stateset"
"""Of our checkpoint, in one of RLlib's."""

_logger = logging.getLogger(__name__)


class GRPO(Algorithm):
    """Multi-turn GRPO; made by `GRPOConfig.build_algo()`.

    One iteration is one step of `stateset_ray.train`, unless `reporting` asks for more of them.

    Attributes:
        folder: of the run: its configuration, metrics, conversations and own checkpoints.
    """

    @classmethod
    def get_default_config(cls) -> GRPOConfig:
        return GRPOConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """A bundle for this process, and behind it those of the run (`actors.placement.bundles`)."""
        wanted = cls.get_default_config().update_from_dict(config)
        own = {"CPU": wanted.num_cpus_for_main_process, **wanted.custom_resources_for_main_process}
        settings = wanted.settings()
        return PlacementGroupFactory([own, *bundles(settings)], strategy=settings.cluster.strategy)

    def setup(self, config: GRPOConfig) -> None:
        if self.config.log_level:
            logging.getLogger("ray.rllib").setLevel(self.config.log_level)
        self.callbacks = [cls() for cls in force_list(self.config.callbacks_class)]
        self._record: Mapping[str, Any] = {}
        self._reports: list[GroupReport] = []
        self._finished: list[Trajectory] = []
        self._turns_trained = 0
        self._run: Run | None = None
        settings = self._at_home(self.config.settings())
        self._take_step = train_async_step if settings.train.max_staleness else train_step
        with ExitStack() as stack:
            self._run = stack.enter_context(open_run(settings, on_event=self._on_event, signals=False))
            self._run.watch = self._look
            self._set_up_metrics()
            self._call("on_algorithm_init")
            self._opened = stack.pop_all()
        self.folder = self._run.folder

    def _at_home(self, settings: Config) -> Config:
        """In a trial of Ray Tune the run's folder lies in the trial's, so no two share it or a mirror."""
        if self._storage is None:
            return settings
        home = Path(self.logdir)
        folder = settings.run.dir / home.name if settings.run.dir.is_absolute() else home / settings.run.dir
        mirror = settings.run.mirror and f"{settings.run.mirror.rstrip('/')}/{home.name}"
        run = settings.run.model_copy(update={"dir": folder, "mirror": mirror})
        return settings.model_copy(update={"run": run})

    def __repr__(self) -> str:  # names the actor of a trial in Ray's logs, before it has a configuration too
        return f"{type(self).__name__}({self.config.env if self.config else ''})"

    def _open(self) -> Run:
        if self._run is None:
            raise RunError("this algorithm was stopped", mend="build another, or GRPO.from_checkpoint(path)")
        return self._run

    # -- training ----------------------------------------------------------------------------------

    def training_step(self) -> None:
        """One step further, whatever learner ranks die on the way.

        Raises:
            StatesetError: what went wrong.
            RunError: all steps of `train.steps` are taken.
        """
        run = self._open()
        if run.step >= run.config.train.steps:
            raise RunError(
                "the run has come to its end", given=f"train.steps = {run.config.train.steps}",
                mend="set training(train={'steps': ...}) higher, or not at all",
            )  # fmt: skip

        def take_step(run: Run, step: int) -> Mapping[str, float]:
            update = self._take_step(run, step)
            log_played(self.metrics, self._reports)
            self._tell_of_episodes()
            return update

        advance(run, take_step, before=warm_start)
        log_step(self.metrics, self._record, self._turns_trained)

    def step(self) -> dict[str, Any]:
        results: dict[str, Any] = super().step()
        run = self._open()
        if run.step >= run.config.train.steps:
            results[DONE] = True
            run.finish()
        return results

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Play the held-out tasks with the weights as they are now.

        Raises:
            ConfigError: evaluation_duration is 0.
            RunError: not one conversation could be scored.
        """
        run = self._open()
        self._call("on_evaluate_start")
        result = run.evaluate(f"step_{run.step}")
        if result is None:
            raise ConfigError(
                "there is nothing to evaluate", given="evaluation_duration = 0", mend="set it to 1 or more"
            )
        results = evaluated(result)
        self._call("on_evaluate_end", evaluation_metrics=results)
        return results

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """Nothing: the pool of workers restarts its own."""
        return []

    # -- checkpoints -------------------------------------------------------------------------------

    def save_to_path(
        self, path: Any = None, *, state: Any = None, filesystem: Any = None, use_msgpack: bool = False
    ) -> str:
        """Write a checkpoint of RLlib with one of ours in it; returns its path.

        Raises:
            CheckpointError: it could not be written.
        """
        run = self._open()
        filesystem, place = _resolved(path or tempfile.mkdtemp(prefix="grpo-"), filesystem)
        ours = run.save_if_new() or run.save()
        filesystem.create_dir(place, recursive=True)
        filesystem.delete_dir_contents(f"{place}/{_FOLDER}", missing_dir_ok=True)
        copy_files(
            str(ours.absolute()), f"{place}/{_FOLDER}/{ours.name}",
            source_filesystem=LocalFileSystem(), destination_filesystem=filesystem,
        )  # fmt: skip
        written: str = super().save_to_path(
            place, state=state, filesystem=filesystem, use_msgpack=use_msgpack
        )
        return written

    def restore_from_path(
        self, path: Any, *args: Any, component: str | None = None, filesystem: Any = None, **kwargs: Any
    ) -> None:
        """Go on from a checkpoint, in the place of what this algorithm has done.

        Raises:
            CheckpointError: there is none of ours, or it is damaged.
            ConfigError: a component alone was asked for.
        """
        if component is not None:
            raise ConfigError("a checkpoint of GRPO is restored as a whole", given=component)
        run = self._open()
        filesystem, place = _resolved(path, filesystem)
        with tempfile.TemporaryDirectory(prefix="grpo-") as scratch:
            folder = Path(place) / _FOLDER
            if not isinstance(filesystem, LocalFileSystem):
                folder = Path(scratch)
                copy_files(f"{place}/{_FOLDER}", scratch, source_filesystem=filesystem)
            found = sorted(folder.glob("step-*"))
            if len(found) != 1:
                raise CheckpointError("this is no checkpoint of GRPO", given=str(path))
            adopt(run, found[0])
        Checkpointable.restore_from_path(self, place, filesystem=filesystem)

    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"metrics_logger": self.metrics.get_state(), TRAINING_ITERATION: self.training_iteration}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.metrics.set_state(state["metrics_logger"])
        self._iteration = state[TRAINING_ITERATION]

    def get_checkpointable_components(self) -> list[Any]:
        return []

    def cleanup(self) -> None:
        """End every actor, and the cluster if this started it."""
        if getattr(self, "_run", None) is not None:
            self._run = None
            self._opened.close()

    # -- what a step has played --------------------------------------------------------------------

    def _on_event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            self._record = event
        elif event["event"] == "warning":
            _logger.warning("%s: %s", event["text"], event["mend"])

    def _look(self, collected: Collected, batch: Batch) -> None:
        """Note what a step has played, with the conversations themselves if a callback wants them."""
        self._reports = [handle.report for handle in collected.groups]
        learned = {
            (id(ref.payload), ref.size.trajectory): len(ref.advantages)
            for update in batch.updates
            for ref in update.samples
        }
        self._turns_trained = sum(learned.values())
        self._finished = []
        if self._wants_episodes():
            refs = [handle.payload for handle in collected.groups]
            limit = self._open().config.cluster.wait_seconds
            payloads: list[GroupPayload] = get(refs, timeout=limit, waiting_for="conversations for callbacks")
            played = [t for payload in payloads for t in payload.group.trajectories]
            self._finished = [t for t in played if not t.stop_reason.failed]

    def _wants_episodes(self) -> bool:
        return any(
            getattr(self.config, f"callbacks_{name}")
            or any(getattr(type(c), name) is not getattr(RLlibCallback, name) for c in self.callbacks)
            for name in ("on_episode_end", "on_sample_end")
        )

    def _tell_of_episodes(self) -> None:
        """The callbacks that RLlib makes in its workers are made here, once a step is over."""
        if not self._finished:
            return
        episodes = [episode_of(trajectory) for trajectory in self._finished]
        self._finished = []
        nobody = {"env_runner": None, "metrics_logger": self.metrics}
        for episode in episodes:
            given = {**nobody, "episode": episode, "env": None, "env_index": 0, "rl_module": None}
            self._call_with("on_episode_end", given)
        self._call_with("on_sample_end", {**nobody, "samples": episodes})

    def _call(self, name: str, **facts: Any) -> None:
        self._call_with(name, {"algorithm": self, "metrics_logger": self.metrics, **facts})

    def _call_with(self, name: str, given: Mapping[str, Any]) -> None:
        functions = getattr(self.config, f"callbacks_{name}")
        make_callback(name, callbacks_objects=self.callbacks, callbacks_functions=functions, kwargs=given)


def _resolved(path: Any, filesystem: Any) -> tuple[Any, str]:
    """The file system and the path in it that a path or an address means."""
    place = str(path)
    if filesystem is not None:
        return filesystem, place
    resolved: tuple[Any, str] = FileSystem.from_uri(place if "://" in place else str(Path(place).absolute()))
    return resolved


_NOWHERE = (
    "add_module", "add_policy", "compute_actions", "compute_single_action", "evaluate_offline",
    "export_policy_checkpoint", "export_policy_model", "get_module", "get_policy", "get_weights",
    "remove_module", "remove_policy", "set_weights",
)  # fmt: skip
"""Methods of RLlib that reach for modules and policies, of which there are none here."""


def _without(name: str) -> Any:
    def method(self: GRPO, *args: Any, **kwargs: Any) -> Any:
        raise RunError(
            f"GRPO has no {name}(): the model lives in its learner and its engines",
            mend="save_to_path(), and load the folder stateset/step-* of it with transformers, or serve it",
        )

    method.__name__ = name
    return method


for _name in _NOWHERE:
    setattr(GRPO, _name, _without(_name))
