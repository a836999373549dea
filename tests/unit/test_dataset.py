"""Data sets: what rows may look like, where they lie, and which are refused before anything heavy loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stateset_ray.dataset.files import cut, read, scan
from stateset_ray.dataset.rows import Row, row_of, row_of_line
from stateset_ray.errors import ConfigError, RunError
from stateset_ray.types import Message, Task


def said(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} speaks"} for role in roles]


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_a_row_of_each_kind() -> None:
    asked = row_of({"id": "a", "messages": said("developer", "user"), "label": 7}, 1, "generate")
    assert asked == Row("a", (Message("system", "developer speaks"), Message("user", "user speaks")))
    parts = [{"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]}]
    assert row_of({"id": 7, "messages": parts}, 1, "generate") == Row(7, (Message("user", "abc"),))
    written = row_of({"id": "a", "messages": json.dumps(said("user"))}, 1, "generate")
    assert written.messages == (Message("user", "user speaks"),)
    assert row_of({"id": "a", "index": 3, "seed": None}, 1, "play").index == ("heldout", 3)
    assert row_of({"id": "a", "index": 3, "split": "train"}, 1, "play").index == ("train", 3)
    task = row_of({"id": "a", "seed": 9, "data": {"word": "cab"}}, 1, "play").task
    assert task == Task("a", 9, "heldout", {"word": "cab"})


@pytest.mark.parametrize(
    ("mode", "content", "problem"),
    [
        ("generate", {"messages": said("user")}, "it has no id"),
        ("generate", {"id": True, "messages": said("user")}, "its id is True"),
        ("generate", {"id": "", "messages": said("user")}, "its id is ''"),
        ("generate", {"id": "x" * 513, "messages": said("user")}, "up to 512 characters"),
        ("generate", {"id": "a\ud800", "messages": said("user")}, "its id is"),
        ("generate", {"id": "a"}, "messages must be a list"),
        ("generate", {"id": "a", "messages": []}, "at least one message"),
        ("generate", {"id": "a", "messages": "hello"}, "a text that is no JSON"),
        ("generate", {"id": "a", "messages": ["hello"]}, "messages[0] is no object"),
        ("generate", {"id": "a", "messages": said("user", "nurse")}, "messages[1].role is 'nurse'"),
        ("generate", {"id": "a", "messages": [{"role": ["user"], "content": ""}]}, "messages[0].role"),
        ("generate", {"id": "a", "messages": [{"role": "user"}]}, "messages[0].content is no text"),
        ("generate", {"id": "a", "messages": [{"role": "user", "content": 7}]}, "content is no text"),
        ("generate", {"id": "a", "messages": [{"role": "user", "content": "\udfff"}]}, "content is no text"),
        (
            "generate",
            {"id": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "content is no text",
        ),
        (
            "generate",
            {"id": "a", "messages": [{"role": "assistant", "content": "", "tool_calls": []}]},
            "'tool_calls', which is not supported",
        ),
        ("generate", {"id": "a", "messages": said("user", "assistant")}, "nothing to reply to"),
        ("score", {"id": "a", "messages": said("user")}, "nothing to score"),
        ("score", {"id": "a", "messages": said("assistant", "user")}, "one before it"),
        ("score", {"id": "a", "messages": said("user", "assistant", "assistant")}, "one before it"),
        ("play", {"id": "a"}, "an index, or a seed"),
        ("play", {"id": "a", "index": 1, "seed": 1}, "one of the two"),
        ("play", {"id": "a", "index": -1}, "index is -1"),
        ("play", {"id": "a", "index": True}, "index is True"),
        ("play", {"id": "a", "seed": "7"}, "seed is '7'"),
        ("play", {"id": "a", "index": 1, "split": "test"}, "split is 'test'"),
        ("play", {"id": "a", "index": 1, "data": {}}, "data goes with a seed"),
        ("play", {"id": "a", "seed": 1, "data": [1]}, "data is no object"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(mode: Any, content: dict[str, Any], problem: str) -> None:
    row = row_of(content, 4, mode)
    assert problem in row.problem
    assert (row.messages, row.task, row.index) == ((), None, None)
    assert row.id == (content["id"] if content.get("id") == "a" else "row-4")


@pytest.mark.parametrize("line", [b"{bad", b"[" * 100_000, b'{"id": "\xff"}', b"7", b"null", b'{"id": NaN'])
def test_a_line_that_is_no_object_is_a_row_with_a_problem(line: bytes) -> None:
    row = row_of_line(line, 9, "generate")
    assert row.id == "row-9"
    assert row.problem


def test_rows_are_found_again_where_they_lie(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "a.jsonl",
        "\ufeff" + json.dumps({"id": "ä", "messages": said("user")}), "", "{broken",
        {"id": 7, "messages": said("user")}, "   ", {"id": "no messages"},
    )  # fmt: skip
    data = scan(source, "generate")
    assert list(data.places) == ["ä", "row-2", 7, "no messages"]
    assert data.invalid == 2
    pieces = cut(data, [7, "row-2", "ä"], 2)
    assert [list(piece) for piece in pieces] == [[7, "row-2"], ["ä"]]
    [seven, broken], [first] = (read(piece, "generate") for piece in pieces)
    assert seven.messages == first.messages == (Message("user", "user speaks"),)
    assert "no JSON" in broken.problem


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    lines(tmp_path / "b.ndjson", {"id": "second", "messages": said("user")}, "{")
    lines(tmp_path / "a.jsonl", {"id": "first", "messages": said("user")})
    (tmp_path / "notes.txt").write_text("not a row")
    assert list(scan(str(tmp_path), "generate").places) == ["first", "second", "row-3"]


def test_parquet_with_messages_as_structs_and_as_text(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for name, column in (("structs", said("user")), ("text", json.dumps(said("user")))):
        rows = [{"id": i, "messages": column, "label": "x"} for i in range(5)]
        rows[3]["messages"] = None
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=2)
        data = scan(str(tmp_path / f"{name}.parquet"), "generate")
        assert list(data.places) == [0, 1, 2, 3, 4]
        found = read(data.places, "generate")
        assert [row.id for row in found] == [0, 1, 2, 3, 4]
        assert found[4].messages == (Message("user", "user speaks"),)
        assert "messages must be a list" in found[3].problem
    with pytest.raises(ConfigError, match="lacks the column 'seed'"):
        scan(str(tmp_path / "text.parquet"), "play")
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(ConfigError, match="no Parquet file"):
        scan(str(tmp_path / "no.parquet"), "generate")


def test_tasks_of_the_environment() -> None:
    data = scan("heldout:3", "play")
    assert list(data.places) == ["heldout-0", "heldout-1", "heldout-2"]
    assert [row.index for row in read(data.places, "play")] == [("heldout", i) for i in range(3)]
    for source, mode in (("heldout:3", "score"), ("heldout:0", "play"), ("train:x", "play")):
        with pytest.raises(ConfigError, match="stands for the first N tasks"):
            scan(source, mode)  # type: ignore[arg-type]


def test_what_is_wrong_as_a_whole_is_refused(tmp_path: Path) -> None:
    row = {"id": "a", "messages": said("user")}
    for name, content, problem in (
        ("twice.jsonl", [row, {"id": "b"}, row], "rows 1 and 3 of the data set have the same id"),
        ("empty.jsonl", ["", "  "], "has no rows"),
        ("array.json", ["[", json.dumps(row), "]"], None),
        ("csv.csv", ["id,messages"], "no data set that can be read"),
        ("unusable.jsonl", [{"id": "a"}, "{"], "not one of the 2 rows can be used to generate"),
    ):
        source = lines(tmp_path / name, *content)
        if problem:
            with pytest.raises(ConfigError, match=problem):
                scan(source, "generate")
        else:  # one line of it is a row by accident: the others are not
            assert scan(source, "generate").invalid == 2
    with pytest.raises(ConfigError, match="there is no such data set"):
        scan(str(tmp_path / "none.jsonl"), "generate")


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", {"id": "a", "messages": said("user")})
    data = scan(source, "generate")
    lines(tmp_path / "a.jsonl", {"id": "b", "messages": said("user")})
    with pytest.raises(RunError, match="row 1 of the data set was 'a' and is 'b' now"):
        read(data.places, "generate")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(RunError, match="cannot be read again"):
        read(data.places, "generate")


def test_the_rows_in_the_document_are_rows() -> None:
    text = (Path(__file__).parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
    shown = [block.strip().splitlines() for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert [len(block) for block in shown] == [1, 2]
    for mode, block in zip(("generate", "play"), shown, strict=True):
        assert [row_of_line(line.encode(), 1, mode).problem for line in block] == [""] * len(block)
