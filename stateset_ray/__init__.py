"""Reinforcement learning for multi-turn conversational agents, on Ray.

`stateset_ray.train` holds the outer loop, `stateset_ray.rollout` the inner one. This module exports the
light nouns only: importing it loads neither torch nor ray.
"""

from stateset_ray.config import Config, load_config
from stateset_ray.environments.base import Environment
from stateset_ray.types import Message, Step, StopReason, Task, Trajectory, TrajectoryGroup, Turn

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Environment",
    "Message",
    "Step",
    "StopReason",
    "Task",
    "Trajectory",
    "TrajectoryGroup",
    "Turn",
    "__version__",
    "load_config",
]
