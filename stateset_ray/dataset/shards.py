"""The output of a batch: shards of finished rows, each whole or not there.

    OUTPUT/
      batch.json            what was asked for: which weights, which limits, which seed
      part-000000.jsonl     a shard: the finished rows of one piece, one JSON object a line
      summary.json          the counts, when all is done
      .writing-<hex>/       of the run that is going on; a later one removes it
      .lock                 one run at a time

A worker writes a shard beside, in the folder of its run, and renames it. A row is finished when a shard has
it, and in no other case. A run that begins removes the folder of the one before it first and looks at the
shards then: what a worker of a run that was killed may still be writing has nowhere to come from any more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stateset_ray.errors import ConfigError, RunError
from stateset_ray.manifest import sync_folder, write_synced
from stateset_ray.plain import plain

__all__ = ["Output", "Shard"]

_ASKED, _SUMMARY = "batch.json", "summary.json"
_SHARD = re.compile(r"part-(\d{6,})\.jsonl")


class Shard:
    """One shard to be written, by whoever works on its piece; it travels to that process.

    Args:
        folder: of the output.
        writing: of the run, beside which nothing is written.
        number: names the shard.
    """

    def __init__(self, folder: Path, writing: Path, number: int) -> None:
        self.path = folder / f"part-{number:06d}.jsonl"
        self._writing = writing
        self._tries = writing / f"{self.path.name}.tries"
        self._alone = writing / f"{self.path.name}.alone"

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows, or nothing.

        Raises:
            RunError: the disk is full, or another run has taken over.
        """
        # A name of its own: a process that was taken for dead may still be writing the same rows.
        beside = self._writing / f"{self.path.name}.{uuid.uuid4().hex}"
        try:
            write_synced(beside, "".join(_line(row) for row in rows).encode())
            beside.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise RunError(
                f"a shard cannot be written: {error.strerror}", given=str(self.path),
                mend="all nodes must see OUTPUT under this path; what is finished is whole: begin again",
            ) from error  # fmt: skip

    def rows(self) -> list[dict[str, Any]] | None:
        """What was written, or None if nothing was.

        Raises:
            RunError: it was damaged since.
        """
        if not self.path.is_file():
            return None
        return [_finished(line, self.path) for line in self.path.read_bytes().splitlines()]

    # A process may die of a row. The next one that takes the piece has to know of which.

    def note(self, what: str) -> None:
        """Remember that this is about to be tried, though this process may die of it."""
        _append(self._tries, json.dumps(what) + "\n")

    def tried(self) -> list[str]:
        """What was noted, by every process that had this piece."""
        return _whole_lines(self._tries)

    def keep(self, row: Mapping[str, Any]) -> None:
        """Keep one finished row before the others are."""
        _append(self._alone, _line(row))

    def kept(self) -> list[dict[str, Any]]:
        """The rows that were kept."""
        return _whole_lines(self._alone)


class Output:
    """The folder of a batch's output; made by `opened`."""

    def __init__(self, folder: Path, writing: Path) -> None:
        self.folder = folder
        self._writing = writing

    @staticmethod
    @contextmanager
    def opened(path: str | Path, asked: Mapping[str, Any]) -> Iterator[Output]:
        """Open a folder for one run, a new one or one that is to be continued.

        Args:
            asked: all that results follow from; plain JSON.

        Raises:
            ConfigError: it belongs to something else: other weights, other settings, or no batch at all.
            RunError: another run is writing into it, or it cannot be written.
        """
        folder = Path(path).absolute()
        _check_ours(folder)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise RunError(
                "another run is writing into this folder", given=str(folder), mend="let it finish or end it"
            ) from error
        except OSError as error:
            raise RunError(f"this folder cannot be written: {error.strerror}", given=str(folder)) from error
        writing = folder / f".writing-{uuid.uuid4().hex}"
        try:
            for left in folder.glob(".writing-*"):
                shutil.rmtree(left)
            _check_asked(folder, asked)
            writing.mkdir()
            yield Output(folder, writing)
        finally:
            shutil.rmtree(writing, ignore_errors=True)
            lock.release()

    def shard(self, number: int) -> Shard:
        """A shard that a worker may write."""
        return Shard(self.folder, self._writing, number)

    def next_number(self) -> int:
        """Of the first shard that is not there."""
        return max((int(match[1]) for match, _ in _shards(self.folder)), default=-1) + 1

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every finished row, shard by shard.

        Raises:
            RunError: a shard was damaged.
        """
        for _, path in _shards(self.folder):
            with path.open("rb") as lines:
                for line in lines:
                    yield _finished(line, path)

    def forget(self, kinds: Collection[str]) -> int:
        """Take back every row that ended with an error of these kinds; returns how many.

        Raises:
            RunError: a shard was damaged, or cannot be written.
        """
        taken = 0
        for match, path in _shards(self.folder):
            rows = self.shard(int(match[1])).rows() or []
            stay = [row for row in rows if row.get("error", {}).get("kind") not in kinds]
            if len(stay) < len(rows):
                taken += len(rows) - len(stay)
                if stay:
                    self.shard(int(match[1])).write(stay)
                else:
                    path.unlink()
        return taken

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Write what came of it."""
        beside = self._writing / _SUMMARY
        write_synced(beside, json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
        beside.replace(self.folder / _SUMMARY)


def _append(path: Path, line: str) -> None:
    """Add a line, behind one that death has cut short too.

    Raises:
        RunError: the disk is full, or another run has taken over.
    """
    try:
        with path.open("ab+") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(line.encode())
    except OSError as error:
        raise RunError(
            f"what was tried cannot be noted: {error.strerror}", given=str(path),
            mend="make room where OUTPUT lies; what is finished is whole: begin again",
        ) from error  # fmt: skip


def _whole_lines(path: Path) -> list[Any]:
    """What was appended, but for lines that death has cut short."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _line(row: Mapping[str, Any]) -> str:
    # Environments put what they like into their facts.
    return json.dumps(plain(row), ensure_ascii=False) + "\n"


def _finished(line: bytes, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise ValueError("a row without an id")
    except (ValueError, KeyError) as error:
        raise RunError(
            f"this shard is damaged: {error}", given=str(path), mend="remove it: its rows are done again"
        ) from error
    return row


def _shards(folder: Path) -> list[tuple[re.Match[str], Path]]:
    found = ((_SHARD.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((m, p) for m, p in found if m), key=lambda pair: int(pair[0][1]))


def _check_ours(folder: Path) -> None:
    """Refuse a folder that no batch has made."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError("the output is a folder, and this is a file", given=str(folder))
    if folder.is_dir() and not (folder / _ASKED).is_file():
        strange = [p.name for p in folder.iterdir() if not p.name.startswith((".lock", ".writing-"))]
        if strange:
            raise ConfigError(
                "this folder holds something else than a batch's output", given=str(folder),
                mend="give a new folder, or one that an earlier batch has written",
            )  # fmt: skip


def _check_asked(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuse to add rows to those of other weights or settings."""
    wanted = json.loads(json.dumps(asked))
    path = folder / _ASKED
    if not path.is_file():
        beside = folder / f".lock.{_ASKED}"  # what death leaves of it is passed over by `_check_ours`
        write_synced(beside, json.dumps(wanted, indent=2).encode() + b"\n")
        os.replace(beside, path)
        return
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{_ASKED} is damaged", given=str(path), mend="take another folder") from error
    differ = sorted(key for key in before.keys() | wanted.keys() if before.get(key) != wanted.get(key))
    if differ:
        raise ConfigError(
            "this folder holds the results of another batch: " + "; ".join(
                f"{key} was {before.get(key)!r} and is {wanted.get(key)!r}" for key in differ
            ),
            given=str(folder),
            mend="give a new folder, or ask for the same (name the checkpoint where a run has newer ones)",
        )  # fmt: skip
