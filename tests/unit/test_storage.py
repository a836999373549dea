"""Checkpoints in shared storage: what was cut short is not seen, what was changed is not loaded."""

from __future__ import annotations

import json
import runpy
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stateset_ray import checkpoint
from stateset_ray.errors import CheckpointError, ConfigError
from stateset_ray.manifest import MANIFEST
from stateset_ray.storage import Storage

Failing = runpy.run_path(str(Path(__file__).with_name("support_storage.py")))["Failing"]


@pytest.fixture(params=["memory", "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    where = f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else str(tmp_path / "mirror/run")
    return Storage(where, pauses=())


@pytest.fixture
def failing() -> Storage:
    Failing.fail()
    return Storage(f"failing://{uuid.uuid4().hex}/run", pauses=(0, 0))


def saved(root: Path, step: int) -> Path:
    """A checkpoint of three files, one of them in a folder."""

    def write(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "model.bin").write_bytes(bytes([step]) * 5000)
        (folder / "state" / "optimizer.bin").write_bytes(bytes([step + 1]) * 3000)
        (folder / "config.json").write_text("{}")

    return checkpoint.save(root / "checkpoints", step, write, meta={"version": step}, keep=99)


def break_file(storage: Storage, name: str, content: bytes | None) -> None:
    """Change a file behind the storage's back, or remove it."""
    path = storage._at(name)
    if content is None:
        storage._fs.rm_file(path)
    else:
        storage._fs.pipe_file(path, content)


def test_a_checkpoint_comes_back_byte_for_byte(storage: Storage, tmp_path: Path) -> None:
    sent = saved(tmp_path / "here", 3)
    storage.upload(sent, keep=2)
    assert storage.whole() == [(3, "step-00000003")]
    brought = storage.fetch(tmp_path / "there" / "checkpoints", keep=2)
    assert brought == tmp_path / "there" / "checkpoints" / "step-00000003"
    found = checkpoint.latest(tmp_path / "there" / "checkpoints")
    assert found is not None and (found.path, found.meta) == (brought, {"version": 3})
    files = {p.relative_to(sent): p.read_bytes() for p in sent.rglob("*") if p.is_file()}
    assert files == {p.relative_to(brought): p.read_bytes() for p in brought.rglob("*") if p.is_file()}
    assert len(files) == 4


def test_a_mirror_on_mounted_storage_is_a_run_folder_like_any_other(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "mirror" / "run"))
    storage.upload(saved(tmp_path / "here", 3), keep=2)
    assert checkpoint.open_checkpoint(tmp_path / "mirror" / "run").step == 3


def test_the_newest_is_fetched_and_only_if_it_is_newer(storage: Storage, tmp_path: Path) -> None:
    for step in (1, 2):
        storage.upload(saved(tmp_path / "here", step), keep=9)
    root = tmp_path / "there"
    assert storage.fetch(root, above=2, keep=9) is None
    assert not root.exists()
    found = storage.fetch(root, above=1, keep=9)
    assert found is not None and found.name == "step-00000002"


def test_nothing_there_is_no_error(storage: Storage, tmp_path: Path) -> None:
    assert storage.whole() == []
    assert storage.fetch(tmp_path / "there", keep=1) is None
    assert not storage.has("config.toml")
    assert not storage.get("config.toml", tmp_path / "config.toml")
    assert list(tmp_path.glob("config.toml*")) == []


def test_a_file_is_replaced_whole(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for content in ("long, long ago\n", "new\n"):
        file.write_text(content)
        storage.put(file, "metrics.jsonl")
    back = tmp_path / "back"
    assert storage.has("metrics.jsonl") and storage.get("metrics.jsonl", back)
    assert back.read_text() == "new\n"


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_an_upload_that_was_cut_short_is_not_seen(failing: Storage, tmp_path: Path, writes: int) -> None:
    """Three files and their manifest: the upload ends after so many of these four."""
    failing.upload(saved(tmp_path / "here", 1), keep=9)
    second = saved(tmp_path / "here", 2)
    Failing.fail(after=writes, times=99)
    with pytest.raises(CheckpointError, match="the network is gone"):
        failing.upload(second, keep=9)
    assert failing.whole() == [(1, "step-00000001")]
    found = failing.fetch(tmp_path / "there", keep=9)
    assert found is not None and found.name == "step-00000001"
    Failing.fail(after=99, times=0)
    failing.upload(second, keep=9)  # a later attempt makes it whole
    assert failing.whole()[0] == (2, "step-00000002")
    assert failing.fetch(tmp_path / "there", above=1, keep=9) is not None


def test_the_manifest_is_sent_last(failing: Storage, tmp_path: Path) -> None:
    Failing.fail(after=99, times=0)
    failing.upload(saved(tmp_path / "here", 1), keep=1)
    assert [name.endswith(MANIFEST) for name in Failing.sent] == [False, False, False, True]


def test_what_fails_twice_is_tried_a_third_time(failing: Storage, tmp_path: Path) -> None:
    Failing.fail(after=1, times=2)
    failing.upload(saved(tmp_path / "here", 1), keep=1)
    assert failing.whole() == [(1, "step-00000001")]


def test_what_is_there_already_is_not_sent_again(failing: Storage, tmp_path: Path) -> None:
    sent = saved(tmp_path / "here", 1)
    failing.upload(sent, keep=1)
    Failing.fail(after=99, times=0)
    failing.upload(sent, keep=1)
    assert Failing.sent == []


def test_another_checkpoint_of_the_same_step_takes_its_place(storage: Storage, tmp_path: Path) -> None:
    storage.upload(saved(tmp_path / "here", 1), keep=1)

    def write(folder: Path) -> None:
        (folder / "other.bin").write_bytes(b"another history")

    other = checkpoint.save(tmp_path / "other", 1, write, meta={}, keep=1)
    storage.upload(other, keep=1)
    found = storage.fetch(tmp_path / "there", keep=1)
    assert found is not None
    assert {p.name for p in found.iterdir()} == {"other.bin", MANIFEST}


@pytest.mark.parametrize("change", ["a flipped byte", "a shorter file", "a missing file", "a bad manifest"])
def test_what_was_changed_is_passed_over_and_named(
    storage: Storage, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        storage.upload(saved(tmp_path / "here", step), keep=9)
    folder = "checkpoints/step-00000002"
    name, content, said = {
        "a flipped byte": ("model.bin", b"\x02" * 4999 + b"\x03", "the content of model.bin has changed"),
        "a shorter file": ("model.bin", b"\x02" * 4999, "the content of model.bin has changed"),
        "a missing file": ("state/optimizer.bin", None, "state/optimizer.bin is missing"),
        "a bad manifest": (MANIFEST, b"{}", "is not as it was written"),
    }[change]
    break_file(storage, f"{folder}/{name}", content)
    found = storage.fetch(tmp_path / "there", keep=9)
    assert found is not None and found.name == "step-00000001"
    assert said in caplog.text and "step-00000002" in caplog.text
    assert [p.name for p in (tmp_path / "there").glob("step-*")] == ["step-00000001"]  # nothing half done


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "state/../../escaped"])
def test_a_manifest_cannot_make_us_write_elsewhere(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    from stateset_ray.manifest import encode

    storage = Storage(f"memory://{uuid.uuid4().hex}", pauses=())
    manifest = encode(1, {}, {name: {"size": 1, "sha256": "0" * 64}})
    break_file(storage, f"checkpoints/step-00000001/{MANIFEST}", manifest)
    assert storage.fetch(tmp_path / "there" / "checkpoints", keep=1) is None
    assert "outside" in caplog.text
    assert not list(tmp_path.rglob("escaped"))


def test_old_ones_go_newer_and_spared_ones_stay(storage: Storage, tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        storage.upload(saved(tmp_path / "here", step), keep=9)
    storage.upload(saved(tmp_path / "here", 4), keep=2, spare=["step-00000001"])
    assert [step for step, _ in storage.whole()] == [9, 4, 3, 1]


def test_remains_of_an_upload_are_cleared_by_the_next(failing: Storage, tmp_path: Path) -> None:
    Failing.fail(after=2, times=99)
    with pytest.raises(CheckpointError):
        failing.upload(saved(tmp_path / "here", 1), keep=2)
    Failing.fail(after=99, times=0)
    failing.upload(saved(tmp_path / "here", 2), keep=2)
    assert failing._fs.ls(failing._at("checkpoints"), detail=False) == [
        failing._at("checkpoints/step-00000002")
    ]


def test_a_storage_that_does_not_answer_is_an_error_and_no_older_checkpoint(
    tmp_path: Path,
) -> None:
    class Deaf(MemoryFileSystem):
        protocol = "deaf"

        def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
            raise ConnectionError("no route to host")

    fsspec.register_implementation("deaf", Deaf, clobber=True)
    storage = Storage(f"deaf://{uuid.uuid4().hex}", pauses=(0,))
    break_file(storage, f"checkpoints/step-00000001/{MANIFEST}", b"{}")
    with pytest.raises(CheckpointError, match="no route to host") as caught:
        storage.fetch(tmp_path / "there", keep=1)
    assert caught.value.given == storage.address


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize(
    ("address", "words"),
    [("s3://bucket/x", "s3fs"), ("gs://bucket/x", "gcsfs"), ("nosuch://x", "nosuch")],
)
def test_storage_that_cannot_be_used_says_what_is_missing(address: str, words: str) -> None:
    if (address.startswith("s3") and _installed("s3fs")) or (
        address.startswith("gs") and _installed("gcsfs")
    ):
        pytest.skip("its package is installed here")
    with pytest.raises(ConfigError) as caught:
        Storage(address)
    assert words in str(caught.value)


def test_the_manifest_names_what_was_sent(storage: Storage, tmp_path: Path) -> None:
    storage.upload(saved(tmp_path / "here", 1), keep=1)
    back = tmp_path / "manifest"
    assert storage.get(f"checkpoints/step-00000001/{MANIFEST}", back)
    for name, entry in json.loads(back.read_text())["files"].items():
        assert storage._fs.size(storage._at(f"checkpoints/step-00000001/{name}")) == entry["size"]
