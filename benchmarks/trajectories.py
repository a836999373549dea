"""The work of the learner's benchmark: trajectories that no one played, of random ids and of known shape.

| stretch of a trajectory | tokens                      | here (512 tokens, prompt share 1/2) |
|-------------------------|-----------------------------|-------------------------------------|
| prompt of its group     | `prompt_share` of all       | 256                                 |
| sampled                 | 5/16 of the rest            | 80                                  |
| what the partner said   | what is left                | 96                                  |
| sampled                 | 5/16 of the rest            | 80                                  |

All have the same length, so that a side that pads has nothing to pad.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stateset_ray.learner.batch import Item, MiniBatch, plan
from stateset_ray.types import Sample

__all__ = ["Shape", "ids_and_masks", "minibatch"]


@dataclass(frozen=True)
class Shape:
    """How many trajectories there are, and how they are made up."""

    groups: int = 4
    group_size: int = 8
    tokens: int = 512
    prompt_share: float = 0.5

    @property
    def prompt(self) -> int:
        """Tokens that the trajectories of a group begin with alike."""
        return round(self.tokens * self.prompt_share)

    @property
    def sampled(self) -> int:
        """Sampled tokens of one trajectory."""
        return 2 * max(1, round((self.tokens - self.prompt) * 5 / 16))

    @property
    def trajectories(self) -> int:
        """Trajectories of the step."""
        return self.groups * self.group_size

    @property
    def all_tokens(self) -> int:
        """Tokens of the step's trajectories, each counted whole: what both sides are measured by."""
        return self.trajectories * self.tokens

    def facts(self) -> dict[str, float]:
        """For the report."""
        return {
            "groups": self.groups,
            "group_size": self.group_size,
            "tokens_per_trajectory": self.tokens,
            "trajectory_tokens": self.all_tokens,
            "prompt_share": round(self.prompt / self.tokens, 3),
            "sampled_share": round(self.sampled / self.tokens, 3),
            "sampled_tokens": self.sampled * self.trajectories,
        }


def ids_and_masks(shape: Shape, vocabulary: int, seed: int) -> list[Sample]:
    """The rows of a step, group after group.

    What was captured "when they were sampled" is about what a model that knows nothing gives to any token;
    advantages have mean 0.
    """
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape.tokens, dtype=bool)
    half = shape.sampled // 2
    mask[shape.prompt : shape.prompt + half] = mask[-half:] = True
    rows = []
    for _ in range(shape.groups):
        prompt = rng.integers(3, vocabulary, shape.prompt)
        for index in range(shape.group_size):
            ids = np.concatenate([prompt, rng.integers(3, vocabulary, shape.tokens - shape.prompt)])
            logprobs = -math.log(vocabulary) + 0.3 * rng.normal(size=shape.tokens)
            advantages = np.full(shape.tokens, 1.0 if index % 2 else -1.0)
            rows.append(
                Sample(
                    ids.astype(np.int32),
                    mask,
                    np.where(mask, logprobs, 0).astype(np.float32),
                    np.where(mask, advantages, 0).astype(np.float32),
                    np.where(mask, 0, -1).astype(np.int32),
                    np.where(mask, 0, -1).astype(np.int32),
                )
            )
    return rows


def minibatch(shape: Shape, rows: list[Sample], budget: int, share: bool) -> MiniBatch:
    """The rows as one rank's optimizer step, planned as the controller plans it."""
    prefix = shape.prompt if share else 0
    groups = [index // shape.group_size if share else index for index in range(len(rows))]
    items = [Item(len(row), group, prefix) for row, group in zip(rows, groups, strict=True)]
    [micro_batches] = plan(items, 1, budget)
    return MiniBatch(
        [[rows[i] for i in one] for one in micro_batches],
        [[groups[i] for i in one] for one in micro_batches],
        float(shape.sampled * shape.trajectories),
    )
