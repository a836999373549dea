"""How fast training is, beside the plain way to do the same and beside what the machine can do.

    python -m benchmarks.training                              # from the repository's root; minutes
    python -m benchmarks.training --model tiny --conversations 4 --repeats 1 --no-ray       # a trial

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.training --threads 1                       # a busy machine

Prints one JSON object on stdout (`--out FILE`: into a file too) and what it is doing on stderr. Both sides
play the same conversations (`benchmarks.conversations`: three turns, 16 sampled tokens each) with the same
model, dtype and threads, and learn from the same rows; repeats are interleaved: plain, ours, plain, ours.

| figure                                | what it is                                                        |
|---------------------------------------|-------------------------------------------------------------------|
| `limits`                              | this machine, this run: matmuls of the model's shapes; memory     |
| `work`                                | tokens that are sampled, prefilled by each side, and learned from |
| `rollout.ours`, `.plain`              | seconds of all conversations; sampled tokens a second             |
| `rollout.speedup`                     | median seconds plain / median seconds ours                        |
| `rollout.prefill`, `.decode`          | the engine alone: passes of new prompts only, of one token a row  |
| `learner.ours`, `.plain`, `.speedup`  | one optimizer step; tokens of the rows (no padding) a second      |
| `publish`                             | weights from learner to engine, in process and through Ray        |
| `step`                                | the second of two real GRPO steps through Ray, by phase           |
| `step.outside_rollout_and_learner`    | share of the step's wall clock in neither of these phases         |
| `processor_seconds`                   | of all threads; where others use the machine, compare by these    |
| `share_of_matmul_limit`               | useful operations a second by what `limits` says is possible      |
| `share_of_memory_limit`               | bytes of weights read a second (once a pass) by the same          |

Useful operations: 2 a token for each weight outside the embedding and 2 for each weight of the head where a
logit is needed (every sampled token); three times that in training. Padding, history that is computed again
and logits that nobody asked for are not useful, attention is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, ours, plain
from benchmarks.conversations import TURNS, Script, limits, render, scripts
from stateset_ray.actors.placement import cluster
from stateset_ray.config import Config, ModelConfig, load_config
from stateset_ray.grpo.samples import samples as to_samples
from stateset_ray.grpo.samples import shared_prefix
from stateset_ray.learner.batch import Item, MiniBatch, plan
from stateset_ray.learner.learner import Learner
from stateset_ray.metrics import versions
from stateset_ray.models import Hardware, choose_hardware, load_model, load_tokenizer
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Sample, Trajectory

_TOKENS = 16  # of every reply


def main() -> None:
    """Measure, then print."""
    options = _options()
    # Libraries and Ray's workers print; the one thing on the real stdout is the result.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    text = json.dumps(measure(options), indent=2)
    print(text, file=stdout, flush=True)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a folder or a Hugging Face id")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: all cores")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action=argparse.BooleanOptionalAction, default=True, help="real steps, too")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, in the order in which they are listed above."""
    import torch

    config = load_config(None, [f"model.name={options.model}", f"model.dtype={options.dtype}"])
    section = ModelConfig(dtype=options.dtype, threads=options.threads)
    hardware = choose_hardware(section, gpus=float(torch.cuda.is_available()))
    hardware.apply()
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.training", *sys.argv[1:]]),
        "machine": machine.describe(), "commit": machine.commit(), "versions": versions(),
        "seed": options.seed, "repeats": options.repeats, "model": options.model,
        "dtype": str(hardware.dtype).removeprefix("torch."), "threads": hardware.threads,
    }  # fmt: skip
    model = load_model(options.model, hardware)
    _say("the machine's limits")
    result["limits"] = machine.limits(model.config, hardware)
    scale = _Scale(model, result["limits"], hardware)
    rollout, trajectories, work = _rollout(options, model, hardware, scale)
    del model
    room = work["max_context"]
    config = config.with_overrides(
        [f"rollout.max_context={room}", f"learner.micro_batch_tokens={max(1024, room)}"]
    )
    rows = _rows(trajectories, options.seed)
    work |= {"learner_tokens": sum(map(len, rows)), "masked_tokens": _masked(rows)}
    result |= {"work": work, "rollout": rollout}
    learner = Learner(config, 0, 1, ("127.0.0.1", 0), hardware)
    result["learner"] = _learner(options, config, hardware, learner, rows, scale)
    result["publish"] = _publish(options, config, hardware, learner)
    learner.close()
    if options.ray:
        _say("real steps through Ray")
        result["step"] = _step(options)
    result["machine"]["load_1min_after"] = machine.describe()["load_1min"]
    return result


class _Scale:
    """Useful operations of the model, as shares of the machine's limits."""

    def __init__(self, model: Any, limits: Mapping[str, Any], hardware: Hardware) -> None:
        threads = str(hardware.threads)
        self.head = model.get_output_embeddings().weight.numel()
        untied = {id(p): p.numel() for p in model.parameters()}
        untied.pop(id(model.get_input_embeddings().weight), None)
        untied.pop(id(model.get_output_embeddings().weight), None)
        self.body = sum(untied.values())
        self.bytes = (self.body + self.head) * hardware.dtype.itemsize
        self._gflops = limits["matmul_gflops"][threads]
        self._gb_s = limits["memory_read_gb_s"][threads]

    def matmul(self, tokens: int, logits: int, seconds: float, passes: int = 1) -> float:
        """Share of the matmul limit; `passes` is 3 for forward and backward."""
        done = passes * 2 * (tokens * self.body + logits * self.head)
        return _three_digits(done / seconds / 1e9 / self._gflops)

    def memory(self, forwards: int, seconds: float) -> float:
        """Share of the memory limit."""
        return _three_digits(forwards * self.bytes / seconds / 1e9 / self._gb_s)


def _three_digits(share: float) -> float:
    """Rounded, but never to 0: a tiny model on a busy machine reaches a ten-thousandth."""
    return float(f"{share:.3g}")


def _rollout(
    options: argparse.Namespace, model: Any, hardware: Hardware, scale: _Scale
) -> tuple[dict[str, Any], list[Trajectory], dict[str, int]]:
    renderer = Renderer(load_tokenizer(options.model))
    played = scripts(options.conversations, options.seed)
    bounds = limits(played, renderer, _TOKENS)
    other = plain.load_plain(options.model, hardware)
    last: dict[str, Any] = {}

    def play_plain(part: Sequence[Script] = played) -> None:
        rendered = [render(script, renderer) for script in part]
        last["plain"] = plain.play_plain(other, rendered, _TOKENS, options.seed)

    def play_ours(part: Sequence[Script] = played) -> None:
        last["trajectories"], last["ours"] = ours.play_ours(
            model, part, renderer, bounds, hardware, options.seed
        )

    play_plain(played[:2])
    play_ours(played[:2])
    spent = _interleaved({"plain": play_plain, "ours": play_ours}, options.repeats, hardware, "rollout")
    passes = [ours.engine_passes(model, played, renderer, bounds, hardware) for _ in range(options.repeats)]
    trajectories, counted = last["trajectories"], last["ours"]
    sampled = sum(t.sampled_tokens for t in trajectories)
    found = _compared(spent, {"ours": sampled, "plain": last["plain"]["sampled_tokens"]}, "sampled_tokens")
    # The last token of a reply is only computed if a next turn follows, and counts as prefilled then.
    once = sampled + counted["prefill_tokens"] - len(played) * TURNS
    for side in ("ours", "plain"):
        # The same useful work for both: each token once, and a shared opening once.
        found[side]["share_of_matmul_limit"] = scale.matmul(once, sampled, found[side]["seconds"]["median"])
    found["ours"]["forwards"] = counted["forwards"]
    found["ours"]["engine_seconds_of_last"] = round(counted["seconds"], 3)
    for kind in ("prefill", "decode"):
        tokens, seconds = passes[0][kind][0], _times([p[kind][1] for p in passes])
        logits = len(played) if kind == "prefill" else tokens
        found[kind] = {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": round(tokens / seconds["median"], 1),
            "share_of_matmul_limit": scale.matmul(tokens, logits, seconds["median"]),
        }
    decode = found["decode"]
    decode["share_of_memory_limit"] = scale.memory(
        decode["tokens"] // len(played), decode["seconds"]["median"]
    )
    work = {
        "conversations": len(played), "turns": TURNS, "tokens_per_reply": _TOKENS,
        "sampled_tokens": sampled, "prompt_tokens": int(counted["prompt_tokens"]),
        "prefilled_by_ours": int(counted["prefill_tokens"]),
        "prefilled_by_plain": last["plain"]["prefill_tokens"], "max_context": bounds.max_context,
    }  # fmt: skip
    return found, trajectories, work


def _rows(trajectories: Sequence[Trajectory], seed: int) -> list[Sample]:
    """The rows of the conversations, with an advantage that is not 0."""
    rng = np.random.default_rng(seed)
    credits = [[float(rng.choice((-1, 1)))] * len(t.turns) for t in trajectories]
    return [
        row.credited(credit) for t, credit in zip(trajectories, credits, strict=True) for row in to_samples(t)
    ]


def _masked(rows: Sequence[Sample]) -> int:
    return sum(int(row.loss_mask.sum()) for row in rows)


def _learner(
    options: argparse.Namespace,
    config: Config,
    hardware: Hardware,
    learner: Learner,
    rows: list[Sample],
    scale: _Scale,
) -> dict[str, Any]:
    """The learner against a plain loop."""
    other = plain.PlainLearner(config, hardware)
    masked = _masked(rows)

    def step_plain(part: list[Sample] = rows) -> None:
        other.update(part, masked)

    def step_ours(part: list[Sample] = rows) -> None:
        # All conversations begin alike here: what they share is computed once in each micro-batch.
        prefix = shared_prefix(part)
        [planned] = plan([Item(len(row), 0, prefix) for row in part], 1, config.learner.micro_batch_tokens)
        micro_batches = [[part[i] for i in one] for one in planned]
        groups = [[0] * len(one) for one in micro_batches]
        metrics = learner.update([MiniBatch(micro_batches, groups, masked)], 0)
        computed["ours"] = int(metrics["tokens"])

    computed = {"plain": sum(map(len, rows))}

    step_plain(rows[:2])
    step_ours(rows[:2])
    spent = _interleaved({"plain": step_plain, "ours": step_ours}, options.repeats, hardware, "learner")
    tokens = sum(map(len, rows))
    found = _compared(spent, {"ours": tokens, "plain": tokens}, "tokens")
    for side in ("ours", "plain"):
        median = found[side]["seconds"]["median"]
        found[side]["computed_tokens"] = computed[side]
        found[side]["share_of_matmul_limit"] = scale.matmul(computed[side], masked, median, passes=3)
    return found


def _publish(
    options: argparse.Namespace, config: Config, hardware: Hardware, learner: Learner
) -> dict[str, Any]:
    """Seconds from the learner's weights to an engine that holds them."""
    _say("publish")
    engine = ours.new_engine(load_model(options.model, hardware), config.rollout, hardware)
    ours.publish_in_process(learner, engine)
    found = {"in_process": _each([ours.publish_in_process(learner, engine) for _ in range(options.repeats)])}
    del engine
    arrays = learner.export_weights()
    found["bytes"] = sum(array.nbytes for array in arrays.values())
    if options.ray:
        with cluster(config):
            times = ours.publish_through_ray(arrays, options.model, hardware, options.repeats)
        found["through_ray"] = _each(times)
    return found


def _each(measured: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: _times([one[name] for one in measured]) for name in measured[0]}


def _step(options: argparse.Namespace) -> dict[str, Any]:
    """The second of two steps: the first also warms everything up."""
    last = ours.steps(options.model, options.dtype, options.conversations, options.seed)[-1]
    whole = last["whole"]
    phases = {name: round(last[name], 4) for name in ("rollout", "credit", "learner", "publish", "whole")}
    inside = {"engine_in_rollout": last["engine"], "update_in_learner": last["update"]}
    return {
        "seconds": phases | {name: round(value, 4) for name, value in inside.items()},
        "shares": {
            name: round(last[name] / whole, 4) for name in ("rollout", "credit", "learner", "publish")
        },
        "outside_rollout_and_learner": round(1 - (last["rollout"] + last["learner"]) / whole, 4),
        "outside_engine_and_update": round(1 - sum(inside.values()) / whole, 4),
        "sampled_tokens": last["sampled_tokens"],
        "learner_tokens": last["learner_tokens"],
        "kl_mismatch": last["kl_mismatch"],
    }


def _interleaved(
    sides: Mapping[str, Callable[[], Any]], repeats: int, hardware: Hardware, what: str
) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of every repeat of each side."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, work in sides.items():
            wall, busy = machine.seconds(work, hardware.device)
            spent[name].append((wall, busy))
            _say(f"{what} {repeat + 1}/{repeats} {name}: {wall:.2f} s, processor {busy:.2f} s")
    return spent


def _compared(
    spent: Mapping[str, list[tuple[float, float]]], tokens: Mapping[str, int], name: str
) -> dict[str, Any]:
    """Both sides, and the ratio of their medians."""
    found: dict[str, Any] = {}
    for side, pairs in spent.items():
        times, busy = _times([wall for wall, _ in pairs]), _times([cpu for _, cpu in pairs])
        rate = round(tokens[side] / times["median"], 1)
        found[side] = {
            name: tokens[side], "seconds": times, "processor_seconds": busy, f"{name}_per_second": rate
        }  # fmt: skip
    for figure, key in (("seconds", "speedup"), ("processor_seconds", "speedup_in_processor_seconds")):
        ratio = found["plain"][figure]["median"] / found["ours"][figure]["median"]
        found[key] = round(ratio, 2)
    return found


def _times(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(seconds), 4),
        "min": round(min(seconds), 4),
        "all": [round(value, 4) for value in seconds],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
