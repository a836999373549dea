"""One side of the learner's benchmark, in a process of its own, which is asked for one thing at a time.

    parent:  with Side({"side": "ours", "model": "tiny", ...}) as side: side.ask({"do": "update", ...})
    child:   python -m benchmarks.sides '{"side": "ours", ...}'   answers each line of JSON with one

| side        | what it is                                                                  |
|-------------|-----------------------------------------------------------------------------|
| `ours`      | `learner.Learner`, engine and settings as asked                             |
| `naive`     | `plain.PlainLearner`: whole rows, logits of all positions, torch's AdamW    |
| `gradients` | our model alone: how far the gradients of two ways to pack lie apart        |

Memory is the process's (`VmHWM`, set back before each update); the device's on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from benchmarks.trajectories import Shape, ids_and_masks, minibatch
from stateset_ray.config import Config, load_config

__all__ = ["Child", "Side", "answer_lines", "config_of"]

ROOT = Path(__file__).parents[1]


class Side:
    """The parent's end of a side. Leaving the context ends its process.

    Args:
        options: of the side; the module reads them as JSON.
        module: what runs in the process.
        python: which interpreter runs it.
        environment: further environment variables.
    """

    def __init__(
        self, options: Mapping[str, Any], module: str = "benchmarks.sides", python: str = sys.executable,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self._options = options
        self._command = [python, "-m", module, json.dumps(options)]
        # Threads that wait sleep: the sides take turns on the same cores.
        self._environment = {"OMP_WAIT_POLICY": "PASSIVE", **environment}

    def __enter__(self) -> Side:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | self._environment,
        )  # fmt: skip
        return self

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What the side answers; raises RuntimeError where it has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side of the benchmark has died: {self._options}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Child(Protocol):
    """What answers in the process of a side."""

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]: ...


class _Ours:
    """The real learner."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        from stateset_ray.learner.learner import Learner
        from stateset_ray.models import choose_hardware, config_only

        self._config = config_of(options)
        hardware = choose_hardware(self._config.model, gpus=_gpus())
        self._vocabulary = int(config_only(options["model"]).vocab_size)
        self._learner = Learner(self._config, 0, 1, ("127.0.0.1", 0), hardware)
        self._steps = 0

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        shape = Shape(**question["shape"])
        rows = ids_and_masks(shape, self._vocabulary, question["seed"])
        budget = question.get("budget", self._config.learner.micro_batch_tokens)
        batch = minibatch(shape, rows, budget, question.get("share", self._config.learner.share_prefix))
        started, busy = time.perf_counter(), time.process_time()
        metrics = self._learner.update([batch], self._steps)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        self._steps += 1
        return {
            "seconds": seconds,
            "processor_seconds": busy,
            "peak_bytes": metrics["peak_memory_bytes"],
            "computed_tokens": metrics["tokens"],
            "micro_batches": len(batch.micro_batches),
            "loss": metrics["loss"],
        }


class _Naive:
    """The plain loop, with the same settings of the loss and the optimizer."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        from benchmarks.plain import PlainLearner
        from stateset_ray.learner.tally import PeakMemory
        from stateset_ray.models import choose_hardware, config_only

        self._config = config_of(options)
        hardware = choose_hardware(self._config.model, gpus=_gpus())
        hardware.apply()
        self._vocabulary = int(config_only(options["model"]).vocab_size)
        self._learner = PlainLearner(self._config, hardware)
        self._memory = PeakMemory(hardware.device)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        shape = Shape(**question["shape"])
        rows = ids_and_masks(shape, self._vocabulary, question["seed"])
        at_once = max(1, self._config.learner.micro_batch_tokens // shape.tokens)
        self._memory.reset()
        started, busy = time.perf_counter(), time.process_time()
        loss = self._learner.update(rows, shape.sampled * shape.trajectories, at_once)
        return {
            "seconds": time.perf_counter() - started,
            "processor_seconds": time.process_time() - busy,
            "peak_bytes": self._memory.bytes(),
            "computed_tokens": shape.all_tokens,
            "micro_batches": -(-len(rows) // at_once),
            "loss": loss,
        }


class _Gradients:
    """No optimizer: the gradient of one step with and without shared prefixes."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        from stateset_ray.learner.policy_model import PolicyModel
        from stateset_ray.models import choose_hardware, load_model

        self._config = config_of(options)
        hardware = choose_hardware(self._config.model, gpus=_gpus())
        hardware.apply()
        model = load_model(options["model"], hardware)
        self._vocabulary = int(model.config.vocab_size)
        self._policy = PolicyModel(model, self._config.learner)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        shape = Shape(**question["shape"])
        rows = ids_and_masks(shape, self._vocabulary, question["seed"])
        kept: list[torch.Tensor] = []
        differ = largest = 0.0
        for share in (False, True):
            self._policy.zero_grad(set_to_none=True)
            self._backward(shape, rows, share)
            gradients = [p.grad for p in self._policy.trained()]
            assert all(g is not None for g in gradients)
            if share:
                differ = max(float((a - b).abs().max()) for a, b in zip(kept, gradients, strict=True))
            else:
                kept = [g.clone() for g in gradients]
                largest = max(float(g.abs().max()) for g in kept)
        return {"difference": differ, "largest": largest, "relative": differ / largest}

    def _backward(self, shape: Shape, rows: list[Any], share: bool) -> None:
        import torch

        from stateset_ray.learner.batch import pack

        budget = self._config.learner.micro_batch_tokens
        batch = minibatch(shape, rows, budget, share)
        for samples, groups in zip(batch.micro_batches, batch.groups, strict=True):
            packed = pack(samples, groups)
            logprobs, _ = self._policy.score(self._policy, packed, 1.0, False)
            # REINFORCE: what the clip would cut on ids that no one sampled would hide a difference.
            (-(logprobs * torch.from_numpy(packed.advantages)).sum() / batch.denominator).backward()


def config_of(options: Mapping[str, Any]) -> Config:
    """The configuration of a side."""
    settings = [f"{key}={value}" for key, value in options.get("settings", {}).items()]
    return load_config(None, [f"model.name={options['model']}", *settings])


def _gpus() -> float:
    import torch

    return float(torch.cuda.is_available())


def _give_back_memory() -> None:
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def answer_lines(kinds: Mapping[str, Callable[[Mapping[str, Any]], Child]]) -> None:
    """Be a side, of the kind that the options name, until the parent closes the line."""
    # Libraries print; the one thing on the real stdout are the answers.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    side = kinds[options["side"]](options)
    for line in sys.stdin:
        question = json.loads(line)
        answer = side.answer(question)
        if question.get("trim"):
            _give_back_memory()
        print(json.dumps(answer), file=stdout, flush=True)


if __name__ == "__main__":
    answer_lines({"ours": _Ours, "naive": _Naive, "gradients": _Gradients})
