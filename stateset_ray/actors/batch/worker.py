"""One actor of a batch: takes a piece of the data set, works on its rows, writes their shard, and reports.

Ray Data keeps a pool of these, deals pieces to them, and gives a piece to another one where an actor died.

A process may die of a row. Of which one, nobody can tell who takes the piece next: so from then on its rows
are taken alone, each noted before it begins, and one of which more than `rollout.retries` processes have died
ends with the error `died`.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stateset_ray.actors.batch.answers import Player, Replier
from stateset_ray.actors.batch.results import Answers, counted, error
from stateset_ray.actors.batch.scores import Scorer
from stateset_ray.config import Config
from stateset_ray.dataset.files import Place, read
from stateset_ray.dataset.rows import Id, Mode, Row
from stateset_ray.dataset.shards import Shard
from stateset_ray.errors import ClusterError

__all__ = ["BatchWorker", "Piece"]

_BEGIN = "begin"  # in the notes of a piece: a process has taken it; ids are noted as JSON


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that are worked on together.

    Attributes:
        places: id -> where the row lies.
        shard: where they end.
    """

    places: dict[Id, Place]
    shard: Shard


class BatchWorker:
    """What Ray Data builds in each actor of its pool.

    Args:
        config: whose model works.
        mode: what is done with a row.
        peers: workers that share this machine's cores.
        import_paths: where the environment's module is found, besides the installed packages.
    """

    def __init__(self, config: Config, mode: Mode, peers: int, import_paths: Sequence[str]) -> None:
        self._config = config
        self._mode = mode
        self._peers = peers
        self._import_paths = import_paths
        self._answers: Answers | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Work on pieces: column `piece` in, column `report` out: JSON of how many rows ended how.

        Raises:
            StatesetError: not of a row: the model is not as configured, the disk is full.
        """
        reports = [json.dumps(self.work(pickle.loads(piece))) for piece in batch["piece"]]
        return {"report": np.array(reports, dtype=object)}

    def work(self, piece: Piece) -> dict[str, int]:
        """Work on one piece and write its shard; see `counted` for what is returned."""
        shard = piece.shard
        if (written := shard.rows()) is not None:  # by a process that died before it could say so
            return counted(written)
        tried = shard.tried()
        self._stop_if_hopeless(tried)
        shard.note(_BEGIN)
        rows = read(piece.places, self._mode)
        if self._answers is None:  # not in the constructor: Ray Data would not tell why it failed
            self._answers = self._set_up()
        done = self._do(self._answers, rows) if not tried else self._alone(self._answers, rows, shard, tried)
        shard.write(done)
        return counted(done)

    def _stop_if_hopeless(self, tried: Sequence[str]) -> None:
        """Raise where process after process has died before it came to any row."""
        begun = next((i for i, what in enumerate(reversed(tried)) if what != _BEGIN), len(tried))
        # The first of them all did not note its rows.
        if begun > self._config.rollout.retries + 1:
            raise ClusterError(
                f"{begun} processes, one after the other, died before they came to a row",
                mend="look at their logs: is there memory for the model?",
            )

    def _do(self, answers: Answers, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What becomes of each row, in order."""
        answered = iter(answers.answer([row for row in rows if not row.problem]))
        return [error(row.id, "invalid", row.problem) if row.problem else next(answered) for row in rows]

    def _alone(
        self, answers: Answers, rows: Sequence[Row], shard: Shard, tried: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The same one by one, for one of them may be what processes die of."""
        done = {row["id"]: row for row in shard.kept()}
        for row in rows:
            if row.id in done:
                continue
            deaths = tried.count(json.dumps(row.id))
            if deaths > self._config.rollout.retries:
                text = f"{deaths} processes have died while this row alone was worked on"
                done[row.id] = error(row.id, "died", text)
            else:
                shard.note(json.dumps(row.id))
                [done[row.id]] = self._do(answers, [row])
            shard.keep(done[row.id])
        return [done[row.id] for row in rows]

    def _set_up(self) -> Answers:
        sys.path[:0] = [p for p in self._import_paths if p not in sys.path]
        made: dict[Mode, type[Replier] | type[Scorer]] = {
            "generate": Replier, "score": Scorer, "play": Player
        }  # fmt: skip
        return made[self._mode](self._config, self._peers)
