"""What goes wrong while conversations are played is data: counted, excluded, and the run goes on."""

import copy
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from playground import Playground, gone, on_fifo, small

from stateset_ray.actors.credit import policy_batch
from stateset_ray.actors.publishing.base import PublishedWeights
from stateset_ray.actors.run import Run, open_run
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train_step

# A worker that dies loads torch and transformers again: 5 s alone, 15 s on two busy cores.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One run for all tests here: two workers, four groups of four; each test takes its next steps."""
    config = small(
        tmp_path_factory.mktemp("faults"), 'environment.path="playground:Playground"', "rollout.workers=2",
        "rollout.retries=1", "rollout.environment_timeout=2", "train.steps=1000", "train.tasks_per_step=4",
        "train.checkpoint_every=1000", "run.log_trajectories=9",
    )  # fmt: skip
    with open_run(config) as run:
        yield run


def play(run: Run, faults: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Take one step in which these of its four tasks are faulty; what metrics.jsonl says about it."""
    step = run.step
    Playground.plan = {step * 4 + slot: fault for slot, fault in faults.items()}
    train_step(run, step)
    record = JsonLines(run.folder / "metrics.jsonl").read()[-1]
    assert record["step"] == step
    return record


def whole(run: Run) -> list[int]:
    """The ids of both workers, as soon as both are there."""
    Playground.plan = {}
    while len(pids := run.pool.pids) < 2:
        run.collect(run.step)  # looks after workers that come back
    return pids


def logged(run: Run, step: int) -> list[str]:
    """The tasks of a step of which a conversation was learned from or excluded, in order."""
    lines = JsonLines(run.folder / "trajectories.jsonl").read()
    return [line["trajectory"]["task"]["id"] for line in lines if line["step"] == step]


@pytest.mark.parametrize(
    ("fault", "reason", "says"),
    [
        ("raise", "environment_error", "Playground.step raised RuntimeError: broken on purpose"),
        ("hang", "environment_error", "took longer than rollout.environment_timeout = 2.0 s"),
        ("garbage", "environment_error", "must return a Step"),
        ("nan", "reward_error", "not a finite number"),
    ],
)
def test_a_broken_conversation_is_counted_and_excluded(run: Run, fault: str, reason: str, says: str) -> None:
    version = run.version
    # Two of four survive in the first group; in the second one, who has nobody to be compared with.
    record = play(run, {0: {"fault": fault, "spare": 2}, 1: {"fault": fault, "spare": 1}})
    counts = record["trajectories"]
    assert counts["dropped"] == {reason: 5, "group_too_small": 1}
    assert counts["trained"] + counts["filtered"] == 10
    assert (counts["dispatched"], counts["aborted"]) == (16, {})
    assert record["stop_reasons"] == {"completed": 11, reason: 5}
    assert len(record["errors"]) == 5
    assert all(says in error for error in record["errors"])
    assert -1 <= record["reward_mean"] <= 1  # of the eleven; a failure is no reward
    assert run.version == version + 1 == record["policy_version"]
    assert record["worker_restarts"] == 0


def test_a_step_of_broken_conversations_trains_nothing(run: Run) -> None:
    version = run.version
    record = play(run, {slot: {"fault": "raise"} for slot in range(4)})
    assert record["trajectories"]["dropped"] == {"environment_error": 16}
    assert record["trajectories"]["trained"] == 0
    assert (run.version, record["policy_version"], record["loss"]) == (version, version, None)
    assert play(run, {})["policy_version"] == version + 1


def test_bug_37_a_killed_worker_loses_no_group_and_comes_back_with_the_weights_of_now(
    run: Run, tmp_path: Path
) -> None:
    """SIGKILL while all conversations of a worker are under way."""
    before = whole(run)
    killed: list[int] = []

    def kill(pid: str) -> None:
        killed.append(int(pid))
        os.kill(killed[0], signal.SIGKILL)

    step, version = run.step, run.version
    with on_fifo(tmp_path / "fifo", kill):
        record = play(run, {2: {"fault": "freeze", "fifo": str(tmp_path / "fifo")}})
    assert killed[0] in before
    assert gone(killed)
    counts = record["trajectories"]
    # Two groups were on it; both were played again, and each of the four is there once.
    assert counts["aborted"] == {"worker_died": 8}
    assert counts["dispatched"] == 24
    assert counts["trained"] + counts["filtered"] == 16
    assert logged(run, step) == [f"train-{step * 4 + slot}" for slot in range(4)]
    assert record["update"]["masked_tokens"] <= record["tokens_per_trajectory"]["mean"] * 16 + 1e-6
    assert record["worker_restarts"] == 1
    assert run.version == version + 1
    # The one that is back answers with the weights of now.
    assert len({*whole(run), *before}) == 3
    record = play(run, {})
    assert record["trajectories"]["dispatched"] == 16
    assert abs(record["kl_mismatch"]) < 1e-4


def test_a_task_that_kills_its_worker_is_given_up(run: Run) -> None:
    whole(run)
    step = run.step
    record = play(run, {1: {"fault": "exit"}})
    counts = record["trajectories"]
    # Once beside a neighbour, which is played again; then alone, `rollout.retries` + 1 times.
    assert counts["aborted"] == {"worker_died": 4 * (1 + 2) + 4}
    assert counts["dispatched"] == 16 + 4 + 4 * 2
    assert counts["trained"] + counts["filtered"] == 12
    assert record["worker_restarts"] == 3
    assert logged(run, step) == [f"train-{step * 4 + slot}" for slot in (0, 2, 3)]


def test_a_broken_engine_is_tried_again_and_then_reported(run: Run) -> None:
    """Weights of NaN: the policy cannot answer, which is no fault of the environment."""
    good = run.pool.weights
    assert good
    broken = {
        name: np.full_like(array, np.nan)
        for part in ray.get(list(good.handle))
        for name, array in part.items()
    }
    Playground.plan = {}
    run.pool.weights = PublishedWeights(10**6, (ray.put(broken),), lineage=run.rewinds + 1)
    try:
        collected = run.collect(run.step)
    finally:
        run.rewinds += 2  # as a run goes back to weights of before
        run.publish(run.version)
    counts = policy_batch(collected, run.config).counts
    assert counts.aborted == {"infrastructure_error": 16}  # rollout.retries = 1
    assert counts.dropped == {"infrastructure_error": 16}
    assert counts.dispatched == 32
    assert "no finite probabilities" in collected.groups[0].report.errors[0]
    assert play(run, {})["trajectories"]["dispatched"] == 16


def test_shuffled_rewards_are_those_of_the_group(run: Run) -> None:
    """The control: the same credits in every group, in another order."""
    Playground.plan = {}
    collected = run.collect(run.step)
    shuffle = run.config.with_overrides(["grpo.shuffle_rewards=true", "grpo.advantage=mean"])
    plain, control = (
        {
            (sample.payload, sample.size.trajectory): sample.advantages[0]
            for update in policy_batch(
                replace(collected, counts=copy.deepcopy(collected.counts)), config
            ).updates
            for sample in update.samples
        }
        for config in (run.config, shuffle)
    )
    assert plain != control
    for group in collected.groups:
        mine, theirs = (
            sorted(value for (ref, _), value in credit.items() if ref == group.payload)
            for credit in (plain, control)
        )
        assert mine == theirs
