"""However weights come to the engines, the run is the same; and what a transport needs is checked first."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from playground import small
from safetensors.torch import load_file

from stateset_ray import checkpoint
from stateset_ray.actors.publishing.folder import check_shared, sees, write_probe
from stateset_ray.actors.run import open_run
from stateset_ray.config import Config
from stateset_ray.errors import CheckpointError, ClusterError, LearnerLost
from stateset_ray.metrics import JsonLines
from stateset_ray.policies.weight_folder import newest
from stateset_ray.train import train, train_step

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

# One conversation after the other: what shares a forward pass, and with it the last bits, is the same then.
ALONE = ("rollout.engines=2", "rollout.concurrency=1", "train.checkpoint_every=1")


def final(config: Config) -> Path:
    found = checkpoint.latest(config.run.folder / "checkpoints")
    assert found
    return found.path / "model.safetensors"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights after two steps through the object store."""
    config = small(tmp_path_factory.mktemp("stored"), *ALONE)
    train(config)
    return final(config).read_bytes()


@pytest.mark.parametrize("transport", ["folder", "collective"])
def test_a_run_is_the_same_to_the_bit_through_each_transport(
    stored: bytes, tmp_path: Path, transport: str
) -> None:
    config = small(tmp_path, *ALONE, f"publish.transport={transport}", "publish.bucket_mib=1")
    train(config)
    assert final(config).read_bytes() == stored
    records = JsonLines(config.run.folder / "metrics.jsonl").read()
    assert [record["policy_version"] for record in records] == [1, 2]
    assert all(abs(record["kl_mismatch"]) < 1e-4 for record in records)
    if transport == "folder":  # which this process, not the learner's, reads now
        found = newest(config.run.folder / "weights")
        assert found and found.version == 2
        saved = load_file(final(config))
        published = found.tensors()
        assert published.keys() == saved.keys()
        assert all(torch.equal(published[name], saved[name]) for name in saved)


@pytest.mark.slow
def test_a_rebuilt_learner_broadcasts_from_a_new_place(tmp_path: Path) -> None:
    config = small(
        tmp_path, "rollout.engines=1", "train.checkpoint_every=1", "publish.transport=collective",
        "publish.timeout=20", "train.steps=3",
    )  # fmt: skip
    with open_run(config) as run:
        train_step(run, 0)
        before = run.pool.weights
        [rank] = run.learners.pids
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(LearnerLost) as caught:
            train_step(run, 1)
        run.recover(caught.value)
        assert run.step == 1
        assert before and run.pool.weights
        assert run.pool.weights.handle != before.handle
        assert run.pool.weights.lineage == 1
        train_step(run, 1)
        assert run.version == 2
    last = JsonLines(config.run.folder / "metrics.jsonl").read()[-1]
    assert abs(last["kl_mismatch"]) < 1e-4


def test_a_folder_that_is_not_shared_is_found_at_the_start_and_the_node_is_named(tmp_path: Path) -> None:
    learners = SimpleNamespace(write_probe=write_probe)
    shared, apart = tmp_path / "shared", tmp_path / "apart"
    here = SimpleNamespace(sees=SimpleNamespace(remote=lambda root, token: ray.put(sees(root, token))))
    there = SimpleNamespace(
        sees=SimpleNamespace(remote=lambda root, token: ray.put((sees(str(apart), token)[0], "node-b")))
    )
    check_shared(learners, [here, here], str(shared), 20)
    with pytest.raises(ClusterError, match="is not seen on node-b") as caught:
        check_shared(learners, [here, there, there], str(shared), 20)
    assert str(shared) in str(caught.value.given)
    assert "object_store" in caught.value.mend


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    config = small(tmp_path, "publish.transport=folder", f'publish.folder="{tmp_path / "file"}"')
    with pytest.raises(CheckpointError, match="cannot write into this folder"), open_run(config):
        pass
