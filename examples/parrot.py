"""An environment as RLlib's users write them: gymnasium, with text for observations and actions.

Importing this module registers `Parrot-v0`. It lies in a module of its own, because the workers import it.
"""

from __future__ import annotations

import string
from typing import Any

import gymnasium
from gymnasium.spaces import Text

TEXT = Text(min_length=0, max_length=32, charset=string.printable)


class Parrot(gymnasium.Env[str, str]):
    """Say back the word that you are told, letter by letter, twice.

    Every letter that is right earns, every other costs, the more the further it lies in the alphabet; so do
    letters that are missing or too many. Two perfect replies earn 1.
    """

    observation_space = action_space = TEXT

    def __init__(self, letters: str = "abc") -> None:
        self._letters = letters
        self._word = ""
        self._left = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Draw the first word."""
        super().reset(seed=seed)
        self._left = 2
        return self._draw(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score a reply and draw the next word, or end."""
        word, reply = self._word, action.strip()
        scores = [_score(want, got) for want, got in zip(word, reply, strict=False)]
        missing = max(len(word), len(reply)) - len(scores)
        reward = (sum(scores) - missing) / (len(scores) + missing)
        self._left -= 1
        over = self._left == 0
        return "" if over else self._draw(), reward / 2, over, False, {"right": reply == word}

    def _draw(self) -> str:
        self._word = "".join(self.np_random.permutation(list(self._letters)))
        return self._word


def _score(want: str, got: str) -> float:
    return 1.0 if got == want else -0.5 - min(1.0, abs(ord(got) - ord(want)) / 128) / 2


gymnasium.register("Parrot-v0", entry_point="parrot:Parrot")
