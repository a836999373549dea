"""Rollouts running ahead: equal to the loop in turn at staleness 0, bounded above it, nothing lost."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from playground import Playground, small

from stateset_ray import checkpoint
from stateset_ray.actors.run import open_run
from stateset_ray.config import Config, corrected
from stateset_ray.errors import LearnerLost
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train
from stateset_ray.train_async import train_async, train_async_step

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def records(config: Config) -> list[dict[str, Any]]:
    return JsonLines(config.run.folder / "metrics.jsonl").read()


def weights(config: Config) -> bytes:
    found = checkpoint.latest(config.run.folder / "checkpoints")
    assert found
    return (found.path / "model.safetensors").read_bytes()


def balanced(record: dict[str, Any]) -> bool:
    counts = record["trajectories"]
    ended = counts["trained"] + counts["filtered"]
    ended += sum(counts["dropped"].values()) + sum(counts["aborted"].values())
    return bool(counts["dispatched"] == ended)


def test_bug_24_40_staleness_0_is_the_loop_in_turn_bit_for_bit(tmp_path: Path) -> None:
    settings = (
        "train.steps=3", "grpo.refills=1", "rollout.workers=2", "evaluate.tasks=2", "rollout.max_turns=1",
        "rollout.on_cut_reply='end'",
    )  # fmt: skip
    turn, ahead = small(tmp_path / "turn", *settings), small(tmp_path / "ahead", *settings)
    summaries = train(turn), train_async(ahead)
    assert weights(turn) == weights(ahead)
    assert summaries[0]["heldout_after"] == summaries[1]["heldout_after"]
    for one, other in zip(records(turn), records(ahead), strict=True):
        same = {"reward_mean", "loss", "grad_norm", "trajectories", "staleness", "stop_reasons"}
        assert {k: one[k] for k in same} == {k: other[k] for k in same}
        assert one["staleness"]["max"] == 0
    assert any(record["truncated_share"] for record in records(ahead))


def test_bug_27_a_step_waits_for_its_slow_tasks_and_learns_from_every_task_in_order(tmp_path: Path) -> None:
    """Slow conversations are not outrun: rollouts run ahead of them, and are learned from after them."""
    Playground.plan = {index: {"fault": "slow", "seconds": 1.0} for index in (0, 5, 6)}
    config = small(
        tmp_path, "train.steps=6", "train.max_staleness=2", "rollout.workers=2", "run.log_trajectories=2",
        'environment.path="playground:Playground"',
    )  # fmt: skip
    summary = train_async(config)
    assert summary["steps"] == 6
    seen = records(config)
    stale = [record["staleness"]["max"] for record in seen]
    assert stale[0] == 0
    assert max(stale) in (1, 2)  # it did run ahead, and not too far
    assert all(balanced(record) for record in seen)
    assert sum(record["trajectories"]["dispatched"] for record in seen) == 6 * 8
    log = JsonLines(config.run.folder / "trajectories.jsonl").read()
    assert [line["trajectory"]["task"]["id"] for line in log] == [f"train-{i}" for i in range(12)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_bug_27_slow_tasks_are_left_to_the_next_step_and_not_lost(tmp_path: Path, staleness: int) -> None:
    """Two tasks wait until the first step has ended; the step therefore cannot have waited for them."""
    gate = tmp_path / "gate"
    Playground.plan = {index: {"fault": "gate", "file": str(gate)} for index in (0, 2)}
    config = small(
        tmp_path, "train.steps=4", f"train.max_staleness={staleness}", "train.oversample=2",
        "rollout.workers=2", "run.log_trajectories=9", 'environment.path="playground:Playground"',
    )  # fmt: skip

    def open_gate(event: Any) -> None:
        if event["event"] == "step":
            gate.touch()

    train_async(config, on_event=open_gate)
    seen = records(config)
    assert all(balanced(record) for record in seen)
    assert all(record["staleness"]["max"] <= staleness for record in seen)
    log = JsonLines(config.run.folder / "trajectories.jsonl").read()
    played = [(line["step"], line["trajectory"]["task"]["id"]) for line in log]
    assert {task for step, task in played if step == 0} == {"train-1", "train-3"}
    assert {(1, "train-0"), (1, "train-2")} <= set(played)
    outrun = [record["trajectories"]["aborted"].get("outrun", 0) for record in seen]
    assert outrun[0] == (0 if staleness else 8)


def test_a_worker_that_dies_while_rollouts_run_ahead_loses_nothing(tmp_path: Path) -> None:
    config = corrected(small(tmp_path, "train.steps=5", "train.max_staleness=1", "rollout.workers=2"))
    with open_run(config) as run:
        for step in run.steps():
            if step == 2:
                os.kill(run.pool.pids[0], signal.SIGKILL)
            train_async_step(run, step)
        run.finish()
    seen = records(config)
    assert len(seen) == 5
    assert all(balanced(record) for record in seen)
    assert sum(record["worker_restarts"] for record in seen) >= 1
    assert all(record["staleness"]["max"] <= 1 for record in seen)
    played = sum(r["trajectories"]["trained"] + r["trajectories"]["filtered"] for r in seen)
    assert played + sum(sum(r["trajectories"]["dropped"].values()) for r in seen) == 5 * 8


def test_a_learner_that_dies_takes_back_what_ran_ahead_and_the_books_say_so(tmp_path: Path) -> None:
    config = corrected(small(tmp_path, "train.steps=5", "train.max_staleness=2", "train.checkpoint_every=1"))
    with open_run(config) as run:
        for step in run.steps():
            if step == 2 and not run.learners.restarts:
                [rank] = run.learners.pids
                os.kill(rank, signal.SIGKILL)
                with pytest.raises(LearnerLost) as caught:
                    train_async_step(run, step)
                run.recover(caught.value)
                continue
            train_async_step(run, step)
        run.finish()
    seen = records(config)
    assert [record["step"] for record in seen] == [0, 1, 2, 3, 4]
    assert all(balanced(record) for record in seen)
    assert seen[2]["trajectories"]["aborted"]["rewound"] == 3 * 8  # of the step in hand and two ahead
    assert [record["policy_version"] for record in seen] == [1, 2, 3, 4, 5]


def test_a_resumed_run_plays_what_was_in_flight(tmp_path: Path) -> None:
    settings = (
        "train.max_staleness=2",
        "grpo.refills=1",
        "train.checkpoint_every=1",
        "run.log_trajectories=9",
    )
    first = small(tmp_path, *settings, "train.steps=6")
    stopped: list[int] = []

    def stop(event: Any) -> None:
        if event["event"] == "step" and event["step"] == 2:
            stopped.append(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_async(first, on_event=stop)
    found = checkpoint.latest(first.run.folder / "checkpoints")
    assert found and stopped
    in_flight = found.meta["drawn"]
    assert in_flight  # steps 3 and 4 had begun
    train_async(first, resume=True)
    log = JsonLines(first.run.folder / "trajectories.jsonl").read()
    for step, indices in in_flight.items():
        played = [line["trajectory"]["task"]["id"] for line in log if line["step"] == int(step)]
        assert {f"train-{i}" for i in indices} <= set(played)
    everything = [line["trajectory"]["task"]["id"] for line in log]
    assert len(everything) == len(set(everything))  # no task twice
