"""An RLlib user's environment: gymnasium, text spaces, one mapping for its constructor."""

from __future__ import annotations

import string
from typing import Any

import gymnasium
from gymnasium.spaces import Text

__all__ = ["Letters"]

_TEXT = Text(min_length=0, max_length=64, charset=string.printable)


class Letters(gymnasium.Env):
    """Say a letter; the later in the alphabet, the better. Two rounds, then it truncates."""

    observation_space = action_space = _TEXT

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self._rounds = (config or {}).get("rounds", 2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._left = self._rounds
        return str(self.np_random.choice(list("abc"))), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        reward = (ord(action[0]) - 97) / 26 if action else -1.0
        return "again", max(-1.0, min(1.0, reward)), False, self._left == 0, {"left": self._left}
