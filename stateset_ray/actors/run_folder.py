"""The folder of a run, and whether a run may continue in it.

runs/<name>/
  config.toml          the resolved configuration
  metrics.jsonl        one object per step
  trajectories.jsonl   sampled conversations, token by token
  checkpoints/         see stateset_ray.checkpoint
  summary.json         written at the end
"""

from __future__ import annotations

from pathlib import Path

from stateset_ray.config import Config, load_config
from stateset_ray.errors import ConfigError, RunError
from stateset_ray.settings import leaves

__all__ = ["open_folder"]

_MAY_CHANGE = (
    "run.name", "run.dir", "run.log_trajectories", "train.steps", "train.checkpoint_every",
    "train.keep_checkpoints", "train.evaluate_every", "rollout.workers", "rollout.max_workers",
    "rollout.engines", "rollout.retries", "rollout.heartbeat_timeout", "rollout.sleep",
    "learner.timeout", "learner.ranks", "learner.restarts", "learner.micro_batch_tokens",
    "learner.logit_chunk", "learner.share_prefix", "learner.gradient_checkpointing", "learner.attention",
    "model.threads",
)  # fmt: skip
_MAY_CHANGE_SECTIONS = ("cluster.", "evaluate.", "publish.")


def open_folder(config: Config, *, resume: bool) -> tuple[Config, Path]:
    """Make or find the folder of a run and write the resolved configuration into it.

    Args:
        resume: the run exists. A new run whose name is taken gets a number.

    Returns:
        The configuration, with the name that the run really has, and the folder.

    Raises:
        RunError: nothing to resume, or the folder cannot be written.
        ConfigError: this is not the configuration that the run began with.
    """
    folder = config.run.folder
    if resume:
        stored = folder / "config.toml"
        if not stored.is_file():
            raise RunError(
                "there is no run of this name to resume", given=str(folder),
                mend="check run.name and run.dir, or start without --resume",
            )  # fmt: skip
        _check_same(load_config(stored), config)
    else:
        number = 1
        while folder.exists() and any(folder.iterdir()):
            number += 1
            folder = config.run.dir / f"{config.run.name}-{number}"
        config = config.with_overrides([f'run.name="{folder.name}"'])
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"the run folder cannot be written: {error.strerror}", given=str(folder),
            mend="set run.dir to a folder you may write to",
        ) from error  # fmt: skip
    return config, folder


def _check_same(stored: Config, given: Config) -> None:
    """An exact continuation needs the same run: refuse what would silently make it another one."""
    old, new = dict(leaves(stored.model_dump(mode="json"))), dict(leaves(given.model_dump(mode="json")))
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in _MAY_CHANGE
        and not key.startswith(_MAY_CHANGE_SECTIONS)
    ]
    if given.train.steps != stored.train.steps and stored.learner.schedule != "constant":
        changed.append("train.steps, on which the learning-rate schedule depends")
    if changed:
        raise ConfigError(
            "this is not the configuration that the run began with:\n"
            + "\n".join(f"  - {line}" for line in changed),
            mend="resume with the run's own config.toml, or start a new run",
        )
