"""The benchmark of the off-policy correction: what it promises to show is there, on small sizes."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.costly import Costly
from stateset_ray.types import Message

ROOT = Path(__file__).parents[2]


async def _played() -> None:
    wanted = set()
    for index in range(40):
        for reply, reward in (("-", 0.0), ("no", -2.0), ("", -2.0)):
            costly = Costly(cost=2.0)
            task = costly.task("train", index)
            opening = await costly.reset(task, 0)
            assert (await costly.step(Message("assistant", reply))).reward == reward
        letter = opening.messages[0].content[-1]
        wanted.add(letter)
        knowing = Costly(known=1.0)
        await knowing.reset(task, 0)
        assert knowing.expert() == letter
        assert (await knowing.step(Message("assistant", letter))).reward == 1.0
    assert wanted == set("abcd")  # train and held-out tasks know all of them


def test_passing_is_free_and_a_mistake_costs() -> None:
    asyncio.run(_played())


def run(*options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.offpolicy", *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)  # nothing else is printed
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_behind_is_biased_without_a_correction_and_not_with_one() -> None:
    options = ("--seeds", "1", "--at", "4", "--behind", "1", "4", "--batches", "2", "--gradient-rate", "1e-2")
    found = run("--parts", "gradient", *options)["gradient"]
    for behind, sides in found.items():
        error = {side: figures["error"]["median"] for side, figures in sides.items() if side != "policies"}
        assert error["fresh"] == 0
        # What remains is that the second token's beginning was sampled by another policy.
        assert error["uncut"] < 0.05 < error["plain"], behind


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_sides_learn_from_the_same_beginning() -> None:
    options = ("--seeds", "1", "--steps", "5", "--rates", "3e-3", "--sides", "0-plain", "2-tis", "2-plain")
    found = run("--parts", "learning", *options)["learning"]
    sides = found["rates"]["0.003"]
    assert sides.keys() == {"0-plain", "2-tis", "2-plain"}
    assert sides["0-plain"]["of_seed"]["kl"][0] < 1e-3 < sides["2-plain"]["of_seed"]["kl"][0]
    assert sides["2-tis"]["by_fifth"][0][0] == sides["2-plain"]["by_fifth"][0][0]
