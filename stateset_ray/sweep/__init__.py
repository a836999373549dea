"""Hyper-parameter sweeps: many runs as trials of Ray Tune.

`plan.read_plan` reads and checks what a sweep is to do, without Ray; `sweep` does it; `trainable` is one run
as a Trainable, for a Tuner of your own. This module itself loads neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateset_ray.errors import ConfigError

if TYPE_CHECKING:
    from stateset_ray.config import Config
    from stateset_ray.sweep.driver import Swept
    from stateset_ray.sweep.plan import Plan

__all__ = ["sweep", "trainable"]


def sweep(
    plan: Plan, *, name: str = "", resume: bool = False,
    on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Swept:  # fmt: skip
    """Run a sweep; see `driver.run_sweep`.

    Raises:
        ConfigError: Ray Tune is not installed.
    """
    _check_installed()
    from stateset_ray.sweep.driver import run_sweep

    return run_sweep(plan, name=name, resume=resume, on_event=on_event)


def trainable(config: Config, *, folder: str | Path = "", trial_cpus: float = 1.0) -> Any:
    """A `ray.tune.Trainable` class whose trials are runs of a configuration.

    Its trials take settings by dotted key, check them like `--set`, ask for one placement group with all
    that their run needs, take one step of the run per step of Tune, and keep checkpoints in the run's folder.

    Args:
        config: what the trials vary.
        folder: of the trials' runs, on storage that all nodes share; by default `trials` in `run.dir`.
        trial_cpus: room of a trial's own process, beside that of its run.

    Raises:
        ConfigError: Ray Tune is not installed.

    Example: `Tuner(trainable(config), param_space={"learner.learning_rate": tune.loguniform(1e-6, 1e-4)})`
    """
    _check_installed()
    from stateset_ray.sweep.trial import trial_class

    return trial_class(config, Path(folder or config.run.dir / "trials"), trial_cpus=trial_cpus)


def _check_installed() -> None:
    missing = [name for name in ("fsspec", "pandas", "pyarrow", "requests") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "Ray Tune is not installed", given=missing, mend="pip install 'stateset-ray[sweep]'"
        )  # fmt: skip
