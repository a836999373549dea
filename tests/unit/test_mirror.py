"""A run whose checkpoints are sent to shared storage, and another machine that goes on from there. No Ray."""

from __future__ import annotations

import json
import runpy
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stateset_ray import checkpoint
from stateset_ray.actors.adoption import adopt
from stateset_ray.actors.mirror import Keeper, mirror_of
from stateset_ray.actors.run_folder import begun, open_folder
from stateset_ray.config import Config, load_config
from stateset_ray.errors import CheckpointError, ConfigError, RunError
from stateset_ray.metrics import JsonLines
from stateset_ray.storage import Storage

Failing = runpy.run_path(str(Path(__file__).with_name("support_storage.py")))["Failing"]
Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def mirror() -> str:
    Failing.fail()
    return f"failing://{uuid.uuid4().hex}"


def settings(folder: Path, mirror: str, *more: str) -> Config:
    return load_config(
        None,
        [f'run.dir="{folder}"', "run.name=demo", f'run.mirror="{mirror}"', "train.keep_checkpoints=2", *more],
    )


def trained(config: Config, steps: range, *, resume: bool = False) -> Events:
    """A run without a model: each step is a line and a checkpoint that says which step it is of."""
    events: Events = []
    config, folder = open_folder(config, resume=resume)
    metrics = JsonLines(folder / "metrics.jsonl")
    metrics.rewind(steps.start)
    with Keeper(config, folder, noting(events), mirror_of(config.run)) as keeper:
        for step in steps:
            metrics.append({"step": step})
            keeper.save(
                step + 1, lambda at, n=step: (at / "weights").write_text(str(n + 1)), {"version": step}
            )
        (folder / "summary.json").write_text(json.dumps({"steps": steps.stop}))
    return events


def noting(events: Events) -> Callable[..., None]:
    return lambda event, **facts: events.append((event, facts))


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in JsonLines(folder / "metrics.jsonl").read()]


def test_a_machine_without_the_folder_goes_on_where_the_other_stopped(tmp_path: Path, mirror: str) -> None:
    events = trained(settings(tmp_path / "a", mirror), range(3))
    assert [name for name, _ in events] == ["checkpoint", *["mirrored", "checkpoint"] * 2, "mirrored"]
    there = Storage(f"{mirror}/demo")
    assert [step for step, _ in there.whole()] == [3, 2]  # retention as on the disk
    for name in ("config.toml", "metrics.jsonl", "summary.json"):
        assert there.has(name)
    other = settings(tmp_path / "b", mirror)
    assert begun(other) and not (tmp_path / "b").exists()
    _, folder = open_folder(other, resume=True)
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None and (found.step, (found.path / "weights").read_text()) == (3, "3")
    assert steps_of(folder) == [0, 1, 2]


def test_whichever_is_newer_is_gone_on_from(tmp_path: Path, mirror: str) -> None:
    a, b = settings(tmp_path / "a", mirror), settings(tmp_path / "b", mirror)
    trained(a, range(2))
    trained(b, range(2, 5), resume=True)
    _, folder = open_folder(a, resume=True)  # the first machine is behind by now
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None and found.step == 5
    assert steps_of(folder) == [0, 1, 2, 3, 4]
    for path in Path(folder / "checkpoints").glob("step-00000005"):
        (path / "weights").write_text("damaged")
    open_folder(a, resume=True)  # the mirror's is whole
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None and found.step == 5
    Failing.fail()
    trained(a, range(5, 6), resume=True)
    assert not any("step-00000005" in name for name in Failing.sent)  # it is there already


def test_what_is_newer_here_is_not_overwritten_from_the_mirror(tmp_path: Path, mirror: str) -> None:
    config = settings(tmp_path, mirror)
    trained(config, range(1))
    Failing.fail(after=0, times=10**6)
    with pytest.raises(CheckpointError, match="not in its mirror"):
        trained_offline(config, 1)
    Failing.fail()
    _, folder = open_folder(config, resume=True)
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None and found.step == 2
    assert steps_of(folder) == [0, 1]


def trained_offline(config: Config, step: int) -> Events:
    """One more step of a run that is open already, while its storage fails."""
    events: Events = []
    folder = config.run.folder
    keeper = Keeper(config, folder, noting(events), Storage(f"{config.run.mirror}/demo", pauses=()))
    with keeper:
        JsonLines(folder / "metrics.jsonl").append({"step": step})
        keeper.save(step + 1, lambda at: (at / "weights").write_text("x"), {})
    return events


def test_a_new_run_takes_no_name_that_is_taken_in_the_mirror(tmp_path: Path, mirror: str) -> None:
    trained(settings(tmp_path / "a", mirror), range(1))
    config, folder = open_folder(settings(tmp_path / "b", mirror), resume=False)
    assert (config.run.name, folder) == ("demo-2", tmp_path / "b" / "demo-2")
    config, _ = open_folder(settings(tmp_path / "c", mirror), resume=False)
    assert config.run.name == "demo-3"


def test_a_failed_upload_is_a_warning_and_the_next_one_heals_it(tmp_path: Path, mirror: str) -> None:
    config, folder = open_folder(settings(tmp_path, mirror), resume=False)
    events: Events = []
    keeper = Keeper(config, folder, noting(events), Storage(f"{mirror}/demo", pauses=()))
    with keeper:
        Failing.fail(after=0, times=1)
        keeper.save(1, lambda at: (at / "weights").write_text("1"), {})
        keeper.save(2, lambda at: (at / "weights").write_text("2"), {})
    kinds = [name for name, _ in events]
    assert kinds == ["checkpoint", "warning", "checkpoint", "mirrored"]
    warning = events[1][1]
    assert warning["name"] == "not_mirrored" and "the network is gone" in warning["text"] and warning["mend"]
    assert [step for step, _ in Storage(f"{mirror}/demo").whole()] == [2]


def test_the_last_one_is_tried_again_at_the_end(tmp_path: Path, mirror: str) -> None:
    config, folder = open_folder(settings(tmp_path, mirror), resume=False)
    events: Events = []
    keeper = Keeper(config, folder, noting(events), Storage(f"{mirror}/demo", pauses=()))
    with keeper:
        Failing.fail(after=0, times=1)
        keeper.save(1, lambda at: (at / "weights").write_text("1"), {})
    assert [name for name, _ in events] == ["checkpoint", "warning"]
    assert [step for step, _ in Storage(f"{mirror}/demo").whole()] == [1]


def save_one_and_end(keeper: Keeper, ending: BaseException | None) -> None:
    with keeper:
        keeper.save(1, lambda at: (at / "weights").write_text("1"), {})
        if ending is not None:
            raise ending


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt(), RunError("no gradient")])
def test_a_run_whose_last_checkpoint_is_not_there_fails(
    tmp_path: Path, mirror: str, ending: BaseException | None
) -> None:
    config, folder = open_folder(settings(tmp_path, mirror), resume=False)
    keeper = Keeper(config, folder, noting([]), Storage(f"{mirror}/demo", pauses=()))
    # What ended the run is worse news than what its end could not do.
    wanted = RunError if isinstance(ending, RunError) else CheckpointError
    Failing.fail(after=0, times=10**6)
    with pytest.raises(wanted):
        save_one_and_end(keeper, ending)
    assert checkpoint.latest(folder / "checkpoints") is not None


def test_a_storage_that_hangs_does_not_hold_the_run_for_ever(tmp_path: Path, mirror: str) -> None:
    config, folder = open_folder(settings(tmp_path, mirror, "learner.timeout=0.2"), resume=False)
    events: Events = []
    keeper = Keeper(config, folder, noting(events), mirror_of(config.run))
    Failing.fail(slow=3.0)
    with pytest.raises(CheckpointError, match=r"took more than 0\.2 s"), keeper:
        keeper.save(1, lambda at: (at / "weights").write_text("1"), {})
    assert [name for name, _ in events] == ["checkpoint", "warning"]


def test_a_storage_that_refuses_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"did not (send|look for) config\.toml"):
        open_folder(settings(tmp_path / "a", str(target / "mirror")), resume=False)


def test_a_start_that_was_cut_short_leaves_no_run(tmp_path: Path) -> None:
    config = load_config(None, [f'run.dir="{tmp_path}"', "run.name=demo"])
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.toml.tmp-1").write_text("[ru")
    assert not begun(config)
    config, folder = open_folder(config, resume=False)
    assert (config.run.name, begun(config)) == ("demo", True)
    assert load_config(folder / "config.toml") == config


def test_what_an_endpoint_is_held_at_stays_in_the_mirror_too(tmp_path: Path, mirror: str) -> None:
    config = settings(tmp_path, mirror)
    trained(config, range(1))
    (config.run.folder / checkpoint.PIN).write_text("step-00000001\n")
    trained(config, range(1, 5), resume=True)
    assert [step for step, _ in Storage(f"{mirror}/demo").whole()] == [5, 4, 1]


def test_without_a_mirror_nothing_is_sent(tmp_path: Path) -> None:
    config = load_config(None, [f'run.dir="{tmp_path}"'])
    assert mirror_of(config.run) is None
    assert [name for name, _ in trained(config, range(2))] == ["checkpoint", "checkpoint"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("bucket/prefix", "s3://bucket/prefix or an absolute path"),
        ("s3://", "s3://bucket/prefix or an absolute path"),
        ("s3://key:secret@bucket/x", "no credentials"),
        ("/shared", "run.dir itself"),
    ],
)
def test_a_mirror_that_cannot_be_one_is_refused(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, [f'run.mirror="{address}"', 'run.dir="/shared"'])


@pytest.mark.parametrize("address", ["s3://bucket/prefix", "gs://b", "memory://x", "/mnt/shared", ""])
def test_a_mirror_is_kept_in_the_configuration(address: str) -> None:
    config = load_config(None, [f'run.mirror="{address}"'])
    assert config.run.mirror == address


def test_what_an_endpoint_removes_meanwhile_does_not_end_the_run(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / f"{checkpoint.PIN}-gone").symlink_to(tmp_path / "nowhere")  # listed, not readable
    config = settings(tmp_path, mirror)
    (config.run.folder / "config.toml").write_text(config.to_toml())
    keeper = Keeper(config, config.run.folder, noting([]), mirror_of(config.run))
    save_one_and_end(keeper, None)
    assert [step for step, _ in Storage(f"{mirror}/demo").whole()] == [1]


def test_a_full_disk_under_the_copies_is_a_warning(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = open_folder(settings(tmp_path, mirror), resume=False)
    events: Events = []
    real, left = shutil.copyfile, [OSError(28, "No space left on device")]

    def copyfile(source: Any, target: Any, **more: Any) -> Any:
        if left:
            raise left.pop()
        return real(source, target, **more)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    save_one_and_end(Keeper(config, folder, noting(events), mirror_of(config.run)), None)
    assert [name for name, _ in events] == ["checkpoint", "warning"]
    assert "No space left" in events[1][1]["text"]
    assert [step for step, _ in Storage(f"{mirror}/demo").whole()] == [1]  # sent at the end


def test_an_upload_that_was_given_up_overwrites_nothing_newer(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = open_folder(settings(tmp_path, mirror, "learner.timeout=0.3"), resume=False)
    events: Events = []
    hangs, answers = threading.Event(), threading.Event()
    real = Storage.put

    def put(self: Storage, file: Path, name: str) -> None:
        mine = mirror in self.address and threading.current_thread().name == "mirror"
        if mine and not answers.is_set():
            hangs.set()
            assert answers.wait(20)
        real(self, file, name)

    monkeypatch.setattr(Storage, "put", put)
    before = set(threading.enumerate())
    with Keeper(config, folder, noting(events), mirror_of(config.run)) as keeper:
        keeper.save(1, lambda at: (at / "weights").write_text("1"), {})
        assert hangs.wait(20)
        keeper.save(2, lambda at: (at / "weights").write_text("2"), {})
        begun = {t for t in threading.enumerate() if t.name == "mirror"} - before
        assert len(begun) == 1  # none beside the one that hangs
        answers.set()
    assert [name for name, _ in events][:3] == ["checkpoint", "warning", "checkpoint"]
    assert [step for step, _ in Storage(f"{mirror}/demo").whole()] == [2]  # the first was not completed late


def test_a_run_that_went_back_is_not_resumed_from_what_it_left_behind(tmp_path: Path, mirror: str) -> None:
    config = settings(tmp_path, mirror, "train.keep_checkpoints=9")
    trained(config, range(4))
    folder = config.run.folder
    with Keeper(config, folder, noting([]), mirror_of(config.run)) as keeper:
        learners = SimpleNamespace(fresh=True, check=lambda path: None)
        run: Any = SimpleNamespace(folder=folder, config=config, keeper=keeper, learners=learners)
        run.rewinds, run.version = 0, 2
        run.restore, run.publish = lambda: None, lambda version: None
        adopt(run, folder / "checkpoints" / "step-00000002")
    assert [step for step, _ in Storage(f"{mirror}/demo").whole()] == [2, 1]
    trained(config, range(2, 3), resume=True)
    open_folder(config, resume=True)
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None and (found.step, (found.path / "weights").read_text()) == (3, "3")


def test_a_full_disk_here_is_not_the_storages_fault(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(settings(tmp_path / "a", mirror), range(1))
    tries: list[str] = []

    def get_file(self: Any, there: str, here: str, **more: Any) -> None:
        tries.append(here)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Failing, "get_file", get_file)
    with pytest.raises(CheckpointError, match="cannot be brought here: No space left") as caught:
        open_folder(settings(tmp_path / "b", mirror), resume=True)
    assert "this disk" in caught.value.mend and len(tries) == 1  # and it is not waited for
