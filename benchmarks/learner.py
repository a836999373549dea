"""The learner alone, without rollouts: memory and speed beside the plain loop, shared prefixes, prediction.

    python -m benchmarks.learner             # against the plain loop; on 2 cores about an hour
    python -m benchmarks.learner --prefix    # sharing on against off: prompt shares, group sizes
    python -m benchmarks.learner --memory    # `--dry-run`'s prediction against what was measured
    python -m benchmarks.learner --model tiny --tokens 128 --groups 1 --repeats 1 --engines torch   # a trial

Prints one JSON object on stdout (`--output FILE`: into a file too; `--table`: a Markdown table instead) and
what it is doing on stderr. The trajectories are of random ids (`benchmarks.trajectories`): no one played
them. Every repeat of every side is a process of its own; a first, smaller update warms it up and is not
counted. Repeats are interleaved: all sides once, then all sides again.

A *whole update* is packing, forward, backward, clipping and AdamW. `tokens_per_second` counts the tokens of
the trajectories, whole, on every side: a prefix that is shared counts as often as it occurs. Peak memory is
that of the process (`VmHWM`, set back before each update), on a GPU the device's.

Without options:

| side                        | what it is                                                                  |
|-----------------------------|-----------------------------------------------------------------------------|
| `naive`                     | whole padded rows, logits of all positions in float32, torch's AdamW        |
| `torch`, `deepspeed-0`, ... | ours: engine and ZeRO stage, prefixes shared                                |
| `... checkpointing`         | with `learner.gradient_checkpointing`                                       |
| `... unshared`              | with `learner.share_prefix = false`                                         |

The naive side has micro-batches of as many tokens as ours (`--budget`). `of_naive` has the ratios of the
medians: `memory` below 1 is less, `speed` above 1 is faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.sides import Side, config_of
from benchmarks.trajectories import Shape
from stateset_ray.actors.learner_memory import learner_memory
from stateset_ray.metrics import versions

__all__ = ["compared", "measure", "table"]

_SHARES = (0.25, 0.5, 0.75, 0.9)
_GROUP_SIZES = (4, 8, 16)
_GIB = 2**30


def main() -> None:
    """Measure, then print."""
    options = _options()
    # Libraries print; the one thing on the real stdout is the result.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result = measure(options)
    text = json.dumps(result, indent=2)
    print(table(result) if options.table else text, file=stdout, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prefix", action="store_true", help="sharing on against off")
    what.add_argument("--memory", action="store_true", help="predicted against measured peak memory")
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a folder or a Hugging Face id")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: all cores")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of each trajectory")
    parser.add_argument("--prompt-share", type=float, default=0.5, help="common to a group")
    parser.add_argument("--budget", type=int, default=2048, help="learner.micro_batch_tokens")
    parser.add_argument("--engines", default="torch,deepspeed-0,deepspeed-1", help="with commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print Markdown instead of JSON")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, and what it was measured on."""
    kind = "prefix" if options.prefix else "memory" if options.memory else "update"
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.learner", *sys.argv[1:]]),
        "kind": kind, "machine": machine.describe(), "commit": machine.commit(), "versions": versions(),
        "seed": options.seed, "repeats": options.repeats, "model": options.model,
        "threads": options.threads or len(os.sched_getaffinity(0)), "micro_batch_tokens": options.budget,
    }  # fmt: skip
    result |= {"update": _update, "prefix": _prefix, "memory": _memory}[kind](options)
    result["machine"]["load_1min_after"] = machine.describe()["load_1min"]
    return result


# -- against the plain loop ------------------------------------------------------------------------


def _update(options: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(options.groups, options.group_size, options.tokens, options.prompt_share)
    sides = {"naive": _side(options, "naive")}
    for engine in options.engines.split(","):
        sides[engine] = _side(options, "ours", engine)
        sides[f"{engine} checkpointing"] = _side(options, "ours", engine, checkpointing=True)
    first = options.engines.split(",")[0]
    for name in (first, f"{first} checkpointing"):
        settings = sides[name]["settings"] | {"learner.share_prefix": "false"}
        sides[f"{name} unshared"] = sides[name] | {"settings": settings}
    answers = _interleaved(sides, shape, options)
    return {"work": shape.facts(), "sides": compared(answers, shape.all_tokens)}


def _side(
    options: argparse.Namespace, side: str, engine: str = "torch", *, checkpointing: bool = False
) -> dict[str, Any]:
    kind, _, stage = engine.partition("-")
    settings = {
        "learner.engine": kind,
        "learner.zero_stage": stage or "1",
        "learner.gradient_checkpointing": str(checkpointing).lower(),
        "learner.micro_batch_tokens": str(max(options.budget, options.tokens)),
        "rollout.max_context": str(options.tokens),
        "model.threads": str(options.threads),
    }
    return {"side": side, "model": options.model, "settings": settings}


def _interleaved(
    sides: Mapping[str, Mapping[str, Any]], shape: Shape, options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """The answers of every side to every repeat, all of which begin with the same weights."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    warming = {"shape": vars(replace(shape, groups=1)), "seed": options.seed + options.repeats}
    for repeat in range(options.repeats):
        for name, options_of_side in sides.items():
            with Side(options_of_side) as side:  # one at a time: memory for all of them is not everywhere
                side.ask(warming)
                answer = side.ask({"shape": vars(shape), "seed": options.seed + repeat})
            answers[name].append(answer)
            _say(
                f"{repeat + 1}/{options.repeats} {name}: {answer['seconds']:.1f} s, processor "
                f"{answer['processor_seconds']:.1f} s, {answer['peak_bytes'] / _GIB:.2f} GiB"
            )
    return answers


def compared(answers: Mapping[str, Sequence[Mapping[str, Any]]], tokens: int) -> dict[str, Any]:
    """Each side's figures, and its ratios to `naive`.

    Args:
        answers: of each side, one for each repeat.
        tokens: of the trajectories of one update.
    """
    found: dict[str, Any] = {}
    for name, repeats in answers.items():
        seconds = _spread([a["seconds"] for a in repeats])
        found[name] = {
            "seconds": seconds,
            "processor_seconds": _spread([a["processor_seconds"] for a in repeats]),
            "tokens_per_second": round(tokens / seconds["median"], 1),
            "peak_gib": _spread([a["peak_bytes"] / _GIB for a in repeats]),
            "computed_tokens": repeats[0]["computed_tokens"],
            "micro_batches": repeats[0]["micro_batches"],
            "losses": [round(a["loss"], 6) for a in repeats],
        }
    naive = found["naive"]
    for side in found.values():
        side["of_naive"] = {
            "memory": round(side["peak_gib"]["median"] / naive["peak_gib"]["median"], 3),
            "speed": round(naive["seconds"]["median"] / side["seconds"]["median"], 3),
            "speed_in_processor_seconds": round(
                naive["processor_seconds"]["median"] / side["processor_seconds"]["median"], 3
            ),
        }
    return found


# -- shared prefixes -------------------------------------------------------------------------------


def _prefix(options: argparse.Namespace) -> dict[str, Any]:
    """One group a step, with and without sharing, and how far the two gradients lie apart."""
    engine = options.engines.split(",")[0]
    sharing = _side(options, "ours", engine)
    sides = dict.fromkeys(("shared", "unshared"), sharing) | {
        "gradients": _side(options, "gradients", engine)
    }
    cells = []
    with ExitStack() as stack:
        opened = {name: stack.enter_context(Side(side)) for name, side in sides.items()}
        for share, size in itertools.product(_SHARES, _GROUP_SIZES):
            shape = Shape(1, size, options.tokens, share)
            question = {"shape": vars(shape), "trim": True}
            answers: dict[str, list[dict[str, Any]]] = {"shared": [], "unshared": []}
            for repeat in range(options.repeats + (not cells)):
                for name, kept in answers.items():
                    asked = question | {"seed": options.seed + repeat, "share": name == "shared"}
                    kept.append(opened[name].ask(asked))
            if not cells:  # the very first also warms everything up
                answers = {name: kept[1:] for name, kept in answers.items()}
            apart = opened["gradients"].ask(question | {"seed": options.seed})
            cells.append(_cell(shape, answers, apart))
            _say(f"prompt share {share}, group of {size}: {cells[-1]}")
    worst = max(cell["gradient_difference"] for cell in cells)
    return {"engine": engine, "work": {"tokens_per_trajectory": options.tokens}, "cells": cells,
            "largest_gradient_difference": worst}  # fmt: skip


def _cell(
    shape: Shape, answers: Mapping[str, Sequence[Mapping[str, Any]]], apart: Mapping[str, Any]
) -> dict[str, Any]:
    def median(name: str, of: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.median(of(answer) for answer in answers[name])

    seconds = {name: median(name, lambda a: a["seconds"]) for name in answers}
    processor = {name: median(name, lambda a: a["processor_seconds"]) for name in answers}
    peaks = {name: median(name, lambda a: a["peak_bytes"]) / _GIB for name in answers}
    tokens = {name: answers[name][0]["computed_tokens"] for name in answers}
    return {
        "prompt_share": round(shape.prompt / shape.tokens, 3),
        "group_size": shape.group_size,
        "sampled_share": round(shape.sampled / shape.tokens, 3),
        "computed_tokens": tokens,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "speedup": round(seconds["unshared"] / seconds["shared"], 2),
        "speedup_in_processor_seconds": round(processor["unshared"] / processor["shared"], 2),
        "speedup_of_token_counts": round(tokens["unshared"] / tokens["shared"], 2),
        "peak_gib": {name: round(value, 2) for name, value in peaks.items()},
        "gradient_difference": apart["relative"],
    }


# -- prediction ------------------------------------------------------------------------------------


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of one rank, each in a process of its own: what the second and third update took at most."""
    rows = []
    for name, settings in _matrix(options):
        config = config_of({"model": options.model, "settings": settings})
        predicted = learner_memory(config, ray=False)
        budget = config.learner.micro_batch_tokens
        # Two micro-batches, full of rows that share nothing: what a step of this configuration may be.
        shape = Shape(2 * budget // options.tokens, 1, options.tokens, options.prompt_share)
        with Side({"side": "ours", "model": options.model, "settings": settings}) as side:
            answers = [
                side.ask({"shape": vars(shape), "seed": options.seed + n}) for n in range(1 + options.repeats)
            ]
        measured = max(answer["peak_bytes"] for answer in answers[1:])
        rows.append(
            {
                "settings": name,
                "predicted_gib": round(predicted.total / _GIB, 3),
                "measured_gib": round(measured / _GIB, 3),
                "error": round(predicted.total / measured - 1, 3),
                "parts_gib": {part: round(size / _GIB, 3) for part, size in predicted.parts.items()},
            }
        )
        _say(f"{name}: predicted {rows[-1]['predicted_gib']}, measured {rows[-1]['measured_gib']} GiB")
    return {"rows": rows, "largest_error": max(abs(row["error"]) for row in rows)}


def _matrix(options: argparse.Namespace) -> list[tuple[str, dict[str, str]]]:
    """Engines x checkpointing x two budgets, and a few settings more."""
    engines = options.engines.split(",")
    budgets = [max(options.tokens, options.budget // 4), options.budget]
    rows = [
        (engine, budget, checkpointing, {})
        for engine, budget, checkpointing in itertools.product(engines, budgets, (False, True))
    ]
    rows += [(engines[0], options.budget, True, {"learner.logit_chunk": "1024"})]
    rows += [
        (engine, options.budget, checkpointing, {"learner.lora.rank": "16"})
        for engine in dict.fromkeys((engines[0], engines[-1]))
        for checkpointing in (False, True)
    ]
    named = []
    for engine, budget, checkpointing, extra in rows:
        shape = Shape(1, 1, options.tokens, options.prompt_share)
        settings = _side(options, "ours", engine, checkpointing=checkpointing)["settings"] | {
            "learner.micro_batch_tokens": str(budget), "rollout.max_turns": "2",
            "rollout.max_turn_tokens": str(shape.sampled // 2), "grpo.group_size": "2",
            "train.tasks_per_step": str(budget // options.tokens), "learner.share_prefix": "false", **extra,
        }  # fmt: skip
        name = f"{engine}, {budget} tokens" + ", checkpointing" * checkpointing
        named.append((name + "".join(f", {k.partition('.')[2]} {v}" for k, v in extra.items()), settings))
    return named


# -- output ----------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    if result["kind"] == "update":
        rows = [
            [name, _with_spread(side["peak_gib"], 2), side["of_naive"]["memory"],
             side["tokens_per_second"], _with_spread(side["seconds"], 1), side["of_naive"]["speed"]]
            for name, side in result["sides"].items()
        ]  # fmt: skip
        return _markdown(["side", "peak GiB", "of naive", "tokens/s", "seconds", "of naive"], rows)
    if result["kind"] == "prefix":
        rows = [
            [cell["prompt_share"], cell["group_size"], cell["speedup"], cell["speedup_of_token_counts"],
             cell["peak_gib"]["unshared"], cell["peak_gib"]["shared"], f"{cell['gradient_difference']:.1e}"]
            for cell in result["cells"]
        ]  # fmt: skip
        gib = ["peak GiB unshared", "shared"]
        return _markdown(["prompt share", "group size", "speed-up", "by tokens", *gib, "gradients"], rows)
    rows = [
        [row["settings"], row["predicted_gib"], row["measured_gib"], f"{row['error']:+.1%}"]
        for row in result["rows"]
    ]
    return _markdown(["settings", "predicted GiB", "measured GiB", "error"], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


def _with_spread(figures: Mapping[str, Any], digits: int) -> str:
    return f"{figures['median']:.{digits}f} ({figures['min']:.{digits}f}-{figures['max']:.{digits}f})"


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "all": [round(value, 3) for value in values],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
