"""The folder of a run, and whether a run may continue in it.

runs/<name>/
  config.toml          the resolved configuration
  metrics.jsonl        one object per step
  trajectories.jsonl   sampled conversations, token by token
  checkpoints/         see stateset_ray.checkpoint
  summary.json         written at the end

With `run.mirror`, the same lies in shared storage, from where a machine without the folder goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stateset_ray.actors.mirror import bring, claim, mirror_of
from stateset_ray.committed import newest
from stateset_ray.config import Config, load_config
from stateset_ray.errors import ConfigError, RunError
from stateset_ray.manifest import replace_whole
from stateset_ray.metrics import JsonLines
from stateset_ray.settings import leaves

__all__ = ["begun", "check_room_for", "check_same", "discard_empty", "open_folder", "write_config"]

_MAY_CHANGE = (
    "run.name", "run.dir", "run.mirror", "run.log_trajectories", "train.steps", "train.checkpoint_every",
    "train.keep_checkpoints", "train.evaluate_every", "rollout.workers", "rollout.max_workers",
    "rollout.engines", "rollout.retries", "rollout.heartbeat_timeout", "rollout.sleep",
    "learner.timeout", "learner.ranks", "learner.restarts", "learner.micro_batch_tokens",
    "learner.logit_chunk", "learner.share_prefix", "learner.gradient_checkpointing", "learner.attention",
    "model.threads",
)  # fmt: skip
_BEGINNING = "config.toml.tmp-"
_MAY_CHANGE_SECTIONS = ("cluster.", "evaluate.", "publish.")


def begun(config: Config) -> bool:
    """Whether the run of this name has been begun, here or by another machine that sent it to `run.mirror`.

    Raises:
        ConfigError: there is no such kind of storage here.
        CheckpointError: the storage does not answer.
    """
    mirror = mirror_of(config.run)
    return (config.run.folder / "config.toml").is_file() or bool(mirror and mirror.has("config.toml"))


def check_room_for(config: Config, *, resume: bool) -> None:
    """Check what `open_folder` would stumble over, as far as that changes nothing.

    Raises:
        RunError: nothing to resume, or a file or a folder that cannot be written is in the way.
        ConfigError: this is not the configuration that the run began with, or there is no such mirror.
        CheckpointError: the mirror does not answer.
    """
    folder = config.run.folder
    if resume:
        if not begun(config):
            raise _nothing(folder)
        if (folder / "config.toml").is_file():
            check_same(load_config(folder / "config.toml"), config)
        return
    mirror_of(config.run)
    place = folder.absolute()
    _refuse_file(place)
    while not os.path.exists(place):
        place = place.parent
    if not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
        raise RunError(
            "the run folder cannot be written", given=str(folder),
            mend=f"{place} is in the way: set run.dir to a folder you may write to",
        )  # fmt: skip


def discard_empty(folder: Path) -> None:
    """Remove the folder of a run that never began: it would only hold its name."""
    checkpoints = folder / "checkpoints"
    with suppress(OSError):
        if {entry.name for entry in folder.iterdir()} == {"config.toml", "checkpoints"}:
            checkpoints.rmdir()  # only if it is empty
            (folder / "config.toml").unlink()
            folder.rmdir()


def open_folder(config: Config, *, resume: bool) -> tuple[Config, Path]:
    """Make or find the folder of a run and write the resolved configuration into it.

    Args:
        resume: the run exists, here or in its mirror. A new run whose name is taken gets a number.

    Returns:
        The configuration, with the name that the run really has, and the folder.

    Raises:
        RunError: nothing to resume, or the folder cannot be written.
        ConfigError: this is not the configuration that the run began with.
        CheckpointError: the mirror does not answer, or no checkpoint of the run is whole.
    """
    folder = config.run.folder
    if resume:
        bring(config)
        stored = folder / "config.toml"
        if not stored.is_file():
            raise _nothing(folder)
        before = load_config(stored)
        check_same(before, config)
        _check_whole(before, folder)
    try:
        number, name = 1, config.run.name
        while not resume and _taken(config):
            number += 1
            config = config.with_overrides([f"run.name={json.dumps(f'{name}-{number}')}"])
        folder = config.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the run folder cannot be written: {error.strerror}", given=str(folder),
            mend="set run.dir to a folder you may write to",
        ) from error  # fmt: skip
    claim(config.run)
    return config, folder


def _check_whole(before: Config, folder: Path) -> None:
    """Raise the CheckpointError that says so, where a run has saved checkpoints and none is whole."""
    # A step is noted just before its checkpoint is begun: one more step, and that one was written.
    noted = len(JsonLines(folder / "metrics.jsonl").read())
    newest(folder, written=noted > before.train.checkpoint_every)


def _nothing(folder: Path) -> RunError:
    return RunError(
        "there is no run of this name to resume", given=str(folder),
        mend="check run.name and run.dir, or start without --resume",
    )  # fmt: skip


def _refuse_file(folder: Path) -> None:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise RunError(
            "the run's folder cannot be made: there is a file of this name", given=str(folder),
            mend="choose another run.name or run.dir, or move the file",
        )  # fmt: skip


def _taken(config: Config) -> bool:
    folder = config.run.folder
    _refuse_file(folder)
    # What a start leaves that was cut short before its configuration was written is not a run.
    there = folder.exists() and any(not entry.name.startswith(_BEGINNING) for entry in folder.iterdir())
    return there or begun(config)


def write_config(config: Config, folder: Path) -> None:
    """All of it or nothing, since a run whose configuration cannot be read can never be resumed.

    Raises:
        OSError: the disk refuses.
    """
    replace_whole(folder / "config.toml", config.to_toml().encode())


def check_same(stored: Config, given: Config, *, fixed: Sequence[str] = ()) -> None:
    """An exact continuation needs the same run: refuse what would silently make it another one.

    Args:
        fixed: settings, or sections with their dot, that must not change either.

    Raises:
        ConfigError: something else was changed than what may be.
    """
    held = tuple(fixed)
    old, new = dict(leaves(stored.model_dump(mode="json"))), dict(leaves(given.model_dump(mode="json")))
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and (key.startswith(held) or not (key in _MAY_CHANGE or key.startswith(_MAY_CHANGE_SECTIONS)))
    ]
    if given.train.steps != stored.train.steps and stored.learner.schedule != "constant":
        changed.append("train.steps, on which the learning-rate schedule depends")
    if changed:
        raise ConfigError(
            "this is not the configuration that the run began with:\n"
            + "\n".join(f"  - {line}" for line in changed),
            mend="resume with the run's own config.toml, or start a new run",
        )
