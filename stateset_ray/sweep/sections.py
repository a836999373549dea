"""The `[sweep]` section: how the settings of a space are tried."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from stateset_ray.sections import Section

__all__ = ["AshaConfig", "PbtConfig", "SweepConfig"]


class AshaConfig(Section):
    """Successive halving, asynchronously: trials that lag behind at certain steps are ended there."""

    grace: int = Field(default=2, ge=1)
    """Steps that every trial may take."""
    reduction: float = Field(default=3.0, gt=1)
    """One in so many goes on past each of the steps grace, grace * reduction, ..."""


class PbtConfig(Section):
    """Population-based training: trials that lag behind take over the weights of good ones, and vary them."""

    interval: int = Field(default=4, ge=1)
    """Steps between two comparisons."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """The last share of the population takes over from the first."""
    resample: float = Field(default=0.25, ge=0, le=1)
    """How often a value is drawn anew instead of nudged."""
    factors: tuple[float, ...] = (0.8, 1.25)
    """Numbers are nudged by one of these."""
    synchronous: bool = False
    """All trials wait for each other at every comparison."""

    @field_validator("factors")
    @classmethod
    def _positive(cls, factors: tuple[float, ...]) -> tuple[float, ...]:
        if not factors or not all(f > 0 and f != 1 for f in factors):
            raise ValueError("factors must be positive and not 1, for example [0.8, 1.25]")
        return factors


class SweepConfig(Section):
    """How the settings of a space are tried."""

    metric: str = ""
    """What is compared: `heldout_reward`, `reward_mean`, or a number of metrics.jsonl by its dotted name;
    empty: the held-out reward where one is known when trials are compared, else the mean reward."""
    mode: Literal["max", "min"] = "max"
    samples: int = Field(default=8, ge=1)
    """Draws for each point of the grid; of a searcher: trials in all."""
    searcher: Literal["random", "optuna"] = "random"
    scheduler: Literal["fifo", "asha", "pbt"] = "fifo"
    """Every trial to its end; or ends some early; or lets some take over from others."""
    max_concurrent: int = Field(default=0, ge=0)
    """Trials at a time; 0: as many as there is room for."""
    failures: int = Field(default=2, ge=0)
    """How often a trial that failed is continued from its last checkpoint."""
    trial_cpus: float = Field(default=1.0, ge=0)
    """Room of a trial's own controller, beside what `[cluster]` gives its workers, engines and ranks."""
    seed: int = Field(default=0, ge=0)
    asha: AshaConfig = AshaConfig()
    pbt: PbtConfig = PbtConfig()
