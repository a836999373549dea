"""The output of a batch: whole shards, one run at a time, and a worker that takes up where others died."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stateset_ray.actors.batch.results import Answers
from stateset_ray.actors.batch.worker import BatchWorker, Piece
from stateset_ray.batch import PASSING
from stateset_ray.config import load_config
from stateset_ray.dataset.files import scan
from stateset_ray.dataset.rows import Row
from stateset_ray.dataset.shards import Output, Shard
from stateset_ray.errors import ClusterError, ConfigError, RunError

ASKED = {"mode": "generate", "seed": 0}


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with Output.opened(tmp_path / "out", ASKED) as out:
        shard = out.shard(3)
        assert shard.rows() is None
        shard.write([{"id": 7, "text": "line\u2028separator \ud800"}, {"id": "7", "fact": {1, 2}}])
        assert [row["id"] for row in out.rows()] == [7, "7"]
        assert shard.rows() is not None
        assert out.next_number() == 4
        out.conclude({"rows": 2})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock", "batch.json", "part-000003.jsonl", "summary.json"
    ]  # fmt: skip


def test_errors_that_may_pass_are_taken_back_and_nothing_else(tmp_path: Path) -> None:
    late, wrong = {"kind": "timeout", "message": "60 s"}, {"kind": "invalid", "message": "no JSON"}
    shards = [
        [{"id": 1}, {"id": 2, "error": late}, {"id": 3, "error": wrong}],
        [{"id": 4, "error": late}],
        [{"id": 5}],
    ]
    with Output.opened(tmp_path, ASKED) as out:
        for number, rows in enumerate(shards):
            out.shard(number).write(rows)
        untouched = (tmp_path / "part-000002.jsonl").stat().st_ino
    with Output.opened(tmp_path, ASKED) as out:
        assert out.forget(PASSING) == 2
        assert [row["id"] for row in out.rows()] == [1, 3, 5]
        assert out.forget(PASSING) == 0
        assert out.next_number() == 3
    assert (tmp_path / "part-000002.jsonl").stat().st_ino == untouched
    assert not (tmp_path / "part-000001.jsonl").exists()


def test_what_a_killed_run_was_writing_goes_nowhere(tmp_path: Path) -> None:
    """Its workers may outlive it: their shards must not come in behind the back of the run that follows."""
    with Output.opened(tmp_path, ASKED) as out:
        zombie = pickle.loads(pickle.dumps(out.shard(0)))
        out._writing.rename(tmp_path / ".writing-left")  # as if it had been killed here
        zombie._writing = tmp_path / ".writing-left"
    with Output.opened(tmp_path, ASKED) as out:
        with pytest.raises(RunError, match="a shard cannot be written"):
            zombie.write([{"id": 1}])
        assert list(out.rows()) == []
    assert not list(tmp_path.glob(".writing-*"))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        Output.opened(tmp_path, ASKED),
        pytest.raises(RunError, match="another run is writing into this folder"),
        Output.opened(tmp_path, ASKED),
    ):
        pass
    with Output.opened(tmp_path, ASKED):
        pass


def test_results_of_other_weights_or_settings_are_not_mixed(tmp_path: Path) -> None:
    with Output.opened(tmp_path / "out", ASKED):
        pass
    with (
        pytest.raises(ConfigError, match="seed was 0 and is 1"),
        Output.opened(tmp_path / "out", ASKED | {"seed": 1}),
    ):
        pass
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with (
        pytest.raises(ConfigError, match="something else than a batch's output"),
        Output.opened(tmp_path / "thesis", ASKED),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="this is a file"),
        Output.opened(tmp_path / "thesis" / "chapter.tex", ASKED),
    ):
        pass


@pytest.mark.parametrize("damage", ['{"id": "b"', '{"text": 1}', "[]", '{"id": true}', ""])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    with Output.opened(tmp_path, ASKED) as out:
        out.shard(0).write([{"id": "a"}])
        out.shard(0).path.write_text('{"id": "a"}\n' + damage + "\n")
        with pytest.raises(RunError, match="this shard is damaged"):
            list(out.rows())


class _Died(BaseException):
    """In the place of a process that dies."""


class Scripted:
    """Answers with the number of messages; dies of conversations with `kill` in them."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []

    def answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        self.calls.append([row.id for row in rows])
        if any("kill" in message.content for row in rows for message in row.messages):
            raise _Died
        return [{"id": row.id, "said": len(row.messages)} for row in rows]


class Worker(BatchWorker):
    """One that needs no model."""

    scripted: Answers | None = None

    def _set_up(self) -> Answers:
        if self.scripted is None:
            raise _Died
        return self.scripted


def worker(answers: Answers | None) -> BatchWorker:
    made = Worker(load_config(None, ["rollout.retries=1"]), "generate", 1, ())
    made.scripted = answers
    return made


def piece(folder: Path, shard: Shard, *texts: str) -> Piece:
    rows = [{"id": f"r{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return Piece(scan(str(path), "generate").places, shard)


def test_a_piece_becomes_its_shard(tmp_path: Path) -> None:
    with Output.opened(tmp_path / "out", ASKED) as out:
        work = piece(tmp_path, out.shard(0), "a", "b")
        told = worker(Scripted())({"piece": [pickle.dumps(work)]})
        assert json.loads(told["report"][0]) == {"": 2, "invalid": 1}
        done = list(out.rows())
        assert [row["id"] for row in done] == ["r0", "r1", "row-3"]
        assert done[2]["error"]["kind"] == "invalid"
        # Dealt again because its report was lost: nothing is done twice.
        again = Scripted()
        assert worker(again).work(work) == {"": 2, "invalid": 1}
        assert again.calls == []


def test_a_row_that_processes_die_of_ends_alone(tmp_path: Path) -> None:
    with Output.opened(tmp_path / "out", ASKED) as out:
        work = piece(tmp_path, out.shard(0), "a", "kill", "c")
        deaths = 0
        while True:
            answers = Scripted()
            try:
                told = worker(answers).work(work)
            except _Died:
                deaths += 1
                assert deaths < 10
            else:
                break
        # Once with all the others, and then `retries` + 1 times alone.
        assert deaths == 3
        assert told == {"": 2, "died": 1, "invalid": 1}
        rows = list(out.rows())
        assert [row["id"] for row in rows] == ["r0", "r1", "r2", "row-4"]
        assert "2 processes have died" in rows[1]["error"]["message"]
        assert answers.calls == [["r2"], []]  # the first row was finished by the process before


def test_processes_that_die_before_any_row_stop_the_run(tmp_path: Path) -> None:
    with Output.opened(tmp_path / "out", ASKED) as out:
        work = piece(tmp_path, out.shard(0), "a")
        for _ in range(3):
            with pytest.raises(_Died):
                worker(None).work(work)
        with pytest.raises(ClusterError, match="3 processes, one after the other, died"):
            worker(None).work(work)


def test_a_row_is_written_whatever_an_environment_put_into_its_facts(tmp_path: Path) -> None:
    facts = {"score": np.float32(0.5), "seen": {1}, (1, 2): float("nan"), "half": "\ud83d"}
    with Output.opened(tmp_path / "out", ASKED) as out:
        shard = out.shard(0)
        shard.keep({"id": "a", "info": facts})
        [row] = shard.kept()
    assert row["info"] == {"score": 0.5, "seen": [1], "(1, 2)": None, "half": "?"}


def test_a_line_that_death_has_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    with Output.opened(tmp_path / "out", ASKED) as out:
        shard = out.shard(0)
        shard.note("a")
        shard.keep({"id": "a"})
        for path in (shard._tries, shard._alone):
            with path.open("ab") as file:
                file.write(b'{"id": "b')
        assert (shard.tried(), shard.kept()) == (["a"], [{"id": "a"}])
        shard.note("c")
        shard.keep({"id": "c"})
        assert (shard.tried(), shard.kept()) == (["a", "c"], [{"id": "a"}, {"id": "c"}])
    with pytest.raises(RunError, match="cannot be noted"):
        shard.note("d")  # another run has taken over
