"""What a run saves when it is interrupted: steps, never parts of one. Without Ray: nothing is played."""

import json
import shutil
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
from stateset_ray.actors.run import Run, open_run
from stateset_ray.actors.run_folder import check_room_for, discard_empty, open_folder
from stateset_ray.config import Config, load_config
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import CheckpointError, ClusterError, LearnerLost, RunError
from stateset_ray.metrics import JsonLines, MemoryMeter

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


@pytest.mark.parametrize("died", ["rebuild", "load"])
def test_an_interruption_while_ranks_are_rebuilt_saves_nothing(run: Run, died: str) -> None:
    """The new ranks hold the initial weights, or those of the last checkpoint: not those of the step."""
    one_step(run)
    earlier = run.save()
    one_step(run)
    learners: Any = run.learners

    def interrupted(*_: Any) -> None:
        learners.weights = 0
        raise KeyboardInterrupt

    learners.rebuild = learners.load = lambda *_: None
    setattr(learners, died, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.recover(LearnerLost("rank 0 died"))
    assert run.save_if_new() == earlier
    with pytest.raises(CheckpointError, match="cut short"):  # what a driver asks that holds the loop itself
        run.save()
    assert saved(run) == (1, "1")


def noted(run: Run) -> list[int]:
    return [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def damage(run: Run) -> None:
    for folder in (run.folder / "checkpoints").glob("step-*"):
        (folder / "weights").write_text("other weights")


def test_a_run_whose_checkpoints_are_all_damaged_goes_on_from_nowhere(run: Run) -> None:
    """Rather than from the start, which would strike out what it has done."""
    one_step(run)
    run.save()
    one_step(run)
    damage(run)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints here is whole"):
        run.restore()
    learners: Any = run.learners
    learners.rebuild = lambda: None
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints here is whole"):
        run.recover(LearnerLost("rank 0 died"))
    assert noted(run) == [0, 1]
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(CheckpointError, match="none of them is here"):
        run.restore()
    assert noted(run) == [0, 1]


def test_a_run_that_has_saved_nothing_begins_anew_with_the_configured_kl(run: Run) -> None:
    run.config = run.config.with_overrides(["grpo.kl_coef=0.1", "grpo.kl_target=0.01"])
    run.kl_coef = 0.7
    one_step(run)
    run.restore()
    assert (run.step, run.kl_coef, noted(run)) == (0, 0.1, [])


def stored(tmp_path: Path, *more: str) -> Config:
    """A run of three steps, one checkpoint of two files each."""
    config = load_config(None, [f'run.dir="{tmp_path}"', "run.name=demo", "train.checkpoint_every=1", *more])
    config, folder = open_folder(config, resume=False)
    metrics = JsonLines(folder / "metrics.jsonl")
    for step in range(3):
        metrics.append({"step": step})
        checkpoint.save(
            folder / "checkpoints", step + 1, lambda at: (at / "weights").write_text("w") and None,
            meta={}, keep=2,
        )  # fmt: skip
    return config


@pytest.mark.parametrize("lost", ["damaged", "removed"])
def test_a_resume_without_a_whole_checkpoint_touches_nothing(tmp_path: Path, lost: str) -> None:
    config = stored(tmp_path)
    folder = config.run.folder
    for path in (folder / "checkpoints").glob("step-*"):
        (path / "weights").write_text("x")
        if lost == "removed":
            shutil.rmtree(path)
    (folder / "checkpoints" / "latest").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="none of"):
        open_folder(config.with_overrides(["train.steps=99"]), resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_died_before_its_first_checkpoint_is_resumed(tmp_path: Path) -> None:
    config, folder = open_folder(load_config(None, [f'run.dir="{tmp_path}"']), resume=False)
    JsonLines(folder / "metrics.jsonl").append({"step": 0})
    assert open_folder(config, resume=True) == (config, folder)


@pytest.mark.parametrize("where", ["run.dir", "run.name"])
def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "taken").write_text("a file")
    more = (
        [f'run.dir="{tmp_path}/taken"'] if where == "run.dir" else [f'run.dir="{tmp_path}"', "run.name=taken"]
    )
    for check in (open_folder, check_room_for):
        with pytest.raises(RunError) as caught:
            check(load_config(None, more), resume=False)
        assert where in caught.value.mend


def test_a_run_that_never_began_leaves_its_name_free(tmp_path: Path) -> None:
    config, folder = open_folder(load_config(None, [f'run.dir="{tmp_path}/runs"']), resume=False)
    discard_empty(folder)
    assert not folder.exists()
    discard_empty(folder)
    _, folder = open_folder(config, resume=False)
    (folder / "metrics.jsonl").write_text("")
    discard_empty(folder)
    assert (folder / "checkpoints").is_dir() and (folder / "config.toml").is_file()


def test_a_start_that_fails_removes_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ClusterError("Ray did not start")

    monkeypatch.setattr("stateset_ray.actors.run.cluster", refuse)
    config = load_config(None, ["model.name=tiny", f'run.dir="{tmp_path}"', "run.name=demo"])
    with pytest.raises(ClusterError), open_run(config):
        pass
    assert list(tmp_path.iterdir()) == []
