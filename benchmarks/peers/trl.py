"""TRL's GRPOTrainer and this library on the same single-turn work, on the CPU.

    python -m benchmarks.peers.trl         # 3 seeds of 6 steps a side; on 2 cores about 25 minutes
    python -m benchmarks.peers.trl --model tiny --steps 1 --seeds 1 --prompts 2 --group-size 2    # a trial

Prints one JSON object on stdout (`--output FILE`: into a file too; `--table`: Markdown instead) and what it
is doing on stderr. For each seed both sides train, one after the other, each in a process of its own, and
the side that begins alternates. TRL needs no environment of its own: it is in the extra `dev`.

The same on both sides: weights, float32, threads; the prompts and their order (`benchmarks.peers.task`: 62
or 63 tokens), `--prompts` times `--group-size` samples a step, at most `--tokens` tokens each, temperature 1
over the whole vocabulary; the reward; advantages (reward less the group's mean), PPO's clip at 0.8 and 1.28,
the mean over the step's tokens, no KL; one step of fused AdamW, clipped at a norm of 1, at a constant rate.
What differs is the random numbers that samples are drawn with.

Ours is `stateset_ray.train.train` with its actors: rollout, credit, learner and publishing of the weights.
TRL's is `GRPOTrainer.train`, all samples of a step in one batch and without gradient checkpointing, which
are its quickest settings here; it generates with transformers' `generate`.

| figure                   | what it is                                                                     |
|--------------------------|--------------------------------------------------------------------------------|
| `samples_per_second`     | samples of all steps by their wall-clock seconds, start-up and end apart       |
| `ratio`                  | ours by TRL's; of all runs, and for each seed                                  |
| `steady`                 | the same without each run's first step, in which both sides warm up            |
| `rewards`                | mean and spread over the seeds at equal numbers of samples learned from        |
| `gain`                   | reward of a run's last step less that of its first                             |
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.peers.sides import ADAM
from stateset_ray.metrics import versions

__all__ = ["report", "table"]

ROOT = Path(__file__).parents[2]
_SIDES = ("ours", "trl")


def main() -> None:
    """Measure, then print."""
    options = _options()
    started = machine.describe()
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in _SIDES}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for side in _SIDES if seed % 2 else reversed(_SIDES):
            _say(f"seed {seed}: {side}")
            runs[side].append({"seed": seed, **_play(side, options, seed)})
            _say(f"  seconds {[round(s['seconds'], 1) for s in runs[side][-1]['steps']]}, "
                 f"reward {[round(s['reward'], 3) for s in runs[side][-1]['steps']]}")  # fmt: skip
    result = {
        "command": " ".join(["python -m benchmarks.peers.trl", *sys.argv[1:]]),
        "machine": started | {"load_1min_after": machine.describe()["load_1min"]},
        "commit": machine.commit(),
        "versions": versions() | {"trl": _version("trl")},
        "work": {
            "model": options.model, "dtype": "float32", "prompts": options.prompts,
            "group_size": options.group_size, "tokens_at_most": options.tokens, "steps": options.steps,
            "seeds": options.seeds, "threads": options.threads or len(os.sched_getaffinity(0)),
            "optimizer": ADAM, "engine": options.engine, "logit_chunk": options.logit_chunk,
        },
        **report(runs, options.prompts * options.group_size),
        "runs": runs,
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(table(result) if options.table else text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    first, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.trl", description=first)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a folder or a Hugging Face id")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: all cores")
    parser.add_argument("--prompts", type=int, default=4, help="of each step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of a reply at most")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--engine", default="torch", choices=["torch", "deepspeed"], help="of our learner")
    parser.add_argument("--logit-chunk", type=int, default=1024, help="learner.logit_chunk of ours")
    parser.add_argument("--table", action="store_true", help="print Markdown instead of JSON")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args()


def _play(side: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    names = ("model", "steps", "prompts", "group_size", "tokens", "threads", "engine", "logit_chunk")
    asked = {"seed": seed} | {name: getattr(options, name) for name in names}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.sides", side, json.dumps(asked)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{side} ended with exit code {done.returncode}")
    played: dict[str, Any] = json.loads(done.stdout)
    return played


def report(runs: Mapping[str, Sequence[Mapping[str, Any]]], samples: int) -> dict[str, Any]:
    """What the runs say, side by side.

    Args:
        runs: of "ours" and "trl", one for each seed, in the same order: what `sides.play` returns.
        samples: of one step.
    """
    result: dict[str, Any] = {"samples_per_step": samples}
    for name, skip in (("", 0), ("steady", 1)):
        speeds = {side: [_speed(run, samples, skip) for run in of_side] for side, of_side in runs.items()}
        whole = {
            side: _quotient(
                samples * sum(len(run["steps"][skip:]) for run in of_side),
                sum(step["seconds"] for run in of_side for step in run["steps"][skip:]),
            )
            for side, of_side in runs.items()
        }
        found = {
            "samples_per_second": {
                side: {"all": _rounded(whole[side]), "of_seed": list(map(_rounded, speeds[side]))}
                for side in runs
            },
            "ratio": _rounded(_quotient(whole["ours"], whole["trl"])),
            "ratio_of_seed": [
                _rounded(_quotient(a, b)) for a, b in zip(speeds["ours"], speeds["trl"], strict=True)
            ],
        }
        result |= {name: found} if name else found
    result["rewards"] = [
        {"samples_learned_from": index * samples}
        | {side: _spread([run["steps"][index]["reward"] for run in runs[side]]) for side in runs}
        for index in range(len(runs["ours"][0]["steps"]))
    ]
    result["gain"] = {
        side: _spread([run["steps"][-1]["reward"] - run["steps"][0]["reward"] for run in of_side])
        for side, of_side in runs.items()
    }
    result["sampled_tokens_per_step"] = {
        side: _rounded(statistics.mean(step["sampled_tokens"] for run in of_side for step in run["steps"]))
        for side, of_side in runs.items()
    }
    return result


def _speed(run: Mapping[str, Any], samples: int, skip: int) -> float | None:
    steps = run["steps"][skip:]
    return _quotient(samples * len(steps), sum(step["seconds"] for step in steps))


def _quotient(of: float | None, by: float | None) -> float | None:
    return of / by if of is not None and by else None


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": _rounded(statistics.mean(values)), "std": _rounded(deviation)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def table(result: Mapping[str, Any]) -> str:
    """Speed and rewards as Markdown."""
    speed = result["samples_per_second"]
    lines = [
        "| | ours | TRL | ratio |",
        "|---|---|---|---|",
        f"| samples/s, whole steps | {speed['ours']['all']} | {speed['trl']['all']} | {result['ratio']} |",
        "",
        "| samples learned from | reward, ours | reward, TRL |",
        "|---|---|---|",
    ]
    for row in result["rewards"]:
        sides = " | ".join(
            f"{row[side]['mean']}" + ("" if row[side]["std"] is None else f" ± {row[side]['std']}")
            for side in _SIDES
        )
        lines.append(f"| {row['samples_learned_from']} | {sides} |")
    return "\n".join(lines)


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
