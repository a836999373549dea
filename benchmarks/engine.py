"""The inference engine beside other engines, and beside what the machine can do.

    python -m benchmarks.engine --vllm-python .venv-vllm/bin/python           # from the repository's root
    python -m benchmarks.engine --model tiny --conversations 8 --repeats 1    # a trial

Plays the same conversations on every side, in float32 on the CPU, with the same threads: customer-service
dialogues in groups of 8 that share their opening, every reply `--tokens` long and sampled at temperature 1.
Sides (`benchmarks.engine_sides`) are processes of their own and take turns. Prints one JSON object.

| figure                 | what it is                                                                        |
|------------------------|-----------------------------------------------------------------------------------|
| `sides.*`              | seconds of every repeat, sampled tokens a second (of the median), `mean_logprob`  |
| `ratios.*`             | median seconds of that side / median seconds of ours                              |
| `limit`                | the least seconds that this machine needs, by the probes of this very run         |
| `share_of_limit`       | `limit.seconds` / median seconds of each side                                     |

The limit. *Operations*: 2 for each weight outside of the embedding and each token that nobody can avoid to
compute (what several conversations begin with once; no token twice; not the last one of a conversation), 2
for each weight of the head and each sampled token, and 4 * layers * heads * head_dim for each pair of a token
and one that it attends to. *Bytes*: every weight once for each of turns * tokens passes, and at each of them
the keys and values of every conversation so far. The limit is the longer of operations by the best float32
matmul rate that was found (plain or packed weights, 1,024 rows) and bytes by the memory's read rate, as if
all else were free and both went on at once. A sampled token's mean log-probability must agree among sides:
they sample from one distribution.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import machine, packed
from benchmarks.conversations import GROUP, render, scripts
from benchmarks.engine_sides import Row, vllm_environment
from benchmarks.sides import Side
from stateset_ray.metrics import versions
from stateset_ray.models import Hardware, config_only, generation_stop_ids, load_tokenizer, local_folder
from stateset_ray.policies.renderer import Renderer

__all__ = ["compared", "contexts", "limit", "measure", "positions", "work"]


def main() -> None:
    """Measure, then print."""
    options = _options()
    started = machine.describe()
    result = {
        "command": " ".join(["python -m benchmarks.engine", *sys.argv[1:]]),
        "machine": started, "commit": machine.commit(), "versions": versions(), **measure(options),
    }  # fmt: skip
    result["machine"]["load_1min_after"] = machine.describe()["load_1min"]
    print(json.dumps(result, indent=2), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a folder or a Hugging Face id")
    parser.add_argument("--threads", type=int, default=0, help="of every side; 0: all cores")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of every reply")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sides",
        nargs="+",
        default=["ours", "generate", "continuous"],
        choices=["ours", "generate", "continuous"],
    )
    parser.add_argument(
        "--vllm-python", default="", help="an interpreter that has vLLM (make vllm makes one)"
    )
    options = parser.parse_args()
    options.cores = sorted(os.sched_getaffinity(0))
    options.threads = options.threads or len(options.cores)
    return options


def work(model: str, conversations: int, turns: int, seed: int) -> list[Row]:
    """Openings, and what follows each reply but the last; the partner's answers take turns."""
    renderer = Renderer(load_tokenizer(model), generation_stop_ids(model))
    rows = []
    for script in scripts(conversations, seed):
        opening, suffixes = render(script, renderer)
        rows.append((list(opening), [list(suffixes[turn % len(suffixes)]) for turn in range(turns - 1)]))
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The sides in turn, then the machine's limit."""
    rows = work(options.model, options.conversations, options.turns, options.seed)
    longest = max(_length(row, options.tokens) for row in rows)
    names = [*options.sides, *(["vllm"] if options.vllm_python else [])]
    common = {
        "model": options.model, "folder": local_folder(options.model), "threads": options.threads,
        "conversations": len(rows), "max_context": longest + 1, "seed": options.seed,
    }  # fmt: skip
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(_side(name, common, options)) for name in names}
        for name, side in sides.items():
            _say(f"warming up {name}")
            side.ask({"rows": rows[:GROUP], "tokens": min(4, options.tokens), "seed": options.seed})
        for repeat in range(options.repeats):
            for name, side in sides.items():
                question = {"rows": rows, "tokens": options.tokens, "seed": options.seed + repeat}
                answers[name].append(side.ask(question))
                _say(f"repeat {repeat + 1}/{options.repeats} {name}: {answers[name][-1]['seconds']:.2f} s")
    _say("the machine's limit")
    return {
        "model": options.model, "threads": options.threads, "repeats": options.repeats,
        "seed": options.seed,
        "work": {
            "conversations": len(rows), "turns": options.turns, "tokens_per_reply": options.tokens,
            "group_size": GROUP, "longest": longest, "sampled_tokens": _sampled(rows, options.tokens),
        },
        **compared(answers, limit(rows, options.tokens, options.model, options.threads)),
    }  # fmt: skip


def _side(name: str, common: Mapping[str, Any], options: argparse.Namespace) -> Side:
    vllm = name == "vllm"
    return Side(
        {"side": name, **common}, "benchmarks.engine_sides",
        options.vllm_python if vllm else sys.executable,
        # As OpenMP does by itself: a thread that waits spins for some milliseconds, then sleeps. Many short
        # parallel stretches in a row want the first, sides that take turns on the same cores the second.
        {"GOMP_SPINCOUNT": "300000"}
        | (vllm_environment(options.threads, options.cores) if vllm else {}),
    )  # fmt: skip


def compared(answers: Mapping[str, list[dict[str, Any]]], bound: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of every side, what they are of ours, and of the limit."""
    sides: dict[str, dict[str, Any]] = {}
    for name, repeats in answers.items():
        seconds = [one["seconds"] for one in repeats]
        middle = statistics.median(seconds)
        sides[name] = {key: value for key, value in repeats[-1].items() if "seconds" not in key} | {
            "seconds": {"median": round(middle, 2), "all": [round(s, 2) for s in seconds]},
            "processor_seconds": [round(one["processor_seconds"], 2) for one in repeats],
            "tokens_per_second": round(repeats[-1]["sampled_tokens"] / middle, 1),
            "share_of_limit": round(bound["seconds"] / middle, 3),
        }
    ours = sides["ours"]["seconds"]["median"] if "ours" in sides else None
    ratios = {n: round(s["seconds"]["median"] / ours, 2) for n, s in sides.items() if ours and n != "ours"}
    return {"sides": sides, "ratios": ratios, "limit": dict(bound)}


def limit(rows: Sequence[Row], tokens: int, model: str, threads: int) -> dict[str, Any]:
    """The least seconds for this work; see the module's docstring."""
    import torch

    config = config_only(model).get_text_config()
    hardware = Hardware("cpu", torch.float32, threads)
    probes = machine.limits(config, hardware)
    every = packed.measure(model, [packed_rows := 1024], repeats=3)[0]
    body, head = _weights(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    attended, read = contexts(rows, tokens)
    computed = positions(rows, tokens)
    sampled = _sampled(rows, tokens)
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * size
    operations = 2 * body * computed + 2 * head * sampled + pair * attended
    passes = tokens * (1 + len(rows[0][1]))
    entry = 2 * config.num_hidden_layers * keys * size * 4
    moved = (body + head) * 4 * passes + entry * read
    by_packed = 2 * (body + head) * packed_rows / min(every["plain"], every["packed"]) / 1e6
    rate = max(probes["matmul_gflops"][str(threads)], by_packed)
    seconds = {
        "operations": operations / rate / 1e9,
        "bytes": moved / probes["memory_read_gb_s"][str(threads)] / 1e9,
    }
    return {
        "seconds": round(max(seconds.values()), 3),
        "by": {name: round(value, 3) for name, value in seconds.items()},
        "tokens_per_second": round(sampled / max(seconds.values()), 1),
        "computed_tokens": computed, "gflop": round(operations / 1e9, 1), "gigabytes": round(moved / 1e9, 1),
        "matmul_gflops": {"plain": probes["matmul_gflops"][str(threads)], "with_packed": round(by_packed, 1)},
        "memory_read_gb_s": probes["memory_read_gb_s"][str(threads)],
    }  # fmt: skip


def _weights(config: Any) -> tuple[int, int]:
    """Weights of the layers, and of the head."""
    layer = sum(i * o * times for i, o, times in machine.linear_shapes(config))
    return layer * config.num_hidden_layers, config.hidden_size * config.vocab_size


def _length(row: Row, tokens: int) -> int:
    opening, suffixes = row
    return len(opening) + sum(map(len, suffixes)) + (1 + len(suffixes)) * tokens


def _sampled(rows: Sequence[Row], tokens: int) -> int:
    return sum(tokens * (1 + len(suffixes)) for _, suffixes in rows)


def _beginnings(rows: Sequence[Row]) -> set[tuple[int, ...]]:
    """Every different beginning of the openings: what they share is in it once."""
    return {tuple(opening[:end]) for opening, _ in rows for end in range(1, len(opening) + 1)}


def positions(rows: Sequence[Row], tokens: int) -> int:
    """Tokens that have to go through the model at least once."""
    return len(_beginnings(rows)) + sum(_length(row, tokens) - len(row[0]) - 1 for row in rows)


def contexts(rows: Sequence[Row], tokens: int) -> tuple[int, int]:
    """Pairs of a token and one that it attends to; and those of the tokens that are computed alone."""
    attended, read = sum(map(len, _beginnings(rows))), 0
    for row in rows:
        opening, suffixes = row
        at = len(opening)
        attended += sum(range(at + 1, _length(row, tokens)))
        for turn in range(1 + len(suffixes)):
            read += sum(range(at + 1, at + tokens))  # the reply's first token comes from its prompt
            at += tokens + (len(suffixes[turn]) if turn < len(suffixes) else 0)
    return attended, read


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
