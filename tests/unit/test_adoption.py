"""Going on from a checkpoint of elsewhere, without Ray: nothing is lost to one that does not fit."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stateset_ray import checkpoint
from stateset_ray.actors.adoption import adopt
from stateset_ray.actors.learner_group import LearnerGroup
from stateset_ray.actors.run import Run
from stateset_ray.config import load_config
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import CheckpointError, ClusterError
from stateset_ray.metrics import MemoryMeter

OTHER = CheckpointError("the engine state was written with learner.zero_stage = 2")
DEAD = ClusterError("an actor died")


class Learners:
    """Ranks that note what is asked of them, and answer with what they are given."""

    restarts = 0
    fresh = False

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, list[BaseException | None]] = {}
        self.publish = self.secure = lambda *_: ()
        for name in ("check", "end", "start", "load"):
            setattr(self, name, self._answering(name))

    def _answering(self, name: str) -> Callable[..., None]:
        def answer(*_: Any) -> None:
            self.asked.append(name)
            if (left := self.answers.get(name)) and (error := left.pop(0)):
                raise error

        return answer

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("its own")


class Adopting:
    """A run that has saved its step 1, and a checkpoint of elsewhere, of step 3."""

    def __init__(self, folder: Path) -> None:
        config = load_config(None, ["evaluate.tasks=0"])
        pool: Any = SimpleNamespace(weights=None, capacity=1)
        self.learners = Learners()
        learners: Any = self.learners
        self.run = Run(config, folder / "run", Echo(), pool, learners, MemoryMeter(), lambda _: None)
        self.run.folder.mkdir()
        self.run.step = 1
        self.run.save()
        self.mirrored: list[str] = []
        self.run.keeper.adopted = lambda path: self.mirrored.append(path.name)  # type: ignore[method-assign]
        meta = {"version": 3, "results": {}, "seconds": 0.0, "ranks": 1, **self.run._tasks.state()}
        self.path = checkpoint.save(
            folder / "elsewhere", 3, lambda at: (at / "weights").write_text("others") and None,
            meta=meta, keep=1,
        )  # fmt: skip

    @property
    def newest(self) -> str:
        found = checkpoint.latest(self.run.folder / "checkpoints")
        assert found is not None
        return (found.path / "weights").read_text()


@pytest.fixture
def adopting(tmp_path: Path) -> Adopting:
    return Adopting(tmp_path)


def test_a_checkpoint_that_fits_takes_the_place_of_what_was_done(adopting: Adopting) -> None:
    adopt(adopting.run, adopting.path)
    assert adopting.learners.asked == ["check", "end", "start", "load"]
    assert (adopting.run.step, adopting.run.rewinds, adopting.run.between) == (3, 1, True)
    assert (adopting.newest, adopting.mirrored) == ("others", ["step-00000003"])


def test_a_checkpoint_of_another_learner_changes_nothing(adopting: Adopting) -> None:
    adopting.learners.answers["check"] = [OTHER]
    with pytest.raises(CheckpointError, match="zero_stage"):
        adopt(adopting.run, adopting.path)
    assert adopting.learners.asked == ["check"]  # the ranks, and with them the weights, are as they were
    assert (adopting.run.step, adopting.run.between, adopting.newest) == (1, True, "its own")
    assert not adopting.mirrored


def test_ranks_that_are_dead_are_built_anew_before_anything_is_written(adopting: Adopting) -> None:
    adopting.learners.answers["check"] = [DEAD, OTHER]
    with pytest.raises(CheckpointError, match="zero_stage"):
        adopt(adopting.run, adopting.path)
    # Ended: else the run would go on with new ranks that know nothing.
    assert adopting.learners.asked == ["check", "end", "start", "check", "end"]
    assert adopting.newest == "its own"
    adopting.learners.answers["check"] = [DEAD]
    adopt(adopting.run, adopting.path)
    assert (adopting.run.step, adopting.newest) == (3, "others")


def test_a_mirror_keeps_what_it_has_until_the_checkpoint_is_loaded(adopting: Adopting) -> None:
    adopting.learners.answers["load"] = [CheckpointError("the engine state cannot be read")]
    with pytest.raises(CheckpointError, match="cannot be read"):
        adopt(adopting.run, adopting.path)
    assert not adopting.mirrored


@pytest.mark.parametrize("call", ["end", "start", "load"])
def test_an_interruption_meanwhile_saves_nothing(adopting: Adopting, call: str) -> None:
    adopting.run.step = 2  # done, and not saved
    adopting.learners.answers[call] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        adopt(adopting.run, adopting.path)
    saved = adopting.run.save_if_new()
    assert saved is not None and saved.name == "step-00000003"  # what was adopted


def test_one_rank_is_asked_and_none_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def get(answer: Any, **_: Any) -> None:
        asked.append(answer)
        raise OTHER

    monkeypatch.setattr("stateset_ray.actors.learner_group.get", get)
    group = LearnerGroup(load_config(), lambda rank: None)
    group._ranks = [SimpleNamespace(check=SimpleNamespace(remote=lambda folder: folder))]
    with pytest.raises(CheckpointError):
        group.check(tmp_path)
    assert asked == [str(tmp_path)]
