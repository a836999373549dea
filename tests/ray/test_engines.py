"""Engines apart from the workers: the same run, and a dead engine costs no conversation."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from playground import Playground, gone, on_fifo, small

from stateset_ray.actors.credit import policy_batch
from stateset_ray.actors.run import Run, open_run
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train, train_step
from stateset_ray.train_async import train_async

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_a_run_with_engines_apart_is_the_run_without(tmp_path: Path) -> None:
    """Replies depend on seeds and weights, not on who samples them: the same up to rounding."""
    near, far = small(tmp_path / "near"), small(tmp_path / "far", "rollout.engines=2", "rollout.workers=2")
    train(near)
    summary = train(far)
    assert summary["policy_version"] == 2
    one, other = (JsonLines(config.run.folder / "metrics.jsonl").read() for config in (near, far))
    assert [r["trajectories"] for r in one] == [r["trajectories"] for r in other]
    assert [r["reward_mean"] for r in one] == pytest.approx([r["reward_mean"] for r in other], abs=1e-6)
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], abs=1e-4)
    assert all(abs(r["kl_mismatch"]) < 1e-4 for r in other)


@pytest.mark.parametrize(
    "transport",
    ["object_store", *(pytest.param(t, marks=pytest.mark.slow) for t in ("folder", "collective"))],
)
def test_a_killed_engine_costs_no_conversation_and_comes_back_with_the_weights_of_now(
    tmp_path: Path, transport: str
) -> None:
    """Nor does one that is stopped: it misses its heartbeat, and is killed."""
    config = small(
        tmp_path, "rollout.engines=2", "train.steps=3", 'environment.path="playground:Playground"',
        "rollout.turn_timeout=120", "rollout.heartbeat_timeout=5", f"publish.transport={transport}",
        "publish.timeout=10",
    )  # fmt: skip
    fifo = tmp_path / "fifo"
    Playground.plan = {}
    with open_run(config) as run:
        train_step(run, 0)
        before = run.pool.engine_pids
        assert len(set(before)) == 2
        victim = before[0]
        Playground.plan = {2: {"fault": "knock", "fifo": str(fifo)}}
        with on_fifo(fifo, lambda _: os.kill(victim, signal.SIGKILL)):
            collected = run.collect(1)
        assert gone([victim])
        batch = policy_batch(collected, run.config)
        assert batch.counts.aborted == {}
        assert batch.counts.dropped == {}
        assert batch.counts.dispatched == 8
        assert all(version == 1 for g in collected.groups for version in g.report.oldest)
        Playground.plan = {}
        _after(run, collected, batch)
        revived = run.pool.engine_pids  # waits for it
        os.kill(revived[1], signal.SIGSTOP)  # so that the one that came back answers all
        train_step(run, 2)
        assert gone([revived[1]])
        assert run.version == 3
        last = JsonLines(config.run.folder / "metrics.jsonl").read()[-1]
        assert abs(last["kl_mismatch"]) < 1e-4
        assert last["trajectories"]["dispatched"] == 8
        assert last["trajectories"]["aborted"] == last["trajectories"]["dropped"] == {}
        [facts] = run.pool.stats()
        assert facts["moved"] >= 1
        after = run.pool.engine_pids  # waits for it
        assert not {*before} & {*after}
    assert gone(after)


def _after(run: Run, collected: Any, batch: Any) -> None:
    update = run.update(batch, 1)
    run.publish(run.version + int(update["applied"]))
    run.after(collected, batch, update, {"rollout": 1.0, "learner": 1.0})


def test_rollouts_run_ahead_on_engines_apart(tmp_path: Path) -> None:
    config = small(tmp_path, "rollout.engines=1", "train.max_staleness=1", "train.steps=4")
    train_async(config)
    seen = JsonLines(config.run.folder / "metrics.jsonl").read()
    lag = [r["staleness"]["max"] for r in seen]
    assert len(lag) == 4
    assert lag[0] == 0
    assert max(lag) == 1
