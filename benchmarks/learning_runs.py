"""One run of the learning benchmark: its settings, and playing it on actors that outlive it.

Starting a rollout worker and a learner rank costs more than all steps of the tiny model. So both stay, and a
run begins by giving the rank a new learner (`Learner.__init__` seeds and loads everything anew) and the
workers the weights of another lineage. All else is `train_step`, on the same `Run` that `train` opens; that
a run on such actors equals one of `train`, digit for digit, is tested in tests/e2e/test_presets.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from benchmarks import machine
from stateset_ray.actors.credit import Batch
from stateset_ray.actors.flight import Collected
from stateset_ray.actors.learner_group import LearnerGroup
from stateset_ray.actors.learner_rank import LearnerRank
from stateset_ray.actors.placement import Placement, cluster, place
from stateset_ray.actors.rollout_pool import RolloutPool, rollout_pool
from stateset_ray.actors.run import Run
from stateset_ray.actors.run_folder import open_folder
from stateset_ray.config import Config, load_config
from stateset_ray.environments.base import build_environment
from stateset_ray.errors import RunError
from stateset_ray.metrics import MemoryMeter
from stateset_ray.models import local_folder
from stateset_ray.objective import PRESETS
from stateset_ray.train import train_step

__all__ = ["ARMS", "SHUFFLED", "Arm", "Kind", "Player", "compared", "digest", "player", "settings"]

Kind = Literal["presets", "credit"]

SHUFFLED = "shuffled"
"""The control: the preset `default`, with the rewards of every group handed out by lot."""

ARMS: Mapping[Kind, tuple[str, ...]] = {
    "presets": (*PRESETS, SHUFFLED),
    "credit": ("outcome", "return_to_go", "turn_plus_outcome"),
}
"""What is compared, by what a command compares."""

_QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"

_COMMON = (
    # Two optimizer steps on what was sampled once: the second is off-policy, so ratios and clips act.
    "train.updates_per_step=2",
    "evaluate.tasks=64", "run.log_trajectories=0", "model.device=cpu",
)  # fmt: skip
# Words of two letters: with three, a perfect reply and its stop token touch the example's limit of 4 tokens a
# turn, and DAPO would fine it for its length.
_ECHO = ("environment.options.length=2",)
_BLAME = (
    "environment.path=stateset_ray.environments.blame:Blame", "environment.options.words=3",
    "environment.options.length=2", "rollout.max_turns=4", "rollout.max_context=256",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One side of a comparison, with one seed.

    Attributes:
        kind: which comparison.
        name: of `ARMS[kind]`.
        seed: of the run.
        learning_rate: constant.
        steps: GRPO steps.
        luck: the share of the reward that is luck, in `blame`.
    """

    kind: Kind
    name: str
    seed: int
    learning_rate: float
    steps: int
    luck: float = 0.25


def settings(arm: Arm) -> Config:
    """The whole configuration of a run; the same for all arms but for what the arm is about."""
    parts = [*_COMMON, f"run.seed={arm.seed}", f"train.steps={arm.steps}"]
    parts.append(f"learner.learning_rate={arm.learning_rate}")
    if arm.kind == "credit":
        parts += [*_BLAME, f"environment.options.luck={arm.luck}", f"grpo.credit={arm.name}"]
    else:
        parts += [*_ECHO, f"grpo.shuffle_rewards={str(arm.name == SHUFFLED).lower()}"]
    base = load_config(_QUICKSTART)
    # The example sets an advantage of its own, which would win over every preset.
    size = base.grpo.group_size
    plain = base.model_copy(update={"grpo": type(base.grpo)(group_size=size)})
    preset = arm.name if arm.kind == "presets" and arm.name != SHUFFLED else "default"
    return plain.with_overrides([f"grpo.preset={preset}", *parts])


def digest(arm: Arm) -> str:
    """What a finished run is recognized by: all that was set, but not where it lay."""
    tree = settings(arm).model_dump(mode="json", exclude_defaults=True)
    tree["run"] = {key: value for key, value in tree["run"].items() if key not in ("dir", "name")}
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()


def compared(kind: Kind, by_turn: Sequence[float]) -> float:
    """The reward that curves are drawn of, from what each turn earned.

    All of it; but of `blame` only what came after the guess: luck is luck under every credit, and would only
    hide what is learned.

    Example:
        >>> compared("presets", [0.5, 0.25]), compared("credit", [0.5, 0.25])
        (0.75, 0.25)
    """
    return math.fsum(by_turn[1:] if kind == "credit" else by_turn)


class _Rank(LearnerRank):
    """A rank that begins again with another run."""

    def renew(self, config: Config) -> None:
        if self._learner is not None:
            self._learner.close()
        self._learner, self._config = None, config


class _Watched(Run):
    """A run that notes what every turn earned."""

    by_turn: list[list[float]]

    def after(
        self, collected: Collected, batch: Batch, update: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        """The mean reward of each turn over the conversations of the step, then as ever."""
        played = [turns[""] for group in collected.groups for turns in group.report.turn_rewards if turns]
        self.by_turn.append([statistics.fmean(turn) for turn in zip(*played, strict=True)])
        super().after(collected, batch, update, seconds)


class Player:
    """Plays runs of one kind, one after the other, on the same actors; made by `player`."""

    def __init__(self, pool: RolloutPool, rank: Any, folder: Path) -> None:
        self._pool, self._rank, self._folder = pool, rank, folder
        self._played = 0

    def play(self, arm: Arm) -> dict[str, Any]:
        """The record of one whole run: its curve, what it reached on held-out tasks, what was clipped."""
        started = time.monotonic()
        config, folder = open_folder(
            settings(arm).with_overrides([f'run.dir="{self._folder}"', f"run.name={arm.name}-{arm.seed}"]),
            resume=False,
        )
        environment = build_environment(config.environment.path, config.environment.options)
        ray.get(self._rank.renew.remote(config), timeout=config.learner.timeout)
        learners = LearnerGroup(config, lambda _: self._rank)
        learners.start()
        # Another lineage: the workers still hold weights of these versions, of the run before.
        self._played += 1
        learners.restarts = self._played
        steps: list[dict[str, Any]] = []

        def note(event: Mapping[str, Any]) -> None:
            if event["event"] == "step":
                steps.append(dict(event))

        stopped = None
        with MemoryMeter() as meter:
            run = _Watched(config, folder, environment, self._pool, learners, meter, note)
            run.by_turn = []
            run.publish(run.version)
            run.evaluate("before")
            try:
                for step in run.steps():
                    train_step(run, step)
            except RunError as error:  # nothing to learn from any more: the policy stays as it is
                stopped = error.problem
            run.evaluate("after")
        return {
            **vars(arm), "digest": digest(arm), "commit": machine.commit(),
            "rewards": [round(compared(arm.kind, turns), 6) for turns in run.by_turn],
            "heldout_before": run.results["heldout_before"], "heldout_after": run.results["heldout_after"],
            "stopped": stopped,
            "entropy": [_rounded(step["entropy"]) for step in steps],
            "grad_norm": [_rounded(step["grad_norm"]) for step in steps],
            "clipped": [_rounded(_clipped(step["update"])) for step in steps],
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip


def _clipped(update: Mapping[str, float]) -> float | None:
    if not update:
        return None
    return update["clip_fraction_low"] + update["clip_fraction_high"]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


@contextmanager
def player(arm: Arm) -> Iterator[Player]:
    """A worker and a learner rank for all runs of the arm's kind; joins this process's Ray, or starts one.

    Args:
        arm: any of the kind; environment and limits are the same for all of them.
    """
    config = settings(arm)
    local_folder(config.model.name)  # built once here, not by every actor at the same time
    log = logging.getLogger("stateset_ray")
    with ExitStack() as stack:
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="learning"))
        stack.enter_context(cluster(config))
        placement: Placement = stack.enter_context(place(config))
        pool = stack.enter_context(rollout_pool(config, placement))
        rank = ray.remote(max_restarts=0)(_Rank).options(**placement.learner(0)).remote(config, 0)
        stack.callback(ray.kill, rank)
        yield Player(pool, rank, Path(folder))
