"""Going on from a checkpoint that lies elsewhere, in the place of what a run has done."""

from __future__ import annotations

import shutil
from pathlib import Path

from stateset_ray import checkpoint
from stateset_ray.actors.run import Run
from stateset_ray.errors import CheckpointError, ClusterError
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
        CheckpointError: it is not whole, is of another model or learner, or cannot be copied; the run is as
            it was, and so is its mirror.
        StatesetError: the ranks could not be built or load it; it is in the run's folder by then, but the
            mirror is as it was.
    """
    found = checkpoint.verify(path)
    _check_fits(run, found.path)

    def copy(folder: Path) -> None:
        for part in found.path.iterdir():
            if part.is_dir():
                shutil.copytree(part, folder / part.name)
            elif part.name != MANIFEST:
                shutil.copy2(part, folder / part.name)

    keep = run.config.train.keep_checkpoints
    path = checkpoint.save(run.folder / "checkpoints", found.step, copy, meta=found.meta, keep=keep)
    if not run.learners.fresh:
        _build_anew(run)
    run.rewinds += 1
    run.restore()
    run.keeper.adopted(path)
    run.publish(run.version)


def _check_fits(run: Run, path: Path) -> None:
    """Ask the run's ranks whether such ranks can load a checkpoint, before anything is written.

    Raises:
        CheckpointError: they cannot.
    """
    try:
        return run.learners.check(path)
    except ClusterError:  # they died: new ones know it too
        _build_anew(run)
    try:
        run.learners.check(path)
    except CheckpointError:
        run.learners.end()  # as they were: the run's next use of them goes back to its own checkpoint
        raise


def _build_anew(run: Run) -> None:
    run.between = False  # interrupted from here on, the run saves nothing
    run.learners.end()
    run.learners.start()
