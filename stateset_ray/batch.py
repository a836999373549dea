"""Work on a whole data set with a policy, on as many nodes as there are: Ray Data over an actor pool.

    rows -> pieces -> Ray Data deals them to `BatchWorker`s -> shards

The controller plans pieces and counts; the rows travel from the files to the workers, and from there into
the output's files. Every row of the data set ends exactly once, in one shard: as a result or as an error.
Whatever a run ended with, the next one begins behind its finished shards.

Who waits: the controller for the next finished piece. What unblocks it is a worker, or the limit on doing
nothing (`cluster.wait_seconds` and the time limits of the rows of a piece).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group

from stateset_ray.actors.batch.worker import BatchWorker, Piece
from stateset_ray.actors.placement import cluster, import_paths
from stateset_ray.actors.remote import cause_of
from stateset_ray.config import Config
from stateset_ray.dataset.files import DataSet, cut, scan
from stateset_ray.dataset.rows import Id, Mode
from stateset_ray.dataset.shards import Output
from stateset_ray.environments.base import build_environment
from stateset_ray.errors import ClusterError, ConfigError, RunError, WaitTimeout
from stateset_ray.manifest import MANIFEST
from stateset_ray.models import check_fits, load_tokenizer, local_folder
from stateset_ray.policies.renderer import Renderer

__all__ = ["PASSING", "OnProgress", "batch"]

PASSING = frozenset(("died", "infrastructure_error", "timeout"))
"""Kinds of errors of which the row itself need not be the cause."""

OnProgress = Callable[[int, int], None]
"""Told how many rows are finished, and how many there are."""

_OWN_CLUSTER = 5.0  # seconds in which a cluster that cannot grow gives room, if it has it
_ROUNDS = 4  # conversations that a piece has for each slot of a worker: its last ones leave slots idle
_FIRST_ERRORS = 3


def batch(
    config: Config, source: str, output: str | Path, mode: Mode, *, replicas: int = 0,
    retry_errors: bool = False, on_progress: OnProgress = lambda done, rows: None,
) -> dict[str, Any]:  # fmt: skip
    """Generate replies, score given ones, or play tasks, for every row of a data set.

    Args:
        config: of the policy, with its weights as `model.name`; replies keep to the limits of `[rollout]`,
            are sampled at `evaluate.temperature` and seeded by `run.seed` and their row's id.
        source: see `dataset.scan`.
        output: a folder that all nodes see; what an earlier run has finished there is not done again.
        mode: what to do.
        replicas: how many workers there may be at once; 0: `rollout.engines` or `rollout.workers`.
        retry_errors: do the rows again that ended with an error which may pass: `PASSING`.

    Returns:
        What `summary.json` in `output` holds: `rows` = `done` + all `errors`, by kind; `before`, those of
        them that earlier runs had finished; with "play" also the figures of `evaluate`.

    Raises:
        StatesetError: what is wrong, and how to mend it. Nothing that is finished is lost.
    """
    if mode == "play":
        build_environment(config.environment.path, config.environment.options)
    data = scan(source, mode)
    check_fits(config)
    count = replicas or config.rollout.engines or config.rollout.workers
    Renderer(load_tokenizer(config.model.name))  # a chat template it refuses, every worker would refuse
    local_folder(config.model.name)  # built once here, not by every actor at the same time
    with Output.opened(output, _asked(config, mode)) as out:
        if retry_errors:
            out.forget(PASSING)
        finished = {row["id"] for row in out.rows()}
        pending = [id for id in data.places if id not in finished]
        before = len(data.places) - len(pending)
        started = time.monotonic()
        if pending:
            size = max(1, min(_ROUNDS * config.rollout.slots, math.ceil(len(pending) / count)))
            first = out.next_number()
            planned = cut(data, pending, size)
            pieces = [Piece(rows, out.shard(first + i)) for i, rows in enumerate(planned)]
            room = _room(config)
            with (
                cluster(config, at_least_cpus=count * room["num_cpus"]),
                # Closed at once, however it ends: Ray Data ends its actors when nobody holds the iterator.
                closing(_reports(config, mode, pieces, count, room)) as reports,
            ):
                done = before
                for report in reports:
                    done += sum(report.values())
                    on_progress(done, len(data.places))
        summary = _summary(out, data, mode, before)
        summary["seconds"] = round(time.monotonic() - started, 1)
        out.conclude(summary)
        return summary


def _asked(config: Config, mode: Mode) -> dict[str, Any]:
    """All that a row's result follows from, beside the row."""
    limits = config.rollout
    asked: dict[str, Any] = {
        "mode": mode, "weights": _weights(config.model.name), "dtype": config.model.dtype,
        "max_context": limits.max_context,
    }  # fmt: skip
    if mode == "score":
        return asked | {"temperature": limits.temperature}
    asked |= {"temperature": config.evaluate.temperature, "max_turn_tokens": limits.max_turn_tokens}
    if mode == "generate":
        return asked | {"seed": config.run.seed}
    return asked | {
        "environment": config.environment.model_dump(mode="json"), "max_turns": limits.max_turns,
        "max_sampled_tokens": limits.max_sampled_tokens, "on_cut_reply": limits.on_cut_reply,
    }  # fmt: skip


def _weights(name: str) -> str:
    """What tells weights apart, wherever they lie: a checkpoint's manifest, or the model's name."""
    manifest = Path(name) / MANIFEST
    if manifest.is_file():
        return f"{Path(name).name}-{hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]}"
    return name


def _room(config: Config) -> dict[str, float]:
    """What is asked of Ray for one worker: what is asked for whoever holds an engine."""
    room = config.cluster
    if config.rollout.engines:
        return {"num_cpus": room.engine_cpus, "num_gpus": room.engine_gpus}
    return {"num_cpus": room.worker_cpus, "num_gpus": room.worker_gpus}


def _reports(
    config: Config, mode: Mode, pieces: Sequence[Piece], count: int, room: Mapping[str, float]
) -> Generator[dict[str, int]]:
    """How the rows of each piece ended, in the order in which pieces are finished."""
    data = _ray_data()
    _await_room(config, room)
    whole = data.from_items(
        [{"piece": pickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
    ).map_batches(
        BatchWorker,
        fn_constructor_args=(config, mode, count, import_paths()),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(count, len(pieces)), max_tasks_in_flight_per_actor=1),
        num_cpus=room["num_cpus"],
        num_gpus=room["num_gpus"] or None,
    )
    # Rows answer for themselves; what a worker raises is for all of them.
    whole.context.raise_original_map_exception = True
    whole.context.enable_progress_bars = whole.context.print_on_execution_start = False
    limit = whole.context.execution_no_progress_timeout_s = _patience(config, mode, pieces)
    try:
        # Nothing is fetched ahead: a piece is told of when it is finished.
        for told in whole.iter_batches(batch_size=None, prefetch_batches=0):
            yield from map(json.loads, told["report"])
    except RayTaskError as error:
        raise cause_of(error) from None
    except RayActorError as error:
        raise ClusterError(f"a worker of the batch cannot be kept alive: {error}") from error
    except data.exceptions.ExecutionTimeoutError as error:
        raise WaitTimeout(
            f"the controller waited {limit:.0f} s for any of its workers to finish a piece",
            mend="look at the workers' logs; is there still room for them?",
        ) from error


def _patience(config: Config, mode: Mode, pieces: Sequence[Piece]) -> float:
    """Seconds in which some worker must be there and have finished a piece."""
    limits = config.rollout
    longest = limits.turn_timeout if mode == "generate" else limits.conversation_timeout
    rounds = 1 + max(len(piece.places) for piece in pieces)  # after a death its rows are taken one by one
    return config.cluster.wait_seconds + rounds * longest


def _ray_data() -> Any:
    try:
        import ray.data
        import ray.data.exceptions
    except ImportError as error:
        raise ConfigError(
            f"a batch needs Ray Data: {error}", mend="pip install 'stateset-ray[batch]'"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # as `cluster` does for Ray itself
    return ray.data


def _await_room(config: Config, room: Mapping[str, float]) -> None:
    """Wait until there is room for one worker, for Ray Data would wait for ever; a cluster may grow for it.

    Raises:
        ClusterError: there was none in `cluster.wait_seconds`.
    """
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    wanted = {names[key]: amount for key, amount in room.items() if amount}
    if not wanted:
        return
    may_grow = bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))
    limit = config.cluster.wait_seconds if may_grow else min(_OWN_CLUSTER, config.cluster.wait_seconds)
    group = placement_group([wanted])
    try:
        if not group.wait(timeout_seconds=limit):
            raise ClusterError(
                f"there was no room for a worker of the batch in {limit:.0f} s", given=wanted,
                mend="add nodes, ask for less in [cluster], or raise cluster.wait_seconds",
            )  # fmt: skip
    finally:
        remove_placement_group(group)


def _summary(out: Output, data: DataSet, mode: Mode, before: int) -> dict[str, Any]:
    """What the shards hold, counted from themselves.

    Raises:
        RunError: a row is missing or there twice; or not one conversation could be scored.
    """
    seen: Counter[Id] = Counter()
    errors: Counter[str] = Counter()
    first_errors: list[str] = []
    played: dict[Id, dict[str, Any]] = {}
    for row in out.rows():
        if row["id"] not in data.places:
            continue  # of a data set that had more rows
        seen[row["id"]] += 1
        if "error" in row:
            errors[row["error"]["kind"]] += 1
            if len(first_errors) < _FIRST_ERRORS:
                first_errors.append(f"{row['id']}: {row['error']['message']}")
        if mode == "play":
            played[row["id"]] = {key: row.get(key) for key in ("reward", "stop_reason")}
            if row["id"] == next(iter(data.places)):
                played[row["id"]]["messages"] = row.get("messages", [])
    wrong = [id for id in data.places if seen[id] != 1]
    if wrong:
        raise RunError(
            f"{len(wrong)} rows are not in the output exactly once", given=wrong[:_FIRST_ERRORS],
            mend="this is a bug of stateset_ray: please report it with the output folder",
        )  # fmt: skip
    summary = {
        "mode": mode, "rows": len(data.places), "done": len(data.places) - errors.total(),
        "errors": dict(errors), "before": before, "output": str(out.folder), "first_errors": first_errors,
    }  # fmt: skip
    return summary | (_evaluation({id: played[id] for id in data.places}) if mode == "play" else {})


def _evaluation(played: Mapping[Id, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that `evaluate` prints, of the same conversations."""
    rewards = [row["reward"] for row in played.values()]
    scored = [reward for reward in rewards if reward is not None]
    if not scored:
        raise RunError("not one conversation could be scored", mend="mend the environment first")
    reasons = Counter(row["stop_reason"] for row in played.values() if row["stop_reason"])
    return {
        "reward": fmean(scored), "tasks": len(rewards), "failed": len(rewards) - len(scored),
        "stop_reasons": dict(reasons), "conversation": next(iter(played.values()))["messages"],
    }  # fmt: skip
