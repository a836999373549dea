"""The smallest example learns, and its control does not."""

from pathlib import Path
from statistics import fmean

import pytest

from stateset_ray.config import load_config
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.toml"


def rise(folder: Path, *overrides: str) -> float:
    """Mean reward of the last five steps minus that of the first five."""
    config = load_config(EXAMPLE, [f'run.dir="{folder}"', "evaluate.tasks=0", *overrides])
    train(config)
    rewards = [record["reward_mean"] for record in JsonLines(config.run.folder / "metrics.jsonl").read()]
    assert len(rewards) == config.train.steps
    return fmean(rewards[-5:]) - fmean(rewards[:5])


