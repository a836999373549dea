"""Where the rows of a data set lie: JSON lines or Parquet files, or the tasks of an environment.

`scan` keeps ids and places only (of Parquet it reads that column, of JSON lines every line), so that who
plans holds no conversation; `read` gives the rows of one piece, wherever the files are seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, get_args

from stateset_ray.dataset.rows import TASK_FIELDS, Id, Mode, Row, checked_id, row_of, row_of_line
from stateset_ray.errors import ConfigError, RunError
from stateset_ray.types import Split

__all__ = ["DataSet", "Place", "check_source", "cut", "read", "scan"]

_LINES = (".jsonl", ".ndjson", ".json")
_SHOWN = 3  # problems that an error shows


class Place(NamedTuple):
    """Where a row lies.

    Attributes:
        file: its file, or the split that its task is of.
        number: of the row in the data set, from 1.
        start: of its line in bytes, its row in a Parquet file, or the index of its task.
        size: of its line in bytes; 0 elsewhere.
    """

    file: str
    number: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class DataSet:
    """What `scan` found.

    Attributes:
        places: id -> where the row lies, in order.
        invalid: rows that have a problem, as far as one can tell without reading all of them.
    """

    places: dict[Id, Place]
    invalid: int = 0


def check_source(source: str) -> None:
    """Look whether a data set is there at all, and not empty; `scan` reads it.

    Raises:
        ConfigError: it is not there, is nothing that can be read, or all of its files are empty.
    """
    split, colon, _ = source.partition(":")
    if colon and split in get_args(Split) and not Path(source).exists():
        return
    try:
        if not any(file.stat().st_size for file in _files(source)):
            raise ConfigError("the data set has no rows", given=source)
    except OSError as error:
        raise ConfigError(f"the data set cannot be read: {error.strerror}", given=source) from error


def scan(source: str, mode: Mode) -> DataSet:
    """The ids of a data set, and where its rows lie.

    Args:
        source: a JSON lines or Parquet file, a folder of them (taken in the order of their names), or
            `heldout:N` (`train:N`): the first N tasks of the environment, to be played.
        mode: what is to be done with the rows.

    Raises:
        ConfigError: it cannot be read, has no rows, has not one that can be used, or two rows have one id.
    """
    split, colon, count = source.partition(":")
    if colon and split in get_args(Split) and not Path(source).exists():
        return _tasks(split, count, mode)
    places: dict[Id, Place] = {}
    problems: list[str] = []
    number = 0
    for file in _files(source):
        found = (
            _scan_lines(file, mode, number) if file.suffix in _LINES else _scan_parquet(file, mode, number)
        )
        for row, place in found:
            number = place.number
            if before := places.get(row.id):
                raise ConfigError(
                    f"rows {before.number} and {number} of the data set have the same id",
                    given=row.id,
                    mend="give each row an id of its own: results are told apart by it",
                )
            places[row.id] = place
            if row.problem:
                problems.append(f"row {number}: {row.problem}")
    if not places:
        raise ConfigError("the data set has no rows", given=source)
    if len(problems) == len(places):
        raise ConfigError(
            f"not one of the {len(places)} rows can be used to {mode}",
            given="\n".join(["", *problems[:_SHOWN]]),
            mend="see docs/batch.md for what a row looks like",
        )
    return DataSet(places, len(problems))


def cut(data: DataSet, ids: Sequence[Id], size: int) -> list[dict[Id, Place]]:
    """These rows in pieces of at most `size`, in order.

    Example:
        >>> rows = DataSet({"a": Place("heldout", 1, 0, 0), "b": Place("heldout", 2, 1, 0)})
        >>> [list(piece) for piece in cut(rows, ["a", "b"], 1)]
        [['a'], ['b']]
    """
    return [{id: data.places[id] for id in ids[i : i + size]} for i in range(0, len(ids), size)]


def read(piece: dict[Id, Place], mode: Mode) -> list[Row]:
    """The rows of a piece.

    Raises:
        RunError: a file is gone, or is not as it was scanned.
    """
    rows = []
    for id, place in piece.items():
        if place.file in get_args(Split):
            split: Split = "train" if place.file == "train" else "heldout"
            rows.append(Row(id, index=(split, place.start)))
            continue
        try:
            row = _row_at(place, mode)
        except (OSError, ValueError, IndexError) as error:
            raise RunError(
                f"row {place.number} of the data set cannot be read again: {error}", given=place.file,
                mend="all nodes must see the file under this path, and nobody may change it meanwhile",
            ) from error  # fmt: skip
        if row.id != id:
            raise RunError(
                f"row {place.number} of the data set was {id!r} and is {row.id!r} now", given=place.file,
                mend="begin again: the file was changed meanwhile",
            )  # fmt: skip
        rows.append(row)
    return rows


def _tasks(split: str, count: str, mode: Mode) -> DataSet:
    if mode != "play" or not count.isdecimal() or not int(count):
        raise ConfigError(
            f"{split}:N stands for the first N tasks of the environment, to be played",
            given=f"{split}:{count}, to {mode}",
            mend=f"for example {split}:1000 with --play",
        )
    return DataSet({f"{split}-{i}": Place(split, i + 1, i, 0) for i in range(int(count))})


def _files(source: str) -> list[Path]:
    path = Path(source).absolute()
    known = (*_LINES, ".parquet")
    found = sorted(p for p in path.iterdir() if p.suffix in known) if path.is_dir() else [path]
    if not found or not all(file.is_file() and file.suffix in known for file in found):
        raise ConfigError(
            "there is no such data set" if not path.exists() else "this is no data set that can be read",
            given=source,
            mend=f"give a file that ends in {', '.join(known)}, a folder of them, or heldout:N with --play",
        )
    return found


def _scan_lines(file: Path, mode: Mode, before: int) -> Iterator[tuple[Row, Place]]:
    start, number = 0, before
    try:
        with file.open("rb") as lines:
            for line in lines:
                if line.strip():  # blank lines are no rows
                    number += 1
                    place = Place(str(file), number, start, len(line))
                    yield row_of_line(line, number, mode), place
                start += len(line)
    except OSError as error:
        raise ConfigError(f"the data set cannot be read: {error.strerror}", given=str(file)) from error


def _scan_parquet(file: Path, mode: Mode, before: int) -> Iterator[tuple[Row, Place]]:
    table = _parquet(str(file))
    names = set(table.schema_arrow.names)
    wanted = {"id", "messages"} if mode != "play" else {"id"} | ({"index"} if "index" in names else {"seed"})
    if missing := wanted - names:
        raise ConfigError(
            f"this file lacks the column {min(missing)!r}, without which there is nothing to {mode}",
            given=sorted(names),
            mend="see docs/batch.md for what a row looks like",
        )
    number, start = before, 0
    for batch in table.iter_batches(columns=["id"]):
        for value in batch.column(0).to_pylist():
            number += 1
            id, problem = checked_id(value, number)
            yield Row(id, problem=problem), Place(str(file), number, start, 0)
            start += 1


def _parquet(file: str) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            "Parquet files need pyarrow", given=file, mend="pip install 'stateset-ray[batch]'"
        ) from error
    try:
        return ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ConfigError(f"this is no Parquet file: {error}", given=file) from error


@lru_cache(8)
def _row_group_ends(file: str) -> list[int]:
    metadata = _parquet(file).metadata
    return list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))


@lru_cache(1)
def _row_group(file: str, group: int) -> list[dict[str, Any]]:
    """The rows of a row group; the last one is kept, because pieces are read in order."""
    table = _parquet(file)
    wanted = [name for name in ("id", "messages", *TASK_FIELDS) if name in table.schema_arrow.names]
    rows: list[dict[str, Any]] = table.read_row_group(group, columns=wanted).to_pylist()
    return rows


def _row_at(place: Place, mode: Mode) -> Row:
    if Path(place.file).suffix in _LINES:
        with open(place.file, "rb") as lines:
            lines.seek(place.start)
            return row_of_line(lines.read(place.size), place.number, mode)
    ends = _row_group_ends(place.file)
    group = bisect_right(ends, place.start)
    if group == len(ends):
        raise IndexError(f"the file has only {ends[-1] if ends else 0} rows")
    row = place.start - (ends[group - 1] if group else 0)
    return row_of(_row_group(place.file, group)[row], place.number, mode)
