"""What the learning benchmark says of recorded runs: numbers, table, picture, and what it takes as done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.learning_curves import Curve, curve, smoothed, summary, table, whole  # noqa: E402
from benchmarks.learning_plot import picture  # noqa: E402
from benchmarks.learning_runs import ARMS, SHUFFLED, Arm, compared, digest, settings  # noqa: E402
from stateset_ray.objective import PRESETS, ObjectiveConfig  # noqa: E402


def record(name: str = "default", seed: int = 0, rise: float = 1.0, **changed: Any) -> dict[str, Any]:
    """A run of 20 steps whose reward rises linearly by `rise` over the first ten."""
    arm = Arm("presets", name, seed, changed.pop("learning_rate", 1e-2), 20)
    rewards = [-1.0 + rise * min(1.0, step / 10) for step in range(20)]
    return {
        **vars(arm), "digest": digest(arm), "commit": "abc", "rewards": rewards, "stopped": None,
        "heldout_before": -1.0, "heldout_after": -1.0 + rise, "entropy": [1.0] * 20,
        "grad_norm": [0.1] * 20, "clipped": [0.25] * 20, "seconds": 1.0, **changed,
    }  # fmt: skip


def test_a_curve_is_read_as_defined() -> None:
    rises = curve([0.0] * 10 + [1.0] * 20)
    assert rises == Curve(start=0.0, reached=1.0, steps_to=14, area=pytest.approx(2 / 3))
    # The mean of five steps has covered 0.8 once four of them lie above, and not before.
    assert smoothed([0.0] * 10 + [1.0] * 20)[12:14] == [0.6, 0.8]
    assert curve([0.0] * 10 + [0.09] * 20).steps_to is None
    assert curve([0.0] * 10 + [-1.0] * 20).steps_to is None


def test_a_run_that_stopped_stays_where_it_was() -> None:
    stopped = record(rewards=[-1.0, 0.0, 0.0, 0.0, 0.0, 0.0], stopped="nothing to learn")
    assert whole(stopped) == [-1.0, *[0.0] * 19]
    assert summary([stopped])["stopped"] == {"0": "nothing to learn"}
    assert summary([stopped])["reached"]["all"] == [0.0]


def test_a_summary_is_over_seeds_in_their_order() -> None:
    found = summary([record(seed=1, rise=0.5), record(seed=0, rise=1.0)])
    assert found["seeds"] == [0, 1]
    assert found["heldout_after"] == {"mean": -0.25, "std": 0.3536, "all": [0.0, -0.5]}
    assert found["change"]["all"] == [1.0, 0.5]
    assert found["clipped_mean"] == 0.25


def test_the_table_has_a_row_for_each_arm_with_its_spread() -> None:
    arms = {
        "default": summary([record(seed=s, rise=1 - s / 10) for s in range(2)]),
        SHUFFLED: summary([record(SHUFFLED, rise=0.0)]),
    }
    head, line, first, control = table(arms, "preset").splitlines()
    assert {row.count("|") for row in (head, line, first, control)} == {11}
    assert "`default`" in first
    assert "-0.05 ± 0.07" in first
    assert "25.0%" in first
    assert control.split(" | ")[6] == "-"


def test_the_picture_is_a_panel_per_arm_with_the_control_in_each() -> None:
    arms = {name: [record(name, seed) for seed in range(3)] for name in ("default", "gspo", "a<b")[:2]}
    root = ElementTree.fromstring(picture(arms, [record(SHUFFLED, rise=0.0)], "a < b"))
    classes = [element.get("class") for element in root.iter()]
    assert classes.count("mean") == classes.count("band") == classes.count("control") == 2
    lines = [e.get("points", "") for e in root.iter() if e.get("class") == "mean"]
    assert all(len(points.split()) == 20 for points in lines)
    names = [e.text for e in root.iter() if e.get("class") == "name"]
    assert names == ["a < b", "default", "gspo"]
    without = ElementTree.fromstring(picture({"default": arms["default"][:1]}, [], "one"))
    assert "control" not in [element.get("class") for element in without.iter()]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_trained_as_it_is(name: str) -> None:
    """Nothing that the example sets for itself may win over a part of the preset."""
    config = settings(Arm("presets", name, 3, 5e-3, 7))
    assert config.grpo == ObjectiveConfig(preset=name, group_size=config.grpo.group_size)
    assert (config.run.seed, config.train.steps, config.learner.learning_rate) == (3, 7, 5e-3)
    assert config.train.updates_per_step == 2


def test_arms_differ_in_nothing_but_what_they_are_about() -> None:
    plain = settings(Arm("presets", "default", 0, 1e-2, 9))
    control = settings(Arm("presets", SHUFFLED, 0, 1e-2, 9))
    assert control == plain.with_overrides(["grpo.shuffle_rewards=true"])
    credits = [settings(Arm("credit", name, 0, 1e-2, 9)) for name in ARMS["credit"]]
    assert [c.grpo.credit for c in credits] == list(ARMS["credit"])
    assert len({c.with_overrides(["grpo.credit=outcome"]).to_toml() for c in credits}) == 1


def test_a_run_is_recognized_by_its_settings() -> None:
    arm = Arm("presets", "default", 0, 1e-2, 9)
    others = [
        Arm("presets", "default", 1, 1e-2, 9), Arm("presets", "default", 0, 2e-2, 9),
        Arm("presets", "default", 0, 1e-2, 10), Arm("presets", "dapo", 0, 1e-2, 9),
        Arm("presets", SHUFFLED, 0, 1e-2, 9), Arm("credit", "outcome", 0, 1e-2, 9),
        Arm("credit", "outcome", 0, 1e-2, 9, luck=0.5),
    ]  # fmt: skip
    assert len({digest(other) for other in [arm, *others]}) == 8
    assert digest(arm) == digest(Arm("presets", "default", 0, 1e-2, 9))


def test_luck_is_not_drawn() -> None:
    assert compared("presets", [0.5, 0.25, 0.125]) == 0.875
    assert compared("credit", [0.5, 0.25, 0.125]) == 0.375


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.learning", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_is_recorded_is_reported_without_playing(tmp_path: Path) -> None:
    """The learning rate that did best on the search's seed is the one whose seeds are reported."""
    searched = [record(seed=100, rise=r, learning_rate=rate) for rate, r in ((3e-3, 0.2), (1e-2, 0.9))]
    reported = [record(seed=seed, rise=0.8) for seed in (0, 1)]
    control = [record(SHUFFLED, rise=0.05)]
    other = [record(seed=0, rise=0.1, learning_rate=3e-3)]
    lines = [json.dumps(r) for r in [*searched, *other, *reported, *control]]
    runs, plot, out = tmp_path / "runs.jsonl", tmp_path / "plot.svg", tmp_path / "out.json"
    runs.write_text("\n".join([*lines, '{"cut short'])[:-1], encoding="utf-8")
    before = runs.read_bytes()
    common = ("--recorded", "--runs", str(runs), "--steps", "20")
    done = run(*common, "--table", "--plot", str(plot), "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()] == [
        "| preset", "|" + "---|" * 10, "| `default`", "| `shuffled`",
    ]  # fmt: skip
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["search"]["area"]["default"].keys() == {"0.003", "0.01"}
    assert result["arms"]["default"]["seeds"] == [0, 1]
    assert result["arms"]["default"]["learning_rate"] == 1e-2
    assert result["control_flat"] is True
    assert result.keys() >= {"machine", "commit", "versions", "seeds", "settings", "search", "definitions"}
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert runs.read_bytes() == before


def test_unknown_names_and_the_seed_of_the_search_are_refused() -> None:
    for arguments in (("--presets", "gpro"), ("--seeds", "100"), ("--credit", "--presets", "dapo")):
        done = run("--recorded", *arguments)
        assert done.returncode == 2
        assert arguments[-1] in done.stderr
