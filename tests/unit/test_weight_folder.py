"""Versions in a shared folder: whole or not there, exact, and found by whoever watches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray import checkpoint
from stateset_ray.errors import CheckpointError
from stateset_ray.manifest import FAILPOINTS
from stateset_ray.models import Hardware, load_model, state_tensors
from stateset_ray.policies import weight_folder
from stateset_ray.policies.weight_folder import newest, open_version

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def publish(
    root: Path, version: int, tensors: dict[str, torch.Tensor], lineage: int = 0, keep: int = 2
) -> Path:
    beside = {"note": b"x"}
    return weight_folder.publish(root, version, lineage, tensors, keep=keep, timeout=10, beside=beside)


def ones(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 4), value), "b": torch.full((5,), value, dtype=torch.bfloat16)}


@settings(deadline=None, max_examples=30)
@given(
    kinds=st.dictionaries(
        st.text("abc.", min_size=1, max_size=6), st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1,
        max_size=12,
    )
)  # fmt: skip
def test_every_dtype_and_shape_comes_back_exactly(tmp_path_factory, kinds) -> None:
    root = tmp_path_factory.mktemp("weights")
    tensors = {name: (100 * torch.randn(shape)).to(dtype) for name, (dtype, shape) in kinds.items()}
    found = open_version(publish(root, 3, tensors, lineage=2))
    assert (found.version, found.lineage) == (3, 2)
    back = found.tensors()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[name], tensor)


def test_a_transposed_tensor_and_one_that_is_a_part_of_another_are_written_as_they_look(tmp_path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    back = open_version(publish(tmp_path, 0, {"t": whole.T, "row": whole[1]})).tensors()
    assert torch.equal(back["t"], whole.T)
    assert torch.equal(back["row"], whole[1])


def test_a_version_is_a_model_that_transformers_loads_tied_weights_and_all(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load_model("tiny", Hardware("cpu", torch.float32, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    tensors = state_tensors(model)
    assert "lm_head.weight" not in tensors  # tied: it travels once
    path = weight_folder.publish(
        tmp_path, 7, 0, tensors, keep=1, timeout=10, beside=weight_folder.description("tiny")
    )
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(path).chat_template
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_last_versions_stay_and_what_is_mapped_outlives_its_folder(tmp_path) -> None:
    mapped = open_version(publish(tmp_path, 1, ones(1.0))).tensors()
    for version in (2, 3, 4):
        publish(tmp_path, version, ones(version))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert mapped["a"].sum() == 12
    found = newest(tmp_path)
    assert found and found.version == 4


def test_a_damaged_shard_is_refused_and_the_version_before_is_found(tmp_path) -> None:
    publish(tmp_path, 1, ones(1.0))
    path = publish(tmp_path, 2, ones(2.0))
    shard = max(path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"content of {shard.name} has changed"):
        open_version(path)
    found = newest(tmp_path)
    assert found and found.version == 1


def test_a_missing_shard_is_refused(tmp_path) -> None:
    path = publish(tmp_path, 1, ones())
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_version(path)


def test_who_watches_reads_a_version_once_and_sees_a_new_lineage(tmp_path) -> None:
    assert newest(tmp_path) is None
    shard = next(publish(tmp_path, 1, ones()).glob("*.safetensors"))
    known = newest(tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(b"damaged")
    assert newest(tmp_path, known) is known  # not read again
    assert newest(tmp_path) is None
    shard.write_bytes(whole)
    publish(tmp_path, 2, ones())
    known = newest(tmp_path, known)
    assert known and known.version == 2
    publish(tmp_path, 1, ones(), lineage=1)  # the run went back
    known = newest(tmp_path, known)
    assert known and (known.version, known.lineage) == (1, 1)
    publish(tmp_path, 1, ones(5.0), lineage=2)  # and once more, to the same version
    again = newest(tmp_path, known)
    assert again and again.lineage == 2
    assert again.tensors()["a"][0, 0] == 5


def test_a_checkpoint_of_a_run_is_no_version(tmp_path) -> None:
    path = checkpoint.save(tmp_path, 1, lambda f: (f / "x").write_text("x") and None, meta={}, keep=1)
    with pytest.raises(CheckpointError, match="not a published version"):
        open_version(path)


PROGRAM = """
import sys, torch
from pathlib import Path
from stateset_ray.policies import weight_folder
weight_folder.publish(Path(sys.argv[1]), 2, 0, {"a": torch.full((3, 4), 2.0)}, keep=1, timeout=10, beside={})
"""


@pytest.mark.parametrize("place", [f for f in FAILPOINTS if f != "old_moved_aside"])
def test_a_writer_that_dies_at_any_moment_leaves_a_whole_version(tmp_path, place: str) -> None:
    publish(tmp_path, 1, {"a": torch.full((3, 4), 1.0)}, keep=1)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=100,
        env={**os.environ, "STATESET_RAY_FAILPOINT": place, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 86, done.stderr
    found = newest(tmp_path)
    assert found
    assert found.version == (2 if place in ("pointer_replaced", "retention_deleted") else 1)
    assert (found.tensors()["a"] == found.version).all()
    publish(tmp_path, 3, ones(3.0), keep=1)  # the next one clears what was left
    assert not [p.name for p in tmp_path.iterdir() if ".tmp-" in p.name]
    assert json.loads((tmp_path / "step-00000003" / "manifest.json").read_text())["meta"] == {"lineage": 0}
