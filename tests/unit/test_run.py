"""What a run saves when it is interrupted: steps, never parts of one. Without Ray: nothing is played."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stateset_ray import checkpoint
from stateset_ray.actors.credit import Batch
from stateset_ray.actors.flight import Collected
from stateset_ray.actors.jobs import Counts
from stateset_ray.actors.learner_rank import UpdateBatch
from stateset_ray.actors.publishing.folder import check_run_folder, write_probe
from stateset_ray.actors.run import Run
from stateset_ray.config import load_config
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import ClusterError, LearnerLost
from stateset_ray.metrics import MemoryMeter

APPLIED = {"applied": 1.0, "loss": 0.5, "tokens_unshared": 8.0}
BATCH = Batch([UpdateBatch([], 1.0)], Counts(), {})


class Learners:
    """Ranks that are told to be interrupted."""

    restarts = 0

    def __init__(self) -> None:
        self.weights = 0
        self.interrupted = False

    def update(self, *_: Any) -> dict[str, float]:
        self.weights += 1
        if self.interrupted:  # a signal arrives when some ranks have applied their step
            raise KeyboardInterrupt
        return APPLIED

    def publish(self, version: int, restarts: int) -> str:
        return f"weights {version}"

    def secure(self, *_: Any) -> tuple[()]:
        return ()  # nothing that was played is lost

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text(str(self.weights))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = load_config(None, ["train.steps=9", "train.checkpoint_every=100", "evaluate.tasks=0"])
    pool: Any = SimpleNamespace(weights=None, capacity=1)
    learners: Any = Learners()
    return Run(config, tmp_path, Echo(), pool, learners, MemoryMeter(), lambda _: None)


def one_step(run: Run) -> None:
    """`train.train_step` with groups that nobody played."""
    update = run.update(BATCH, run.step)
    run.publish(run.version + 1)
    run.after(Collected([], Counts(), 0), BATCH, update, {"rollout": 1.0, "learner": 1.0})


def saved(run: Run) -> tuple[int, str] | None:
    found = checkpoint.latest(run.folder / "checkpoints")
    return None if found is None else (found.step, (found.path / "weights").read_text())


def test_an_interruption_between_two_steps_saves_what_was_done(run: Run) -> None:
    one_step(run)
    one_step(run)
    assert run.save_if_new() == run.folder / "checkpoints" / "step-00000002"
    assert saved(run) == (2, "2")


@pytest.mark.parametrize("before", [True, False], ids=["with an earlier checkpoint", "without one"])
def test_an_interruption_in_the_middle_of_an_update_saves_no_half_step(run: Run, before: bool) -> None:
    one_step(run)
    earlier = run.save() if before else None
    one_step(run)  # done, but not saved: it is lost, too, because the weights have gone on
    run.learners.interrupted = True  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        one_step(run)
    assert run.save_if_new() == earlier
    assert saved(run) == ((1, "1") if before else None)


def test_an_interruption_between_update_and_publication_saves_no_half_step(run: Run) -> None:
    one_step(run)
    run.update(BATCH, run.step)
    assert run.save_if_new() is None
    assert saved(run) is None


def test_after_a_step_that_was_cut_short_the_run_can_save_again(run: Run) -> None:
    one_step(run)
    run.save()
    run.update(BATCH, run.step)
    run.learners.load = lambda path: None  # type: ignore[method-assign]
    run.restore()
    one_step(run)
    assert run.save_if_new() == run.folder / "checkpoints" / "step-00000002"


def test_a_run_folder_that_the_learner_does_not_share_ends_the_run_at_its_start(tmp_path: Path) -> None:
    """Rather than at its first checkpoint. A rank on another node may write to a disk of its own."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    check_run_folder(SimpleNamespace(write_probe=write_probe), here)
    assert list(here.iterdir()) == []  # nothing of the check stays
    elsewhere = SimpleNamespace(write_probe=lambda root: write_probe(str(there)))
    with pytest.raises(ClusterError, match=r"what the learner writes on .* is not seen on") as caught:
        check_run_folder(elsewhere, here, seconds=0.1)
    assert "run.dir" in caught.value.given
    # A network file system may show it late.
    write_probe(str(here))
    late = Path(here / ".probe").read_text()
    threading.Timer(0.3, lambda: (here / ".probe").write_text(late)).start()
    (here / ".probe").unlink()
    check_run_folder(SimpleNamespace(write_probe=lambda root: (late, "node")), here, seconds=20)


def test_a_learner_that_dies_again_while_it_is_recovered_costs_one_restart_more(run: Run) -> None:
    learners: Any = run.learners
    left = [LearnerLost("rank 1 died while it was built")]

    def rebuild() -> None:
        learners.restarts += 1
        if left:
            raise left.pop()

    learners.rebuild, learners.load = rebuild, lambda path: None
    run.config = run.config.with_overrides(["learner.restarts=2"])
    run.recover(LearnerLost("rank 0 died"))
    assert learners.restarts == 2
    assert run.pool.weights == "weights 0"
    with pytest.raises(LearnerLost, match="a third time"):
        run.recover(LearnerLost("rank 0 died a third time"))
