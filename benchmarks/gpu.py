"""Training on one GPU that engine and learner share: speed, utilization, and what taking turns saves.

    python -m benchmarks.gpu             # on a machine with a GPU; minutes

A trial without one:

    python -m benchmarks.gpu --device cpu --tokenizer tiny --hidden 64 --layers 2 --tasks 2 --group-size 4

A Llama of random weights (by default 1.3 billion parameters) with SmolLM2's tokenizer, in bfloat16 on a GPU,
under DeepSpeed's ZeRO 1, plays `--tasks` groups a step in an environment that rewards by chance, so that
every group has a gradient. Sides, one after the other, each a run of its own:

| side       | what it is                                                                            |
|------------|---------------------------------------------------------------------------------------|
| `together` | weights and cache of the engine stay on the device while the learner computes         |
| `sleep`    | `rollout.sleep`: they are given up before each update                                 |

| figure                 | what it is                                                                     |
|------------------------|--------------------------------------------------------------------------------|
| `step_seconds`         | wall clock of a whole step, median; the first one is not counted               |
| `rollout`, `learner`   | tokens a second that were sampled; that were learned from (shared ones once)   |
| `utilization`          | useful operations a second of the update, by what matrix products of the       |
|                        | model's shapes reach in this run (`limit_tflops`), and by `--peak-tflops`      |
| `device_gib`           | the most memory of the device that was taken at one time, by anybody           |

Useful operations: 6 a token and weight outside of the embedding, and 6 a sampled token and weight of the
head. Attention, and what checkpointing computes twice, are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from stateset_ray.config import Config, load_config
from stateset_ray.metrics import versions
from stateset_ray.models import choose_hardware, config_only, local_folder
from stateset_ray.train import train

__all__ = ["measure", "parse"]

_LOOK = 0.02  # seconds between looks at the device's memory
_GIB = 2**30


def main() -> None:
    """Measure, then print."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu with a small model is a trial")
    started = machine.describe()
    result = {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "machine": started, "commit": machine.commit(), "versions": versions(),
        "work": {key: value for key, value in vars(options).items() if key != "output"},
        **measure(options),
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides, and what the device could do."""
    with tempfile.TemporaryDirectory(prefix="gpu") as folder:
        model = Path(folder) / "model"
        parameters = _build(model, options)
        sides = {
            side: _play(side, model, Path(folder), options) for side in ("together", "sleep")
        }  # fmt: skip
        config = _config("together", model, Path(folder), options)
        hardware = choose_hardware(config.model, float(options.device == "cuda"))
        shapes = config_only(str(model))
        limit = machine.limits(shapes, hardware)["matmul_gflops"][str(hardware.threads)] * 1e9
    for side in sides.values():
        done = 6 * (
            parameters["body"] * side["tokens"] + parameters["head"] * side["masked_tokens"]
        ) / side["update_seconds"]  # fmt: skip
        side["utilization"] = {
            "of_limit": round(done / limit, 3),
            "of_peak": round(done / options.peak_tflops / 1e12, 4) if options.peak_tflops else None,
        }
    return {"parameters": parameters, "limit_tflops": round(limit / 1e12, 3), "sides": sides}


def _build(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Write the model; how many weights its layers have, and its head."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    base = local_folder(options.tokenizer)
    config = AutoConfig.from_pretrained(base)
    heads = max(1, options.hidden // 128)
    config.update(
        {
            "hidden_size": options.hidden, "num_hidden_layers": options.layers,
            "intermediate_size": options.hidden * 11 // 4 // 64 * 64 or 64, "tie_word_embeddings": True,
            "num_attention_heads": heads, "num_key_value_heads": heads,
            "head_dim": options.hidden // heads, "max_position_embeddings": 8192,
        }
    )  # fmt: skip
    with torch.device(options.device):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head  # the tied embedding is the head
    del model
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return {"body": body, "head": head}


def _config(side: str, model: Path, folder: Path, options: argparse.Namespace) -> Config:
    gpus = 0.5 if options.device == "cuda" else 0
    return load_config(None, [
        f"run.dir={folder}", f"run.name={side}", "run.log_trajectories=0", f"model.name={model}",
        f"model.device={options.device}", "environment.path=benchmarks.chance:Chance",
        f"environment.options.words={options.prompt_words}", "rollout.max_turns=2",
        f"rollout.max_turn_tokens={options.turn_tokens}", f"rollout.max_context={options.context}",
        "rollout.on_cut_reply=close", f"rollout.concurrency={options.tasks * options.group_size}",
        f"rollout.sleep={str(side == 'sleep').lower()}", f"grpo.group_size={options.group_size}",
        "learner.engine=deepspeed", "learner.zero_stage=1", "learner.gradient_checkpointing=true",
        f"learner.micro_batch_tokens={options.micro_batch}", "learner.learning_rate=1e-6",
        f"learner.attention={'flex' if options.flex else 'sdpa'}", f"train.steps={options.steps}",
        f"train.tasks_per_step={options.tasks}", "train.checkpoint_every=100000", "evaluate.tasks=0",
        f"cluster.worker_gpus={gpus}", f"cluster.learner_gpus={gpus}", "cluster.wait_seconds=300",
    ])  # fmt: skip


def _play(side: str, model: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    steps: list[Mapping[str, Any]] = []

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            steps.append(event)
            print(f"{side}: step {event['step']} {event['seconds']}", file=sys.stderr, flush=True)

    with _taken(options.device) as taken:
        train(_config(side, model, folder, options), on_event=watch)
    counted = steps[1:]

    def median(of: str, inside: str = "") -> float:
        return statistics.median((step[inside] if inside else step)[of] for step in counted)

    return {
        "step_seconds": round(statistics.median(sum(step["seconds"].values()) for step in counted), 3),
        "phases": {name: round(median(name, "seconds"), 3) for name in counted[0]["seconds"]},
        "rollout": round(median("rollout_tokens_per_second"), 1),
        "learner": round(median("learner_tokens_per_second"), 1),
        "tokens": int(median("tokens", "update")),
        "masked_tokens": int(median("masked_tokens", "update")),
        "update_seconds": round(median("seconds", "update"), 3),
        "learner_peak_gib": round(median("peak_memory_bytes", "update") / _GIB, 2),
        "device_gib": round(max(taken) / _GIB, 2) if taken else None,
        "kl_mismatch": median("kl_mismatch"),
    }


@contextmanager
def _taken(device: str) -> Iterator[list[int]]:
    """Bytes of the device that are taken, looked at all the time; nothing on a CPU."""
    found: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK):
            free, total = torch.cuda.mem_get_info()
            found.append(total - free)

    thread = threading.Thread(target=look, name="memory", daemon=True)
    if device == "cuda":
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; of the command line where none are given."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokenizer", default="smollm2", help="whose tokenizer and kind of model")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tasks", type=int, default=16, help="groups of a step")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--turn-tokens", type=int, default=128, help="of each of two replies")
    parser.add_argument("--prompt-words", type=int, default=128, help="of the opening")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=16384, help="tokens of a forward pass")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--flex", action="store_true", help="the learner's attention as one fused kernel")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="of the device, by its maker (bf16, dense)"
    )
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
