"""Going on from a checkpoint that lies elsewhere, in the place of what a run has done."""

from __future__ import annotations

import shutil
from pathlib import Path

from stateset_ray import checkpoint
from stateset_ray.actors.run import Run
from stateset_ray.manifest import MANIFEST

__all__ = ["adopt"]


def adopt(run: Run, path: Path) -> None:
    """Make a checkpoint the newest one of an open run, and go on from it.

    Ranks that have learned already are built anew, in their bundles; the rollout workers stay. The weights
    are published under a new lineage, since the run may have had others of the same version. Where the run's
    learner is lost later, this is what it goes back to; the run's mirror loses what is above it.

    Args:
        path: a checkpoint folder, on storage that the learner ranks see too if `run.dir` is.

    Raises:
        CheckpointError: it is not whole, or cannot be copied; the run is as it was.
        LearnerError: the ranks cannot load it, for it is of another model or learner.
    """
    found = checkpoint.verify(path)

    def copy(folder: Path) -> None:
        for part in found.path.iterdir():
            if part.is_dir():
                shutil.copytree(part, folder / part.name)
            elif part.name != MANIFEST:
                shutil.copy2(part, folder / part.name)

    keep = run.config.train.keep_checkpoints
    path = checkpoint.save(run.folder / "checkpoints", found.step, copy, meta=found.meta, keep=keep)
    run.keeper.adopted(path)
    if not run.learners.fresh:
        run.learners.end()
        run.learners.start()
    run.rewinds += 1
    run.restore()
    run.publish(run.version)
