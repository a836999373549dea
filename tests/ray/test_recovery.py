"""A run that ends early leaves a whole checkpoint and no process, and goes on from there."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
from playground import gone, on_fifo, small

from stateset_ray import checkpoint
from stateset_ray.actors.jobs import SampleSize
from stateset_ray.actors.learner_group import learner_group
from stateset_ray.actors.learner_rank import SampleRef, UpdateBatch
from stateset_ray.actors.placement import place
from stateset_ray.actors.run import open_run
from stateset_ray.config import Config
from stateset_ray.errors import CheckpointError, LearnerError, LearnerLost
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train, train_step

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

EVERY = ("train.checkpoint_every=1", "train.keep_checkpoints=9")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two steps with a checkpoint after each; copied, never changed."""
    config = small(tmp_path_factory.mktemp("finished"), *EVERY)
    train(config)
    return config


@pytest.fixture
def copied(finished: Config, tmp_path: Path) -> Config:
    """The finished run in a folder of the test's own, to be continued to a third step."""
    shutil.copytree(finished.run.folder, tmp_path / finished.run.name)
    return small(tmp_path, *EVERY, "train.steps=3")


def whole(config: Config) -> checkpoint.Checkpoint | None:
    return checkpoint.latest(config.run.folder / "checkpoints")


@pytest.mark.slow
def test_a_killed_learner_ends_the_run_which_can_be_resumed(tmp_path: Path) -> None:
    config = small(tmp_path, *EVERY, "learner.ranks=2", "train.steps=3", "learner.restarts=0")
    with open_run(config) as run:
        train_step(run, 0)
        train_step(run, 1)
        ranks = run.learners.pids
        assert len(set(ranks)) == 2
        os.kill(ranks[1], signal.SIGKILL)
        with pytest.raises(LearnerError, match="all ranks were ended") as caught:
            train_step(run, 2)
        assert gone(ranks)  # the survivor too, which would wait for the dead one
    assert "--resume" in caught.value.mend
    found = whole(config)
    assert found
    assert (found.step, found.meta["version"]) == (2, 2)
    summary = train(config, resume=True)
    assert (summary["steps"], summary["policy_version"]) == (3, 3)
    records = JsonLines(config.run.folder / "metrics.jsonl").read()
    assert [record["step"] for record in records] == [0, 1, 2]
    assert abs(records[2]["kl_mismatch"]) < 1e-4


def test_a_killed_learner_is_rebuilt_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """SIGKILL of a rank between two steps: back to the last checkpoint, and the same weights at the end."""
    straight = small(tmp_path / "straight", "train.steps=4", "train.checkpoint_every=1")
    train(straight)
    config = small(tmp_path / "hit", "train.steps=4", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    workers: list[list[int]] = []
    seen: list[str] = []
    with open_run(config, on_event=lambda event: seen.append(str(event["event"]))) as run:
        for step in run.steps():
            workers.append(run.pool.pids)
            if step == 2 and not run.learners.restarts:
                [rank] = run.learners.pids
                os.kill(rank, signal.SIGKILL)
                with pytest.raises(LearnerLost) as caught:
                    train_step(run, step)
                run.recover(caught.value)
                assert run.step == 2
                assert run.learners.pids != [rank]
                continue
            train_step(run, step)
        run.finish()
    assert len({tuple(pids) for pids in workers}) == 1  # no rollout worker was started anew
    assert "learner_lost" in seen
    assert "learner_rebuilt" in seen
    mine, theirs = whole(config), whole(straight)
    assert mine and theirs
    name = "model.safetensors"
    assert (mine.path / name).read_bytes() == (theirs.path / name).read_bytes()
    records = JsonLines(config.run.folder / "metrics.jsonl").read()
    assert [record["policy_version"] for record in records] == [1, 2, 3, 4]


def test_whatever_a_rank_raises_ends_all_of_them_with_one_kind_of_error(tmp_path: Path) -> None:
    """As when a collective breaks under the peers of a dead rank, which may be heard before its death."""
    config = small(tmp_path)
    with place(config) as placement, learner_group(config, placement) as learners:
        lost = SampleRef(ray.put("no group"), SampleSize(trajectory=0, row=0, tokens=9, masked=3), (1.0,))
        with pytest.raises(LearnerError, match="AttributeError: 'str' object") as caught:
            learners.update([UpdateBatch([lost], 3.0)], 0)
        assert gone(learners.pids)
    assert "--resume" in caught.value.mend


def test_a_full_disk_leaves_the_earlier_checkpoints(copied: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATESET_RAY_FAILPOINT", "file_synced:ENOSPC")
    with pytest.raises(CheckpointError, match="step 3") as caught:
        train(copied, resume=True)
    assert "room on this disk" in caught.value.mend
    found = whole(copied)
    assert found
    assert found.step == 2
    assert not list((copied.run.folder / "checkpoints").glob("*.tmp-*"))
    monkeypatch.delenv("STATESET_RAY_FAILPOINT")
    assert train(copied, resume=True)["steps"] == 3
    found = whole(copied)
    assert found
    assert found.step == 3


def test_a_damaged_checkpoint_is_passed_over(copied: Config, caplog: pytest.LogCaptureFixture) -> None:
    newest = whole(copied)
    assert newest
    assert newest.step == 2
    model = newest.path / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    events = []
    summary = train(copied, resume=True, on_event=lambda e: events.append(dict(e)))
    assert "content of model.safetensors has changed" in caplog.text
    resumed = next(event for event in events if event["event"] == "resumed")
    assert resumed["step"] == 1
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]
    assert summary["steps"] == summary["policy_version"] == 3
    records = JsonLines(copied.run.folder / "metrics.jsonl").read()
    assert [record["step"] for record in records] == [0, 1, 2]


def test_a_signal_between_steps_saves(tmp_path: Path) -> None:
    """As `kill` or Kubernetes ask; the handler only notes it, and the step is finished first."""
    config = small(tmp_path, "train.steps=9", "train.checkpoint_every=1000")
    events = []

    def listen(event: object) -> None:
        events.append(dict(event))  # type: ignore[call-overload]
        if events[-1]["event"] == "step":
            signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=listen)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [event["event"] for event in events[1:]] == ["step", "stopping", "checkpoint", "interrupted"]
    found = whole(config)
    assert found
    assert (found.step, found.meta["version"]) == (1, 1)


PROGRAM = """
import sys
from playground import Playground
from stateset_ray.config import load_config
from stateset_ray.train import train

folder, fifo = sys.argv[1:]
Playground.plan = {2: {"fault": "wait", "fifo": fifo}}  # in the second step
try:
    train(load_config(folder + "/config.toml"), on_event=lambda event: print(event["event"], flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
def test_ctrl_c_while_conversations_run_saves_and_leaves_no_process(tmp_path: Path) -> None:
    """The whole process group gets it, as from a terminal; the program has a Ray cluster of its own."""
    config = small(
        tmp_path, 'environment.path="playground:Playground"', "train.checkpoint_every=1000",
        "rollout.environment_timeout=1000",
    )  # fmt: skip
    (tmp_path / "config.toml").write_text(config.to_toml())
    fifo = tmp_path / "fifo"
    support = Path(__file__).parent / "support"
    family: list[psutil.Process] = []
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), str(fifo)],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(support), *sys.path])},
        )  # fmt: skip

        def interrupt(pid: str) -> None:
            family.extend(psutil.Process(process.pid).children(recursive=True))
            assert int(pid) in [member.pid for member in family]
            os.killpg(process.pid, signal.SIGINT)

        try:
            with on_fifo(fifo, interrupt):
                code = process.wait(timeout=240)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        said = (tmp_path / "output").read_text()
    assert code == 130, said
    events = ["opened", "step", "stopping", "checkpoint", "interrupted"]
    assert [line for line in said.splitlines() if line in events] == events, said
    assert len(family) >= 4  # Ray's own two, a worker, a learner
    assert not psutil.wait_procs(family, timeout=30)[1]
    found = whole(config)
    assert found
    assert (found.step, found.meta["version"]) == (1, 1)
