"""Whether every objective learns, over seeds, beside a control that must not.

    python -m benchmarks.learning                                        # from the repository's root; an hour
    python -m benchmarks.learning --presets default gspo --seeds 0 1     # a part; what is done is not redone
    python -m benchmarks.learning --credit                               # who answers for which reward
    python -m benchmarks.learning --recorded --table --plot docs/learning.svg        # from what is recorded

Trains the tiny model of examples/quickstart.toml with each preset and each seed, and with shuffled rewards.
`--credit` compares `grpo.credit` in the environment `blame` instead, with the preset `default`. Each run is a
line of the file `--runs`, by which an interrupted command goes on: a run counts as done if its settings are
the same. Prints one JSON object on stdout (`--table`: a markdown table instead; `--out FILE`: the JSON into a file
too), and what it is doing on stderr. Rewards are the result; seconds are not, on a machine that others use.

Every preset gets the same search: one run per learning rate of the grid, with a seed outside those that are
reported; the one with the highest mean reward over all steps is taken (`area`: it is high for who gets far, and
for who gets there early). The control takes the learning rate of the preset that it is made of.

| figure                               | what it is, for each arm as mean, standard deviation and all values  |
|--------------------------------------|----------------------------------------------------------------------|
| `heldout_before`, `heldout_after`    | reward on 64 held-out tasks, sampled at temperature 1                |
| `start`, `reached`                   | training reward of step 0, and mean of the last 10 steps             |
| `steps_to`                           | steps until the mean of 5 steps had covered 0.8 of the way from `start` to `reached`; absent where that way is below 0.1 |
| `area`                               | mean training reward of all steps                                    |
| `clipped_mean`                       | share of sampled tokens whose gradient the clip removed or shrank    |
| `grad_norm_max`, `grad_scaled_share` | largest norm of a gradient; share of steps whose norm, the mean of its updates, was above `learner.max_grad_norm` = 1 |
| `entropy_at_end`                     | nats per token of the last step                                      |
| `stopped`                            | seeds at which all rewards were equal for ten steps, and why it ended |
| `control_flat`                       | all of the control's changes, held-out and training, are below 0.1   |
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.learning_curves import LAST, NOTHING, SHARE, WINDOW, Record, curve, summary, table, whole
from benchmarks.learning_plot import picture
from benchmarks.learning_runs import ARMS, SHUFFLED, Arm, digest, player, settings
from stateset_ray.metrics import JsonLines, versions

__all__ = ["GRID", "SEARCH_SEED", "Ledger", "main", "report"]

GRID = (3e-3, 1e-2, 3e-2)
"""Learning rates that every arm is tried with."""
SEARCH_SEED = 100

_TITLES = {
    "presets": "reward of the tiny model on echo, by preset",
    "credit": "reward of the words of blame, by credit",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Play what is missing, then print."""
    options = _options(arguments)
    # Libraries and Ray's workers print; the one thing on the real stdout is the result.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ledger = Ledger(options.runs, play=not options.recorded)
    with ledger:
        result, arms = report(options, ledger)
    if options.plot:
        control = arms.pop(SHUFFLED, [])
        options.plot.write_text(picture(arms, control, _TITLES[options.kind]), encoding="utf-8")
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    heading = "preset" if options.kind == "presets" else "credit"
    print(table(result["arms"], heading) if options.table else text, file=stdout, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--credit", dest="kind", action="store_const", const="credit", default="presets",
        help="compare grpo.credit in the environment `blame`",
    )  # fmt: skip
    parser.add_argument("--presets", nargs="+", metavar="NAME", help="only these presets (or credits)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--luck", type=float, default=0.25, help="with --credit: share of the reward")
    parser.add_argument("--learning-rate", type=float, help="search nothing, take this one")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning.jsonl"), help="finished runs")
    parser.add_argument("--recorded", action="store_true", help="play nothing, report what is recorded")
    parser.add_argument("--table", action="store_true", help="print a markdown table instead of JSON")
    parser.add_argument("--plot", type=Path, help="write the curves here, as SVG")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args(arguments)
    known = ARMS[options.kind]
    options.presets = options.presets or list(known)
    if unknown := sorted(set(options.presets) - set(known)):
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    if SEARCH_SEED in options.seeds:
        parser.error(f"seed {SEARCH_SEED} is the one that learning rates are searched with")
    return options


class Ledger:
    """The finished runs, and a cluster that plays what is missing; opened when it is first needed.

    Args:
        path: JSON lines; made with the first run.
        play: whether to play what is missing; if not, it stays missing.
    """

    def __init__(self, path: Path, *, play: bool) -> None:
        self._lines = JsonLines(path)
        self._play = play
        self._open: Any = None
        self._player: Any = None
        found = self._lines.read()
        if found and play:  # without a last line that was cut short, or the next would be lost with it
            path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
        self.records = {record["digest"]: record for record in found}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self._open.__exit__(*error)

    def get(self, arm: Arm) -> Record | None:
        """The record of a run; None if it is missing and nothing shall be played."""
        key = digest(arm)
        if key not in self.records and self._play:
            if self._player is None:
                self._lines.path.parent.mkdir(parents=True, exist_ok=True)
                self._open = player(arm)
                self._player = self._open.__enter__()
            record = self._player.play(arm)
            self._lines.append(record)
            self.records[key] = record
            _say(
                f"{arm.name} seed {arm.seed} learning rate {arm.learning_rate:g}: held-out "
                f"{record['heldout_before']:.3f} -> {record['heldout_after']:.3f}  {record['seconds']:.0f} s"
                + (f"  stopped: {record['stopped']}" if record["stopped"] else "")
            )
        return self.records.get(key)


def report(options: argparse.Namespace, ledger: Ledger) -> tuple[dict[str, Any], dict[str, list[Record]]]:
    """The result, and the runs of each arm of which there are any."""
    searched: dict[str, dict[str, float]] = {}
    arms: dict[str, list[Record]] = {}
    for name in options.presets:
        rate = options.learning_rate or _search(options, ledger, name, searched)
        found = [
            ledger.get(Arm(options.kind, name, seed, rate, options.steps, options.luck))
            for seed in options.seeds
            if rate
        ]
        if present := [record for record in found if record is not None]:
            arms[name] = present
    summaries = {name: summary(records) for name, records in arms.items()}
    example = Arm(options.kind, ARMS[options.kind][0], 0, GRID[0], options.steps, options.luck)
    result = {
        "command": " ".join(["python -m benchmarks.learning", *sys.argv[1:]]),
        "machine": machine.describe(), "commit": machine.commit(), "versions": versions(),
        "compared": options.kind, "seeds": options.seeds, "steps": options.steps,
        "definitions": {
            "smoothed_over_steps": WINDOW, "reached_over_last_steps": LAST, "share_of_the_way": SHARE,
            "nothing_learned_below": NOTHING,
        },
        "search": {"seed": SEARCH_SEED, "grid": GRID, "chosen_by": "area", "area": searched},
        "settings": settings(example).model_dump(
            mode="json", include={"model", "environment", "rollout", "train", "evaluate"}
        ) | {"group_size": settings(example).grpo.group_size},
        "control_flat": _flat(summaries),
        "arms": summaries,
    }  # fmt: skip
    return result, arms


def _search(
    options: argparse.Namespace, ledger: Ledger, name: str, searched: dict[str, dict[str, float]]
) -> float | None:
    """The learning rate of an arm; None if nothing of it is recorded."""
    of = "default" if name == SHUFFLED else name
    areas = searched.get(of, {})
    if of not in searched:
        for rate in GRID:
            record = ledger.get(Arm(options.kind, of, SEARCH_SEED, rate, options.steps, options.luck))
            if record is not None:
                areas[f"{rate:g}"] = round(curve(whole(record)).area, 4)
        searched[of] = areas
    return max(GRID, key=lambda rate: areas.get(f"{rate:g}", float("-inf"))) if areas else None


def _flat(summaries: dict[str, dict[str, Any]]) -> bool | None:
    """Whether no run of the control changed; None without a control."""
    if SHUFFLED not in summaries:
        return None
    control = summaries[SHUFFLED]
    changes = [*control["change"]["all"], *control["heldout_change"]["all"]]
    return all(abs(change) < NOTHING for change in changes)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
