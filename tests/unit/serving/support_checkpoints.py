"""Runs with checkpoints of the tiny model, made without training; loaded by `runpy`, also from tests/ray."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from stateset_ray import checkpoint
from stateset_ray.config import load_config
from stateset_ray.models import local_folder


def save(run: Path, step: int, scale: float = 1.0, extra: Mapping[str, bytes] | None = None) -> Path:
    """A checkpoint of the tiny model, its weights multiplied, with further files."""
    from safetensors.torch import load_file, save_file

    def write(folder: Path) -> None:
        shutil.copytree(local_folder("tiny"), folder, dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        save_file({k: v * scale for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        for name, content in (extra or {}).items():
            (folder / name).write_bytes(content)

    meta = {"version": step, "results": {}}
    return checkpoint.save(run / "checkpoints", step, write, meta=meta, keep=9)


def new_run(folder: Path, max_context: int, *more: str) -> Path:
    """A run's folder with one checkpoint; `more` are settings."""
    settings = ["model.name=tiny", "model.threads=1", "model.device=cpu"]
    folder.mkdir()
    config = load_config(None, [*settings, f"rollout.max_context={max_context}", *more])
    (folder / "config.toml").write_text(config.to_toml())
    save(folder, 1)
    return folder
