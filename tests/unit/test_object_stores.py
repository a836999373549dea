"""Checkpoints in object stores by their own protocols: S3 (moto's server) and Google's (its emulator).

What holds for every storage stands in test_storage.py; this is what these clients and servers do to it.
"""

from __future__ import annotations

import runpy
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from stateset_ray import checkpoint
from stateset_ray.actors.run_folder import open_folder
from stateset_ray.config import load_config
from stateset_ray.errors import CheckpointError
from stateset_ray.storage import Storage

HERE = Path(__file__).parent
support = runpy.run_path(str(HERE / "support_s3.py"))
saved = runpy.run_path(str(HERE / "test_storage.py"))["saved"]

S3 = pytest.mark.skipif(
    not all(find_spec(name) for name in ("moto", "flask", "s3fs", "boto3")),
    reason="needs an S3 server and its client: pip install 'moto[server]' s3fs boto3",
)
GCS = pytest.mark.skipif(
    not all(find_spec(name) for name in ("gcp_storage_emulator", "gcsfs")),
    reason="needs an emulator of Google's storage and its client: pip install gcp-storage-emulator gcsfs",
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import s3fs

    for name, value in support["KEYS"].items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it remembers the address of an earlier test's server
    with support["serving_s3"]("bucket") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        yield server


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import gcsfs
    from gcp_storage_emulator.server import create_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # the emulator has no such buckets
    gcsfs.GCSFileSystem.clear_instance_cache()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield
    server.stop()


@pytest.mark.parametrize(
    ("served", "kind"), [pytest.param("s3", "s3", marks=S3), pytest.param("gcs", "gs", marks=GCS)]
)
def test_checkpoints_come_and_go(
    served: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(served)
    storage = Storage(f"{kind}://bucket/runs/demo", pauses=())
    assert storage.whole() == [] and not storage.has("config.toml")
    for step in (3, 4, 5, 6):
        sent = saved(tmp_path / "here", step)
        storage.upload(sent, keep=2, spare=["step-00000003"])
    assert [step for step, _ in storage.whole()] == [6, 5, 3]
    storage.take_back(5)
    assert [step for step, _ in storage.whole()] == [5, 3]

    brought = storage.fetch(tmp_path / "there", keep=2)
    found = checkpoint.latest(tmp_path / "there")
    assert found is not None and found.path == brought and found.step == 5
    assert (brought / "state/optimizer.bin").read_bytes() == bytes([6]) * 3000
    storage._fs.pipe_file(storage._at("checkpoints/step-00000005/model.bin"), b"\x05" * 4999 + b"\x06")
    assert storage.fetch(tmp_path / "another", keep=2) == tmp_path / "another/step-00000003"

    file, back = tmp_path / "metrics.jsonl", tmp_path / "back"
    for content in ("long, long ago\n", "new\n"):
        file.write_text(content)
        storage.put(file, "metrics.jsonl")
        assert storage.get("metrics.jsonl", back) and back.read_text() == content
    with pytest.raises(CheckpointError, match="not found: "):
        Storage(f"{kind}://nobucket/runs", pauses=()).put(file, "metrics.jsonl")


@S3
def test_two_writers_see_what_the_other_sent(s3: Any, tmp_path: Path) -> None:
    """Clients remember listings; a run that goes on elsewhere must not miss the newest checkpoint."""
    import s3fs

    one = Storage("s3://bucket/demo", pauses=())
    s3fs.S3FileSystem.clear_instance_cache()
    other = Storage("s3://bucket/demo", pauses=())
    assert one._fs is not other._fs
    for step, (writer, reader) in enumerate([(one, other), (other, one), (one, other)], start=1):
        assert not reader.has(f"at-{step}")
        writer.upload(saved(tmp_path / "here", step), keep=9)
        assert reader.whole()[0] == (step, f"step-{step:08d}")
        writer.put(tmp_path / "here/checkpoints" / f"step-{step:08d}" / "config.json", f"at-{step}")
        assert reader.has(f"at-{step}")


@S3
@pytest.mark.parametrize("writes", [0, 2, 3])
def test_a_server_that_fails_in_the_middle_leaves_what_was_whole(
    s3: Any, tmp_path: Path, writes: int
) -> None:
    """Of three files and a manifest so many arrive; then the connection is cut, until it is not."""
    storage = Storage("s3://bucket/demo", pauses=())
    storage.upload(saved(tmp_path / "here", 1), keep=9)
    left = [writes]

    def fault(request: Any) -> Any:
        if request["REQUEST_METHOD"] != "PUT":
            return None
        left[0] -= 1
        return None if left[0] >= 0 else ("400 Bad Request", b"<Error><Code>Broken</Code></Error>")

    s3.fault = fault
    second = saved(tmp_path / "here", 2)
    with pytest.raises(CheckpointError, match="did not send"):
        storage.upload(second, keep=9)
    assert storage.whole() == [(1, "step-00000001")]
    left[0] = 99
    storage.upload(second, keep=9)
    assert storage.whole()[0] == (2, "step-00000002")


@S3
def test_a_server_that_is_busy_for_a_moment_is_asked_again(s3: Any, tmp_path: Path) -> None:
    storage = Storage("s3://bucket/demo", pauses=(0, 0))
    busy = [3]

    def fault(request: Any) -> Any:
        if request["REQUEST_METHOD"] != "PUT":
            return None
        busy[0] -= 1
        broken = b"<Error><Code>InternalError</Code><Message>We failed.</Message></Error>"
        return ("500 Internal Server Error", broken) if busy[0] >= 0 else None

    s3.fault = fault
    storage.upload(saved(tmp_path / "here", 1), keep=9)
    assert busy[0] < 0 and storage.whole() == [(1, "step-00000001")]


@S3
def test_who_may_not_is_told_at_once(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run starts, since its configuration is the first thing that is sent."""
    s3.deny("PUT")
    config = load_config(None, [f'run.dir="{tmp_path}"', 'run.mirror="s3://bucket/runs"', "run.name=demo"])
    before = len(s3.asked)
    with pytest.raises(CheckpointError, match=r"did not send config.toml: Access Denied"):
        open_folder(config, resume=False)
    assert len([asked for asked in s3.asked[before:] if asked.startswith("PUT")]) == 1, "not tried again"
    s3.deny("PUT", "GET", "HEAD")
    with pytest.raises(CheckpointError, match=r"did not look for config.*: Forbidden"):
        open_folder(config, resume=False)
    with pytest.raises(CheckpointError, match="did not list the checkpoints: Access Denied"):
        open_folder(config, resume=True)

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    type(Storage("s3://bucket/x")._fs).clear_instance_cache()
    with pytest.raises(CheckpointError, match="Unable to locate credentials"):
        Storage("s3://bucket/demo", pauses=()).whole()
