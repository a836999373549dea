"""What a saved engine state is of, written beside it, and compared before anything reads it.

The libraries that read such states fail late and darkly, or go on with half of one: what does not fit is
found here, with words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stateset_ray.errors import CheckpointError

__all__ = ["Layout", "digest"]

_FILE = "layout.json"


@dataclass(frozen=True, slots=True)
class Layout:
    """Who wrote a state.

    Attributes:
        engine: "deepspeed" or "torch".
        zero_stage: 0 where nothing is divided.
        dtype: of the weights, "float32".
        model: digest of the names and shapes of all parameters, and of which are trained.
        ranks: that wrote it; may be another number than reads it.
    """

    engine: str
    zero_stage: int
    dtype: str
    model: str
    ranks: int

    def write(self, target: Path) -> None:
        """Put it into the folder of a state; raises OSError."""
        (target / _FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    def check(self, target: Path) -> Layout:
        """The layout of the state in a folder, which this engine can read.

        Raises:
            CheckpointError: there is none, or it is of another engine, stage, dtype or model.
        """
        try:
            saved = Layout(**json.loads((target / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                "there is no complete engine state here", given=str(target), mend="choose another checkpoint"
            ) from error
        settings: dict[str, tuple[object, object]] = {
            "learner.engine": (saved.engine, self.engine),
            "model.dtype": (saved.dtype, self.dtype),
        }
        if saved.engine == self.engine:  # stages of other engines mean nothing to this one
            settings["learner.zero_stage"] = (saved.zero_stage, self.zero_stage)
        other = {name: pair for name, pair in settings.items() if pair[0] != pair[1]}
        if other:
            theirs = ", ".join(f"{name} = {pair[0]!r}" for name, pair in other.items())
            ours = ", ".join(f"{name} = {pair[1]!r}" for name, pair in other.items())
            raise CheckpointError(
                f"the engine state was written with {theirs}, this learner has {ours}",
                given=str(target),
                mend=f"set {theirs}, or start a new run with model.name = the checkpoint's model folder",
            )
        if saved.model != self.model:
            raise CheckpointError(
                "the engine state is of another model: other parameters, other shapes, or others are trained",
                given=str(target),
                mend="set model.name, learner.lora and learner.freeze as they were, or start a new run with "
                "model.name = the checkpoint's model folder",
            )
        return saved


def digest(parameters: Mapping[str, Any]) -> str:
    """A short name for a description of all parameters.

    Example:
        >>> digest({"w": [[2, 3], True]}) == digest({"w": [[2, 3], False]})
        False
    """
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]
