"""What a checkpoint must be before anybody reads a weight of it."""

from __future__ import annotations

from pathlib import Path

from stateset_ray.config import Config
from stateset_ray.errors import ModelError
from stateset_ray.manifest import verify
from stateset_ray.models import check_fits, config_only
from stateset_ray.serving.source import Candidate

__all__ = ["checked"]

_FOREIGN = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")
_ROOM = 2048  # tokens of context where neither the settings nor a run say how many


def checked(candidate: Candidate, config: Config, max_context: int) -> int:
    """Verify a candidate without loading it: its bytes, its kind, its files, its lengths.

    Args:
        config: of the run.
        max_context: asked for; 0 for the run's.

    Returns:
        The context that it is served with, in tokens.

    Raises:
        CheckpointError: it is not whole, or holds what only code could read.
        StatesetError: its model cannot be driven, or its positions are too few.
    """
    folder = Path(candidate.model)
    if candidate.step >= 0 and not candidate.whole:
        verify(folder)
    if folder.is_dir():
        _check_files(folder)
    room = max_context
    if not room and candidate.step >= 0:
        room = config.rollout.max_context
    if not room:
        positions = getattr(config_only(candidate.model), "max_position_embeddings", None) or _ROOM
        room = min(_ROOM, positions)
    check_fits(
        config.model_copy(
            update={
                "model": config.model.model_copy(update={"name": candidate.model}),
                "rollout": config.rollout.model_copy(update={"max_context": room}),
            }
        )
    )
    return room


def _check_files(folder: Path) -> None:
    """Only safetensors are ever loaded; what lies beside them must not be mistaken for weights or code."""
    files = [entry.name for entry in folder.iterdir() if entry.is_file()]
    if foreign := sorted(name for name in files if name.endswith(_FOREIGN)):
        raise ModelError(
            "this folder holds files that could run code when they are read", given=foreign[:5],
            mend="serve safetensors only: convert the weights and remove these files",
        )  # fmt: skip
    if not any(name.endswith(".safetensors") for name in files):
        raise ModelError("this folder holds no safetensors", given=str(folder), mend="convert the weights")
