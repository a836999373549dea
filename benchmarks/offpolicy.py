"""What the off-policy correction protects from: the gradient, and what becomes of learning, without it.

    python -m benchmarks.offpolicy                         # both parts; on 2 cores about 15 minutes
    python -m benchmarks.offpolicy --parts gradient --seeds 1 --batches 8      # a trial

Prints one JSON object (`--output FILE`: into a file too). The tiny model, in one process, without Ray: who
plays is exactly so many steps behind who learns (`benchmarks.lagged`), so that no figure depends on timing.

| side    | what becomes of a token that an older policy sampled                                       |
|---------|--------------------------------------------------------------------------------------------|
| `plain` | nothing: weight 1, the ratio is to the policy as the step begins                           |
| `tis`   | weighted by how much likelier the policy makes it now, cut at 2: what `train_async` does   |
| `uncut` | the same without a cut                                                                     |
| `mis`   | the same, dropped outside of [0.5, 2]                                                      |
| `clip`  | PPO's clip around the policy that sampled it: what `train` does, without correction        |

**gradient.** `echo` of two letters, one turn: every one of 67,340 replies is listed, so that expectations are
sums. Policies of a real run so many versions apart; samples of the older; the gradient of all parameters
by our loss. Compared with the gradient on samples of the newer one itself (`fresh`), at the versions `--at` of
each seed's run; medians, and all values.

| figure                             | what it is                                                      |
|------------------------------------|-----------------------------------------------------------------|
| `kl`                               | nats per reply from the older policy to the newer               |
| `cosine`, `length`, `error`        | of the expected gradient: bias; lengths are by that of the true gradient, `error` is that of the difference |
| `cosine_of_batch`, `cosine_spread` | of the gradients of single batches: mean and standard deviation |
| `error_of_batch`                   | root mean square of the same: bias and noise together           |

**learning.** `benchmarks.costly`: a mistake costs 2, passing is free, and the policy that it begins with knows the
right reply to some tasks. Sides are `LAG-SIDE`, each at every learning rate of `--rates`; all seeds are shown.

| figure    | what it is                                                                                |
|-----------|-------------------------------------------------------------------------------------------|
| `reward`  | mean of the last fifth of the steps, of each seed                                         |
| `worst`   | the lowest mean of a fifth after the first two, of each seed: what was lost on the way    |
| `passed`  | share of replies that passed, of the last fifth                                           |
| `entropy` | nats per token of the last update                                                         |
| `kl`      | nats per token between who sampled and who learned, the most of any step                  |
| `taught`  | steps in which something was left to learn from: rewards of a group differed              |
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.lagged import Lagged
from benchmarks.offpolicy_gradient import SIDES, Enumerated, compared, versions_of
from stateset_ray.config import Config, load_config
from stateset_ray.metrics import versions

__all__ = ["begun", "play", "report"]

_COMMON = (
    "model.threads=1", "learner.engine=torch", "run.log_trajectories=0", "grpo.group_size=16",
    "rollout.max_turns=1", "rollout.max_context=64", "rollout.concurrency=128",
)  # fmt: skip
_ECHO = (
    "model.name=tiny", "environment.path=stateset_ray.environments.echo:Echo", "environment.options.turns=1",
    "environment.options.length=2", "rollout.max_turn_tokens=2", "train.tasks_per_step=4",
)  # fmt: skip
_COSTLY = (
    "environment.path=benchmarks.costly:Costly", "rollout.max_turn_tokens=1", "train.tasks_per_step=8",
)  # fmt: skip
_WARM = (
    "model.name=tiny", "train.warm_start.steps=200", "train.warm_start.dialogues=64",
    "train.warm_start.learning_rate=3e-3",
)  # fmt: skip


def main() -> None:
    """Measure, then print."""
    options = _options()
    # Libraries print, those of the processes that play as well; on the real stdout is the result alone.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    started = machine.describe()
    result: dict[str, Any] = {}
    if "gradient" in options.parts:
        result["gradient"] = gradient(options)
    if "learning" in options.parts:
        result["learning"] = learning(options)
    result = {
        "command": " ".join(["python -m benchmarks.offpolicy", *sys.argv[1:]]),
        "machine": started | {"load_1min_after": machine.describe()["load_1min"]},
        "commit": machine.commit(),
        "versions": versions(),
        "work": {key: value for key, value in vars(options).items() if key != "output"},
        **result,
    }
    text = json.dumps(result, indent=2)
    print(text, file=stdout, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def gradient(options: argparse.Namespace) -> dict[str, Any]:
    """Every side's gradient by versions behind: medians over seeds and places of the run, and all values."""
    found: dict[int, list[dict[str, dict[str, float]]]] = {behind: [] for behind in options.behind}
    task: Enumerated | None = None
    for seed in range(options.seeds):
        config = _config([*_ECHO, f"run.seed={seed}", f"learner.learning_rate={options.gradient_rate}"])
        task = task or Enumerated(config)
        weights = versions_of(config, max(options.at))
        for at in options.at:
            for behind in [behind for behind in options.behind if behind <= at]:
                pair = weights[at], weights[at - behind]
                found[behind].append(compared(task, *pair, options.batches, 16, seed))
            _say(f"gradient: seed {seed}, version {at}")
    return {f"{behind} behind": _gathered(of_all) for behind, of_all in found.items() if of_all}


def _gathered(of_all: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    def figure(side: str, name: str) -> dict[str, Any]:
        values = [one[side][name] for one in of_all]
        return {"median": round(statistics.median(values), 3), "all": [round(value, 3) for value in values]}

    return {side: {name: figure(side, name) for name in of_all[0][side]} for side in of_all[0]}


def learning(options: argparse.Namespace) -> dict[str, Any]:
    """Every side at every learning rate, two runs at a time."""
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="offpolicy") as folder,
        ProcessPoolExecutor(min(cores, options.processes or cores), mp_context=context) as pool,
    ):
        seeds = range(options.seeds)
        starts = list(pool.map(begun, [folder] * options.seeds, seeds))
        _say(f"begins with {starts}")
        asked = {
            (rate, side): [
                pool.submit(play, side, seed, rate, options.steps, options.cost, start["folder"])
                for seed, start in zip(seeds, starts, strict=True)
            ]
            for rate in options.rates
            for side in options.sides
        }
        found: dict[str, dict[str, Any]] = {}
        for (rate, side), runs in asked.items():
            one = report([run.result() for run in runs])
            found.setdefault(str(rate), {})[side] = one
            _say(f"{rate}, {side}: {one['reward']}")
    right = [start["right"] for start in starts]
    return {"right_at_first": right, "passed_at_first": [s["passed"] for s in starts], "rates": found}


def begun(folder: str, seed: int) -> dict[str, Any]:
    """Make the policy that all sides of a seed begin with; its folder, and how it replies."""
    torch.set_num_threads(1)
    with Lagged(_config([*_COSTLY, *_WARM, f"run.seed={seed}"]), 0) as run:
        run.warm_start()
        infos = [report.infos[0] for report in run.evaluate(256)]
        path = Path(folder) / str(seed)
        path.mkdir()
        run.learner.save_model(path)
    share = {key: statistics.fmean(float(info[key]) for info in infos) for key in ("right", "passed")}
    return {"folder": str(path), **share}


def play(side: str, seed: int, rate: float, steps: int, cost: float, start: str) -> dict[str, Any]:
    """One run of one side of the part `learning`, from the model in the folder `start`."""
    torch.set_num_threads(1)
    lag, _, name = side.partition("-")
    parts = [f"grpo.{key}={value}" for key, value in SIDES[name].items()]
    config = _config(
        [*_COSTLY, f"model.name={start}", f"environment.options.cost={cost}", f"run.seed={seed}", *parts,
         f"learner.learning_rate={rate}"]
    )  # fmt: skip
    rewards, passed, updates = [], [], []
    with Lagged(config, int(lag)) as run:
        for step in range(steps):
            done = run.step(step)
            rewards.append(done["reward"])
            passed.append(statistics.fmean(float(info["passed"]) for info in done["infos"]))
            updates += [done["update"]] if done["update"] else []
    fifth = max(1, steps // 5)
    by_fifth = [statistics.fmean(rewards[i : i + fifth]) for i in range(0, steps, fifth)]
    return {
        "reward": by_fifth[-1],
        "worst": min(by_fifth[2:], default=by_fifth[-1]),
        "passed": statistics.fmean(passed[-fifth:]),
        "entropy": updates[-1]["entropy"] if updates else 0.0,
        "kl": max((update["kl_mismatch"] for update in updates), default=0.0),
        "taught": float(len(updates)),
        "by_fifth": [round(reward, 3) for reward in by_fifth],
    }


def report(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of a side's rewards, and every figure of every seed."""
    rewards = [run["reward"] for run in runs]
    spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    names = [name for name in runs[0] if name != "by_fifth"]
    return {
        "reward": f"{statistics.fmean(rewards):.2f} ± {spread:.2f}",
        "of_seed": {name: [round(run[name], 3) for run in runs] for name in names},
        "by_fifth": [run["by_fifth"] for run in runs],
    }


def _config(parts: Sequence[str]) -> Config:
    return load_config(None, [*_COMMON, *parts])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["gradient", "learning"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at", nargs="+", type=int, default=[16, 32, 48], help="versions that learn")
    parser.add_argument("--behind", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--batches", type=int, default=32, help="of 16 replies to each of 6 prompts")
    parser.add_argument("--gradient-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--cost", type=float, default=2.0, help="of a mistake")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument(
        "--sides", nargs="+", default=["0-plain", "8-tis", "8-plain", "16-tis", "16-plain", "16-clip"],
        metavar="LAG-SIDE",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=0, help="that play; 0: one for each core")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
