"""An Algorithm of RLlib over the same step: `GRPOConfig().environment(...).build_algo().train()`.

Importing this registers it with Ray Tune as `StatesetGRPO` and as `GRPO`. RLlib is a face here and nothing
more: conversations are played, learned from and saved by the same actors as without it, so that the same seed
gives the same weights.
"""

from ray.rllib.algorithms.registry import ALGORITHMS
from ray.tune import register_trainable

from stateset_ray.rllib.algorithm import GRPO
from stateset_ray.rllib.configuration import NAMES, GRPOConfig

__all__ = ["GRPO", "GRPOConfig"]

GRPOConfig.builds = GRPO

for _name in NAMES:
    register_trainable(_name, GRPO)
    # What Tune registers is forgotten with a cluster; what RLlib lists is registered with each.
    ALGORITHMS.setdefault(_name, lambda: (GRPO, GRPO.get_default_config()))
