"""The comparisons with peers: the reward, the report's arithmetic, and that both sides do the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.task import Question, opening, reward
from benchmarks.peers.trl import report, table
from stateset_ray.types import Message

ROOT = Path(__file__).parents[2]


def test_the_reward_is_graded_in_both_parts() -> None:
    assert reward("") == reward("  ") == 0
    assert reward("Sure") == pytest.approx(0.5 + 0.5 * (1 - 4 / 120))
    # Each letter of the beginning is worth something, and so is every character less.
    beginnings = [reward(text) for text in ("xxxx", "Sxxx", "Suxx", "Surx", "Sure")]
    assert beginnings == sorted(beginnings) and len(set(beginnings)) == 5
    assert reward("Sure." + "x" * 40) > reward("Sure." + "x" * 60) > reward("Sure." + "x" * 200) == 0.5


async def _play(text: str) -> Any:
    environment = Question()
    task = environment.task("train", 3)
    first = await environment.reset(task, 0)
    return first, await environment.step(Message("assistant", text))


def test_the_environment_asks_what_the_peer_is_asked() -> None:
    import asyncio

    first, last = asyncio.run(_play("Sure, it is."))
    assert first.messages == opening(3)
    assert (last.reward, last.terminated) == (reward("Sure, it is."), True)


def _run(seconds: list[float], rewards: list[float]) -> dict[str, Any]:
    return {
        "seed": 0,
        "steps": [
            {"seconds": s, "reward": r, "sampled_tokens": 100} for s, r in zip(seconds, rewards, strict=True)
        ],
    }


def test_the_report_divides_samples_by_seconds_and_spreads_over_seeds() -> None:
    runs = {
        "ours": [_run([4, 1, 1], [0.1, 0.2, 0.4]), _run([2, 1, 1], [0.3, 0.4, 0.8])],
        "trl": [_run([10, 5, 5], [0.1, 0.1, 0.2]), _run([10, 5, 5], [0.1, 0.3, 0.2])],
    }
    found = report(runs, samples=8)
    assert found["samples_per_second"] == {
        "ours": {"all": 4.8, "of_seed": [4.0, 6.0]}, "trl": {"all": 1.2, "of_seed": [1.2, 1.2]},
    }  # fmt: skip
    assert (found["ratio"], found["ratio_of_seed"]) == (4.0, [3.3333, 5.0])
    assert (found["steady"]["ratio"], found["steady"]["ratio_of_seed"]) == (5.0, [5.0, 5.0])
    assert found["rewards"][1] == {
        "samples_learned_from": 8,
        "ours": {"mean": 0.3, "std": pytest.approx(0.1414, abs=1e-4)},
        "trl": {"mean": 0.2, "std": pytest.approx(0.1414, abs=1e-4)},
    }
    assert found["gain"]["ours"]["mean"] == pytest.approx(0.4)
    assert "| samples/s, whole steps | 4.8 | 1.2 | 4.0 |" in table(found)


def test_a_single_run_of_a_single_step_has_neither_a_spread_nor_a_steady_part() -> None:
    found = report({"ours": [_run([2], [0.5])], "trl": [_run([4], [0.5])]}, samples=4)
    assert found["ratio"] == 2.0
    assert found["steady"]["ratio"] is None
    assert found["rewards"][0]["ours"] == {"mean": 0.5, "std": None}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_both_sides_play_as_many_samples_of_the_same_task() -> None:
    pytest.importorskip("trl", reason="TRL is the peer of this test")
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.peers.trl", "--model", "tiny", "--steps", "1", "--seeds", "1",
            "--prompts", "2", "--group-size", "4", "--tokens", "12", "--threads", "1",
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)  # nothing else is printed
    assert result["samples_per_step"] == 8
    assert result["ratio"] > 0
    # The tiny model's replies are noise of up to 12 bytes: both earn about what such noise earns.
    first = result["rewards"][0]
    assert first["ours"]["mean"] == pytest.approx(first["trl"]["mean"], abs=0.1)
    assert all(0 < tokens <= 8 * 12 for tokens in result["sampled_tokens_per_step"].values())
