"""Rollouts that run ahead of the learner against the loop in turn, where environments answer late.

    python -m benchmarks.asynchrony            # 3 seeds of 40 steps a side; on 2 cores about 10 minutes
    python -m benchmarks.asynchrony --steps 3 --seeds 1 --staleness 0 1                       # a trial

Prints one JSON object (`--output FILE`: into a file too). The work: `benchmarks.late` (echo whose answers
are late by log-normal latencies, p99 20 times the median), the tiny model, the same workers, learner and
steps for every side; the sides of a seed are run one after the other, and every second seed backwards.

| side      | what it is                                                                         |
|-----------|------------------------------------------------------------------------------------|
| `0`       | `train.train`: rollout and learning in turn                                        |
| `1`, ...  | `train_async.train_async` with that `train.max_staleness`, corrected as it does     |
| `1-plain` | the same without a correction: the ratio is to the policy as the step begins       |

| figure                    | what it is                                                             |
|---------------------------|------------------------------------------------------------------------|
| `trajectories_per_second` | learned from, by the wall clock between the first step's end and the last's |
| `ratio`                   | that by that of side `0`                                               |
| `reward`                  | mean reward of the last fifth of the steps: mean and spread over seeds  |
| `staleness`               | versions that a conversation lagged behind: mean and largest            |
| `stopped`                 | runs that ended early, because nothing could be learned any more        |
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from stateset_ray.config import load_config
from stateset_ray.errors import RunError
from stateset_ray.metrics import versions
from stateset_ray.train import train
from stateset_ray.train_async import train_async

__all__ = ["play", "report"]

_SHOWN = ("trajectories_per_second", "reward", "staleness", "stopped")


def main() -> None:
    """Measure, then print."""
    options = _options()
    started = machine.describe()
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in options.staleness}
    for seed in range(options.seeds):
        sides = options.staleness if seed % 2 == 0 else options.staleness[::-1]
        for side in sides:
            runs[side].append(play(side, seed, options))
            shown = {key: value for key, value in runs[side][-1].items() if key in _SHOWN}
            print(f"seed {seed}, staleness {side}: {shown}", file=sys.stderr, flush=True)
    result = {
        "command": " ".join(["python -m benchmarks.asynchrony", *sys.argv[1:]]),
        "machine": started | {"load_1min_after": machine.describe()["load_1min"]},
        "commit": machine.commit(),
        "versions": versions(),
        "work": {key: value for key, value in vars(options).items() if key != "output"},
        **report(runs),
        "runs": runs,
    }
    text = json.dumps(result, indent=2)
    print(text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def play(side: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one side."""
    steps: list[Mapping[str, Any]] = []
    ends: list[float] = []

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            ends.append(time.monotonic())
            steps.append(event)

    staleness, _, plain = side.partition("-")
    correction = ["grpo.trust=proximal", "grpo.correction=none"] if plain else []
    with tempfile.TemporaryDirectory(prefix="async") as folder:
        config = load_config(
            None,
            [
                f"run.dir={folder}", f"run.name=late-{side}", f"run.seed={seed}", "run.log_trajectories=0",
                "model.name=tiny", "model.threads=1", "environment.path=benchmarks.late:Late",
                f"environment.options.median={options.median}", f"environment.options.tail={options.tail}",
                f"rollout.workers={options.workers}", "rollout.max_turns=2", "rollout.max_turn_tokens=4",
                "rollout.max_context=128", "rollout.on_cut_reply=close",
                f"rollout.concurrency={options.concurrency}", f"grpo.group_size={options.group_size}",
                "grpo.advantage=mean_std", "learner.engine=torch",
                f"learner.learning_rate={options.learning_rate}",
                f"train.steps={options.steps}", f"train.tasks_per_step={options.tasks}",
                "train.checkpoint_every=100000", "evaluate.tasks=0", f"train.max_staleness={staleness}",
                *correction,
            ],
        )  # fmt: skip
        stopped = None
        try:
            (train_async if config.train.max_staleness else train)(config, on_event=watch)
        except RunError as error:  # a policy that collapsed is a result, too
            stopped = error.problem
    learned = sum(step["trajectories"]["trained"] + step["trajectories"]["filtered"] for step in steps[1:])
    rewards = [step["reward_mean"] for step in steps]
    last = rewards[-max(1, len(rewards) // 5) :]
    return {
        "seed": seed,
        "stopped": stopped,
        "trajectories_per_second": round(learned / (ends[-1] - ends[0]), 2),
        "reward": round(statistics.fmean(last), 4),
        "rewards": [round(reward, 4) for reward in rewards],
        "staleness": {
            "mean": round(statistics.fmean(step["staleness"]["mean"] for step in steps), 3),
            "max": max(step["staleness"]["max"] for step in steps),
        },
        "seconds": {
            name: round(statistics.fmean(step["seconds"][name] for step in steps), 3)
            for name in steps[0]["seconds"]
        },
    }


def report(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of all seeds; ratios seed by seed, since a machine is not equally quick all day."""
    first = next(iter(runs))
    sides = {}
    for side, of_side in runs.items():
        rates = [run["trajectories_per_second"] for run in of_side]
        ratios = [rate / run["trajectories_per_second"] for rate, run in zip(rates, runs[first], strict=True)]
        rewards = [run["reward"] for run in of_side]
        sides[side] = {
            "trajectories_per_second": round(statistics.fmean(rates), 2),
            "ratio": round(statistics.fmean(ratios), 3),
            "ratio_of_seed": [round(ratio, 3) for ratio in ratios],
            "reward": {
                "mean": round(statistics.fmean(rewards), 4),
                "std": round(statistics.stdev(rewards), 4) if len(rewards) > 1 else 0.0,
            },
            "staleness": max(run["staleness"]["max"] for run in of_side),
            "stopped": sum(run["stopped"] is not None for run in of_side),
        }
    return {"baseline": first, "sides": sides}


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--staleness", nargs="+", default=["0", "1", "2", "2-plain"], metavar="SIDE")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=4, help="groups of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=128, help="conversations of a worker at once")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--median", type=float, default=0.05, help="seconds of latency")
    parser.add_argument("--tail", type=float, default=20.0, help="p99 of the latency by its median")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
