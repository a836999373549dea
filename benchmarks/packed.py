"""What packing is worth: the linear layers of one forward pass, with plain weights and with packed ones.

    python -m benchmarks.packed             # SmolLM2's shapes, all cores; half a minute

Prints one JSON object: for each number of rows the median milliseconds of both, and how many times as quick
the packed ones are. Weights are random: neither side looks at them. The sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import machine
from stateset_ray.metrics import versions
from stateset_ray.models import config_only
from stateset_ray.policies.packed_linear import PackedLinear

__all__ = ["measure"]


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="whose shapes")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: all cores")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 32, 256])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    started = machine.describe()
    result = {
        "command": " ".join(["python -m benchmarks.packed", *sys.argv[1:]]),
        "machine": started | {"load_1min_after": machine.describe()["load_1min"]},
        "commit": machine.commit(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "rows": measure(options.model, options.rows, options.repeats),
    }
    print(json.dumps(result, indent=2), flush=True)


def measure(model: str, rows: list[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of every linear layer of a model, the output layer included, once each."""
    plain = _layers(model)
    packed = [PackedLinear([layer]) for layer in plain]
    results = []
    for count in rows:
        inputs = {layer.in_features: torch.randn(count, layer.in_features) for layer in plain}
        times: dict[str, list[float]] = {"plain": [], "packed": []}
        with torch.inference_mode():
            for turn in range(repeats + 1):
                for side, layers in (("plain", plain), ("packed", packed)):
                    took = _seconds(layers, inputs)
                    if turn:  # the first warms up
                        times[side].append(took * 1e3)
        medians = {side: statistics.median(of_side) for side, of_side in times.items()}
        results.append(
            {"rows": count, **{side: round(ms, 1) for side, ms in medians.items()},
             "ratio": round(medians["plain"] / medians["packed"], 2)}
        )  # fmt: skip
    return results


def _layers(name: str) -> list[torch.nn.Linear]:
    """Layers of a Llama-like model's shapes."""
    config = config_only(name).get_text_config()
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    keys = size * (getattr(config, "num_key_value_heads", None) or heads)
    block = [
        (hidden, heads * size), (hidden, keys), (hidden, keys), (heads * size, hidden),
        (hidden, inner), (hidden, inner), (inner, hidden),
    ]  # fmt: skip
    shapes = block * config.num_hidden_layers + [(hidden, config.vocab_size)]
    return [torch.nn.Linear(wide, out, bias=False).requires_grad_(False) for wide, out in shapes]


def _seconds(layers: Sequence[torch.nn.Module], inputs: Mapping[int, torch.Tensor]) -> float:
    started = time.perf_counter()
    for layer in layers:
        layer(inputs[layer.in_features])  # type: ignore[index]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
