"""One run of one side, in a process of its own: `python -m benchmarks.peers.sides SIDE '{"model": ...}'`.

Prints one JSON object: for each step its wall-clock seconds, mean reward and sampled tokens. Both sides
begin with the same weights, see the same prompts in the same order, and take steps of the same size.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.task import opening, reward

__all__ = ["ADAM", "play"]

ADAM = {"learning_rate": 5e-5, "betas": (0.9, 0.95), "weight_decay": 0.0, "max_grad_norm": 1.0}
_CLIP = (0.2, 0.28)

_Options = Mapping[str, Any]


def play(side: str, options: _Options) -> dict[str, Any]:
    """Train for `steps` steps of `prompts` x `group_size` samples.

    Args:
        side: "ours" or "trl".
        options: model, seed, steps, prompts, group_size, tokens (of a reply at most), threads.

    Returns:
        `steps`: [{"seconds", "reward", "sampled_tokens"}], and what came before and after them in seconds.
    """
    return {"ours": _ours, "trl": _trl}[side](options)


def _ours(options: _Options) -> dict[str, Any]:
    from stateset_ray.config import load_config
    from stateset_ray.train import train

    started = time.monotonic()
    ends: list[float] = []
    records: list[dict[str, Any]] = []

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            ends.append(time.monotonic())
            records.append(dict(event))

    with tempfile.TemporaryDirectory(prefix="peers") as folder:
        room = _longest_prompt(options) + options["tokens"] + 8
        config = load_config(
            None,
            [
                f"run.dir={folder}", "run.name=ours", f"run.seed={options['seed']}", "run.log_trajectories=0",
                f"model.name={options['model']}", f"model.threads={options['threads']}",
                "model.dtype=float32", "model.device=cpu",
                "environment.path=benchmarks.peers.task:Question",
                "rollout.max_turns=1", f"rollout.max_turn_tokens={options['tokens']}",
                f"rollout.max_context={room}", "rollout.temperature=1.0",
                f"rollout.concurrency={options['prompts'] * options['group_size']}",
                f"grpo.group_size={options['group_size']}", "grpo.advantage=mean", "grpo.loss=ppo",
                f"grpo.clip_low={_CLIP[0]}", f"grpo.clip_high={_CLIP[1]}", "grpo.aggregation=token_mean",
                f"learner.engine={options['engine']}", "learner.share_prefix=true",
                f"learner.logit_chunk={options['logit_chunk']}",
                f"learner.micro_batch_tokens={max(2048, room)}",
                f"learner.learning_rate={ADAM['learning_rate']}", f"learner.betas={list(ADAM['betas'])}",
                f"learner.weight_decay={ADAM['weight_decay']}",
                f"learner.max_grad_norm={ADAM['max_grad_norm']}",
                f"train.steps={options['steps']}", f"train.tasks_per_step={options['prompts']}",
                "train.checkpoint_every=100000", "evaluate.tasks=0",
            ],
        )  # fmt: skip
        train(config, on_event=watch)
    # Nothing is said when the first step begins; what it spent is what its phases say.
    first = sum(records[0]["seconds"].values())
    seconds = [first, *(b - a for a, b in itertools.pairwise(ends))]
    samples = options["prompts"] * options["group_size"]
    return {
        "before": ends[0] - first - started,
        "after": time.monotonic() - ends[-1],
        "steps": [
            {
                "seconds": took,
                "reward": record["reward_mean"],
                "sampled_tokens": record["tokens_per_trajectory"]["mean"] * samples,
                "phases": record["seconds"],
                "learner_peak_bytes": record["update"].get("peak_memory_bytes"),
            }
            for took, record in zip(seconds, records, strict=True)
        ],
    }


def _longest_prompt(options: _Options) -> int:
    from stateset_ray.models import load_tokenizer
    from stateset_ray.policies.renderer import Renderer

    renderer = Renderer(load_tokenizer(options["model"]))
    wanted = range(options["prompts"] * options["steps"])
    return max(len(renderer.opening(opening(index))) for index in wanted)


def _trl(options: _Options) -> dict[str, Any]:
    started = time.monotonic()
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from stateset_ray.models import load_tokenizer, local_folder

    torch.set_num_threads(options["threads"] or len(os.sched_getaffinity(0)))
    samples = options["prompts"] * options["group_size"]
    ends: list[float] = []
    rewards: list[list[float]] = []
    lengths: list[int] = []

    def graded(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        rewards.append([reward(messages[0]["content"]) for messages in completions])
        lengths.append(sum(map(len, completion_ids)))
        return rewards[-1]

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

    rows = [
        {"prompt": [{"role": m.role, "content": m.content} for m in opening(index)]}
        for index in range(options["prompts"] * options["steps"])
    ]
    with tempfile.TemporaryDirectory(prefix="peers") as folder:
        settings = GRPOConfig(
            output_dir=folder, seed=options["seed"], use_cpu=True, bf16=False, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, max_steps=options["steps"],
            per_device_train_batch_size=samples,
            gradient_accumulation_steps=1, num_generations=options["group_size"],
            max_completion_length=options["tokens"], shuffle_dataset=False, temperature=1.0, top_p=1.0,
            top_k=0, beta=0.0, loss_type="dapo", scale_rewards="none", epsilon=_CLIP[0],
            epsilon_high=_CLIP[1], num_iterations=1, gradient_checkpointing=False,
            optim="adamw_torch_fused", learning_rate=ADAM["learning_rate"], adam_beta1=ADAM["betas"][0],
            adam_beta2=ADAM["betas"][1], weight_decay=ADAM["weight_decay"],
            max_grad_norm=ADAM["max_grad_norm"], lr_scheduler_type="constant",
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=local_folder(options["model"]), reward_funcs=graded, args=settings,
            train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(options["model"]),
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.train()
    if any(len(of_step) != samples for of_step in rewards) or len(rewards) != options["steps"]:
        raise RuntimeError(f"TRL graded {list(map(len, rewards))} samples, not {samples} in every step")
    return {
        "before": ends[0] - started,
        "after": time.monotonic() - ends[-1],
        "steps": [
            {"seconds": end - begin, "reward": sum(earned) / samples, "sampled_tokens": sampled}
            for (begin, end), earned, sampled in zip(itertools.pairwise(ends), rewards, lengths, strict=True)
        ],
    }


def main() -> None:
    """Play one side."""
    # Libraries and Ray's workers print; the one thing on the real stdout is the result.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(play(sys.argv[1], json.loads(sys.argv[2]))), file=stdout, flush=True)


if __name__ == "__main__":
    main()
