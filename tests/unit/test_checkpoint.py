"""The checkpoint folder under deaths, full disks, damage and company."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stateset_ray import checkpoint
from stateset_ray.errors import CheckpointError, LearnerError
from stateset_ray.manifest import FAILPOINTS

STEP_NAMES = ("model.safetensors", "engine/rank0.bin", "engine/rank1.bin")

# Forks a saver per line of its input: a death costs milliseconds, and no test process with threads forks.
SERVER = """
import json, os, sys
from pathlib import Path
from stateset_ray import checkpoint
assert "torch" not in sys.modules and "ray" not in sys.modules
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ["STATESET_RAY_FAILPOINT"] = job["failpoint"]
            def write(folder):
                (folder / "engine").mkdir()
                for name in job["names"]:
                    (folder / name).write_text(job["stamp"] * 20)
            checkpoint.save(
                Path(job["root"]), job["step"], write, meta={"stamp": job["stamp"]}, keep=job["keep"]
            )
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Saver:
    """A process that saves on demand, and whose children may die doing so."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def save(self, root: Path, step: int, stamp: str, keep: int = 2, failpoint: str = "") -> int:
        """The exit status of a child that saved: 0, or 86 where the failpoint killed it."""
        assert self.process.stdin
        assert self.process.stdout
        job = {"root": str(root), "step": step, "stamp": stamp, "keep": keep, "failpoint": failpoint}
        self.process.stdin.write(json.dumps({**job, "names": STEP_NAMES}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    saver = Saver()
    yield saver
    saver.close()


def save(root: Path, step: int, stamp: str, keep: int = 2, **options: Any) -> Path:
    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        for name in STEP_NAMES:
            (folder / name).write_text(stamp * 20)

    return checkpoint.save(root, step, write, meta={"stamp": stamp}, keep=keep, **options)


def content(found: checkpoint.Checkpoint | None) -> tuple[int, str] | None:
    """(step, stamp), after checking that every file and the meta bear the same stamp."""
    if found is None:
        return None
    stamps = {(found.path / name).read_text() for name in STEP_NAMES}
    assert stamps == {str(found.meta["stamp"]) * 20}
    return found.step, found.meta["stamp"]


def leftovers(root: Path) -> list[str]:
    return [entry.name for entry in root.iterdir() if ".tmp-" in entry.name or ".old-" in entry.name]


def committed(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.glob("step-*"))


# --- what a save leaves


def test_saves_reads_back_and_keeps_the_newest(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert checkpoint.latest(root) is None
    for step in (1, 2, 12):
        assert save(root, step, f"s{step}", keep=2).name == f"step-{step:08d}"
    assert committed(root) == ["step-00000002", "step-00000012"]
    assert (root / "latest").read_text() == "step-00000012\n"
    for path in (root.parent, root, root / "step-00000012"):
        assert content(checkpoint.open_checkpoint(path)) == (12, "s12")
    assert content(checkpoint.verify(root / "step-00000002")) == (2, "s2")
    assert leftovers(root) == []


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, "first")
    save(tmp_path, 5, "second")
    assert content(checkpoint.latest(tmp_path)) == (5, "second")
    assert committed(tmp_path) == ["step-00000005"]


def test_a_run_taken_back_goes_on_from_there(tmp_path: Path) -> None:
    for step in (5, 10, 6, 7, 8):
        save(tmp_path, step, f"s{step}", keep=2)
    assert content(checkpoint.latest(tmp_path)) == (8, "s8")
    assert committed(tmp_path) == ["step-00000007", "step-00000008", "step-00000010"]


def test_what_cannot_be_removed_yet_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5, "first")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a network disk with an open file in it
    save(tmp_path, 5, "second", keep=1)
    save(tmp_path, 6, "third", keep=1)
    save(tmp_path, 6, "fourth", keep=1)
    assert content(checkpoint.latest(tmp_path)) == (6, "fourth")
    monkeypatch.undo()
    save(tmp_path, 7, "last", keep=1)
    assert committed(tmp_path) == ["step-00000007"]


def test_meta_of_every_json_shape_comes_back(tmp_path: Path) -> None:
    meta = {"rng": [2**63, -1.5, None, True], "é\ud800": {"b": "", "a": (1, 2)}, "ints": {10: "x", 9: "y"}}
    path = checkpoint.save(tmp_path, 0, lambda f: (f / "x").touch(), meta=meta, keep=1)
    assert checkpoint.verify(path).meta == {
        "rng": [2**63, -1.5, None, True],
        "é\ud800": {"b": "", "a": [1, 2]},
        "ints": {"10": "x", "9": "y"},
    }


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": object()}, {"x": {1: 2, "a": 3}, "y": b"z"}])
def test_meta_that_json_cannot_hold_is_refused_before_writing(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="meta of step 3"):
        checkpoint.save(tmp_path, 3, lambda _: pytest.fail("wrote"), meta=bad, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_begin_and_commit_may_lie_in_different_threads(tmp_path: Path) -> None:
    temporary = checkpoint.begin(tmp_path, 4)
    (temporary / "x").write_text("x")
    thread = threading.Thread(target=checkpoint.commit, args=(temporary,), kwargs={"meta": {}, "keep": 1})
    thread.start()
    thread.join()
    found = checkpoint.latest(tmp_path)
    assert found
    assert found.step == 4
    with pytest.raises(CheckpointError, match="not being written by this process"):
        checkpoint.commit(temporary, meta={}, keep=1)
    checkpoint.abort(temporary)


# --- deaths


@pytest.mark.parametrize("failpoint", FAILPOINTS)
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_death_at_a_failpoint_leaves_a_whole_checkpoint(
    tmp_path: Path, saver: Saver, failpoint: str, again: bool
) -> None:
    save(tmp_path, 1, "one")
    save(tmp_path, 2, "two")
    step, keep = (2, 1) if again else (3, 2)
    status = saver.save(tmp_path, step, "new", keep=keep, failpoint=failpoint)
    reached = again or failpoint != "old_moved_aside"
    assert status == (86 if reached else 0)
    pointed = failpoint in ("pointer_replaced", "retention_deleted") or not reached
    published = pointed or (again and failpoint == "directory_renamed")
    assert content(checkpoint.latest(tmp_path)) == ((step, "new") if published else (2, "two"))
    assert saver.save(tmp_path, 4, "next") == 0  # a lock of the dead does not hold
    assert content(checkpoint.latest(tmp_path)) == (4, "next")
    assert leftovers(tmp_path) == []


def test_death_while_the_only_checkpoint_is_replaced(tmp_path: Path, saver: Saver) -> None:
    save(tmp_path, 1, "only")
    assert saver.save(tmp_path, 1, "new", failpoint="old_moved_aside") == 86
    assert content(checkpoint.latest(tmp_path)) == (1, "only")
    checkpoint.abort(checkpoint.begin(tmp_path, 2))
    assert committed(tmp_path) == ["step-00000001"]
    assert content(checkpoint.verify(tmp_path / "step-00000001")) == (1, "only")


def test_an_unknown_failpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("manifest", "file_synced:ENOWHERE", "file_synced:errorcode"):
        monkeypatch.setenv("STATESET_RAY_FAILPOINT", setting)
        with pytest.raises(CheckpointError, match="no such failpoint"):
            save(tmp_path, 1, "x")


# --- errors


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EIO"])
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_an_error_of_the_disk_is_told_and_harms_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failpoint: str,
    name: str,
) -> None:
    save(tmp_path, 1, "one")
    save(tmp_path, 2, "two")
    monkeypatch.setenv("STATESET_RAY_FAILPOINT", f"{failpoint}:{name}")
    step, keep = (2, 1) if failpoint == "old_moved_aside" else (3, 2)
    if failpoint == "retention_deleted":  # the new checkpoint stands: not a reason to stop a run
        save(tmp_path, step, "new", keep=keep)
        assert "cannot be removed" in caplog.text
    else:
        with pytest.raises(CheckpointError, match=f"step {step} was not .*MiB free") as caught:
            save(tmp_path, step, "new", keep=keep)
        assert caught.value.mend
        assert isinstance(caught.value.__cause__, OSError)
        assert leftovers(tmp_path) == []
    monkeypatch.delenv("STATESET_RAY_FAILPOINT")
    assert content(checkpoint.latest(tmp_path)) in ((2, "two"), (3, "new"))
    save(tmp_path, 3, "next", timeout=1)
    assert content(checkpoint.latest(tmp_path)) == (3, "next")
    assert leftovers(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a really full disk needs the mount command")
    if mounted.returncode:
        pytest.skip(f"a really full disk needs the right to mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save(root, 1, "one")
    with pytest.raises(CheckpointError, match=r"No space left.* of 0\.2 MiB free") as caught:
        checkpoint.save(root, 2, lambda f: _fill(f / "big", 1 << 20), meta={}, keep=2)
    assert "make room" in str(caught.value)
    assert leftovers(root) == []
    assert content(checkpoint.latest(root)) == (1, "one")
    save(root, 2, "two")
    assert content(checkpoint.latest(root)) == (2, "two")


def test_a_disk_without_room_for_the_manifest(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save(root, 1, "one")

    def write(folder: Path) -> None:
        (folder / "x").touch()
        with pytest.raises(OSError, match="No space"):
            _fill(folder / "big", 1 << 20)

    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(root, 2, write, meta={}, keep=2)
    assert content(checkpoint.latest(root)) == (1, "one")
    assert leftovers(root) == []


def test_a_disk_that_turns_read_only(small_disk: Path) -> None:
    save(small_disk, 1, "one")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="Read-only") as caught:
        save(small_disk, 2, "two")
    assert "mount it writable" in str(caught.value)
    assert content(checkpoint.latest(small_disk)) == (1, "one")


def _fill(path: Path, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, 4096):
            file.write(b"\1" * 4096)


def test_a_file_size_limit(tmp_path: Path) -> None:
    code = (
        "import resource\nfrom pathlib import Path\nfrom stateset_ray import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        f"checkpoint.save(Path({str(tmp_path)!r}), 1, "
        "lambda f: (f / 'x').write_bytes(bytes(100_000)), meta={}, keep=1)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "CheckpointError" in child.stderr
    assert "ulimit -f" in child.stderr
    assert leftovers(tmp_path) == []
    assert checkpoint.latest(tmp_path) is None


def test_a_failing_writer_is_named_and_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1, "one")

    def write(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise raised

    for raised, wanted in [
        (RuntimeError("rank 3 said no"), CheckpointError),
        (LearnerError("rank 3 died"), LearnerError),  # already says what to do
        (KeyboardInterrupt("stop"), KeyboardInterrupt),
    ]:
        with pytest.raises(wanted, match=str(raised)):
            checkpoint.save(tmp_path, 2, write, meta={}, keep=1)
        assert leftovers(tmp_path) == []
    assert content(checkpoint.latest(tmp_path)) == (1, "one")


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda folder: None, "nothing was written"),
        (lambda folder: (folder / "manifest.json").touch(), "reserved name"),
        (lambda folder: (folder / "x").symlink_to("/etc/hostname"), "plain files only"),
        (lambda folder: folder.rmdir(), "No such file"),
    ],
)
def test_a_writer_that_leaves_nonsense(tmp_path: Path, write: Any, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint.save(tmp_path, 1, write, meta={}, keep=1)
    assert committed(tmp_path) == []


def test_arguments_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="0 or more"):
        checkpoint.begin(tmp_path, -1)
    with pytest.raises(CheckpointError, match="at least one"):
        save(tmp_path, 1, "x", keep=0)


# --- damage


@pytest.mark.parametrize("name", [*STEP_NAMES, "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "grow", "remove", "link"])
def test_damage_is_found_and_the_older_checkpoint_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    save(tmp_path, 1, "one")
    file = save(tmp_path, 2, "two") / name
    damage(file, how)
    with pytest.raises(CheckpointError, match=file.name if how != "link" else "no links") as caught:
        checkpoint.verify(file.parents[name.count("/")])
    assert caught.value.mend or how == "link"
    assert content(checkpoint.latest(tmp_path)) == (1, "one")
    assert "step-00000002" in caplog.text


def damage(file: Path, how: str, at: int = 7) -> None:
    raw = bytearray(file.read_bytes())
    if how == "flip":
        raw[at % len(raw)] ^= 1
        file.write_bytes(raw)
    elif how == "truncate":
        file.write_bytes(raw[:-1])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "grow":
        file.write_bytes(raw + b"\n")
    elif how == "remove":
        file.unlink()
    elif how == "link":
        file.rename(file.with_suffix(".target"))
        file.symlink_to(file.with_suffix(".target"))


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1, "one") / "manifest.json"
    raw = path.read_bytes()
    for at in range(0, len(raw), 3):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        with pytest.raises(CheckpointError):
            checkpoint.verify(path.parent)


def test_foreign_files_and_other_formats_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, "one")
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is not in the manifest"):
        checkpoint.verify(path)
    (path / "adapter_config.json").unlink()
    manifest = path / "manifest.json"
    for text, complaint in [
        ("[]", "not as it was written"),
        ("[" * 100_000, "not as it was written"),
        ('{"format": 2, "step": 1}', "format 2"),
        ('{"format": 1, "step": 1, "meta": {}, "files": [], "digest": ""}', "not as it was written"),
    ]:
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=complaint):
            checkpoint.verify(path)


def test_a_folder_under_another_steps_name(tmp_path: Path) -> None:
    save(tmp_path, 1, "one").rename(tmp_path / "step-00000009")
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "step-00000009").rename(tmp_path / "best")  # a name of the user's own is fine
    assert content(checkpoint.open_checkpoint(tmp_path / "best")) == (1, "one")


@pytest.mark.parametrize("pointer", [b"", b"step-", b"\xff\xfe", b"../../etc", b"step-00000099\n", None])
def test_a_damaged_pointer_loses_nothing(tmp_path: Path, pointer: bytes | None) -> None:
    save(tmp_path, 1, "one")
    save(tmp_path, 2, "two")
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_bytes(pointer)
    assert content(checkpoint.latest(tmp_path)) == (2, "two")


def test_newer_checkpoints_are_the_last_resort(tmp_path: Path) -> None:
    for step in (9, 5, 6):
        save(tmp_path, step, f"s{step}")
    for name in ("step-00000005", "step-00000006"):
        damage(tmp_path / name / "model.safetensors", "flip")
    assert content(checkpoint.latest(tmp_path)) == (9, "s9")


def test_open_checkpoint_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no checkpoint has been saved"):
        checkpoint.open_checkpoint(tmp_path)
    damage(save(tmp_path / "checkpoints", 1, "one") / "model.safetensors", "flip")
    with pytest.raises(CheckpointError, match=r"none of the 1 .*model\.safetensors has changed"):
        checkpoint.open_checkpoint(tmp_path)


# --- company


def test_a_second_writer_hears_who_it_waits_for(tmp_path: Path) -> None:
    temporary = checkpoint.begin(tmp_path, 7)
    with pytest.raises(CheckpointError, match=rf"waited 0.1 s .*process {os.getpid()} .*step 7"):
        save(tmp_path, 8, "x", timeout=0.1)
    assert temporary.is_dir()
    checkpoint.abort(temporary)
    save(tmp_path, 8, "x", timeout=0.1)


def test_concurrent_writers_and_a_reader(tmp_path: Path) -> None:
    savers = [Saver() for _ in range(3)]
    statuses: list[int] = []

    def work(index: int) -> None:
        for step in range(8):
            statuses.append(savers[index].save(tmp_path, step, f"w{index}-{step}", keep=3))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in threads):
        seen += checkpoint.latest(tmp_path) is not None
    for thread in threads:
        thread.join()
    for saver in savers:
        saver.close()
    assert statuses == [0] * 24
    assert seen > 0
    assert content(checkpoint.latest(tmp_path)) in {(7, f"w{i}-7") for i in range(3)}
    assert leftovers(tmp_path) == []


class Life(RuleBasedStateMachine):
    """Saves, deaths and damage in any order: what the loader hands out is always one whole save."""

    saver: Saver

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.written: set[tuple[int, str]] = set()
        self.last: tuple[int, str] | None = None  # committed, undamaged since
        self.attempts: set[tuple[int, str]] = set()  # died since then: may or may not stand

    def teardown(self) -> None:
        self.folder.cleanup()

    def stamp(self, step: int) -> tuple[int, str]:
        self.written.add(made := (step, f"n{len(self.written)}"))
        return made

    @rule(step=st.integers(0, 6), keep=st.integers(1, 3))
    def save(self, step: int, keep: int) -> None:
        self.last = self.stamp(step)
        self.attempts.clear()
        save(self.root, *self.last, keep=keep)
        assert not leftovers(self.root)

    @rule(step=st.integers(0, 6), keep=st.integers(1, 3), failpoint=st.sampled_from(FAILPOINTS))
    def die(self, step: int, keep: int, failpoint: str) -> None:
        attempt = self.stamp(step)
        status = self.saver.save(self.root, *attempt, keep=keep, failpoint=failpoint)
        assert status in (0, 86)
        if status == 0:  # the failpoint did not lie on the way
            self.last = attempt
            self.attempts.clear()
        else:
            self.attempts.add(attempt)

    @precondition(lambda self: committed(self.root))
    @rule(data=st.data(), how=st.sampled_from(["flip", "truncate", "grow", "remove"]), at=st.integers(0, 999))
    def harm(self, data: st.DataObject, how: str, at: int) -> None:
        folder = self.root / data.draw(st.sampled_from(committed(self.root)))
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        if not files:
            return
        damage(data.draw(st.sampled_from(files)), how, at)
        step = int(folder.name[5:13])
        if step in {s for s, _ in self.attempts} | ({self.last[0]} if self.last else set()):
            self.last = None

    @precondition(lambda self: (self.root / "latest").exists())
    @rule()
    def lose_pointer(self) -> None:
        (self.root / "latest").unlink()
        self.last = None  # the newest is taken then, not the last

    @invariant()
    def loads_one_whole_save(self) -> None:
        found = content(checkpoint.latest(self.root))
        assert found is None or found in self.written
        if self.last:
            assert found in self.attempts | {self.last}


def test_any_life_of_a_checkpoint_folder(saver: Saver) -> None:
    Life.saver = saver
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=25,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


def test_the_checkpoint_that_an_endpoint_is_held_at_is_not_removed(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1, "pinned", keep=1)
    (tmp_path / checkpoint.PIN).write_text("step-00000001\n")
    for step in (2, 3):
        save(root, step, "later", keep=1)
    assert committed(root) == ["step-00000001", "step-00000003"]


def test_nor_are_a_canary_and_what_there_is_to_go_back_to(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        save(root, step, "served", keep=9)
    (tmp_path / checkpoint.CANARY).write_text("step-00000003 0.1\n")
    (tmp_path / checkpoint.BEFORE).write_text("step-00000001\n\nstep-00000002\n")
    save(root, 5, "later", keep=1)
    assert committed(root) == [f"step-0000000{step}" for step in (1, 2, 3, 5)]
