"""One rank of the learner, without Ray: samples in, one optimizer step, weights out.

All ranks call the same methods in the same order; each method says what every rank must agree on. A rank
that raises leaves the others waiting in a collective: whoever owns the ranks ends them all, builds new
ones and loads the last checkpoint.
"""

from __future__ import annotations

import math
import os
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from stateset_ray.config import Config
from stateset_ray.errors import CheckpointError, LearnerError
from stateset_ray.grpo.loss import MAXIMA, SUMS, LossTerms, policy_loss, supervised_loss, token_logprobs
from stateset_ray.learner.batch import PackedBatch, pack
from stateset_ray.learner.engine import DeepSpeedEngine, ragged_logits
from stateset_ray.models import Hardware, load_model, load_tokenizer
from stateset_ray.policies.weights import decode
from stateset_ray.types import Sample, derive_seed

__all__ = ["Learner", "LossKind", "learning_rate"]

LossKind = Literal["policy", "supervised"]

_ENGINE_TAG = "engine"


def learning_rate(config: Config, step: int, loss: LossKind = "policy") -> float:
    """The learning rate of one step, from its number alone, so that a resumed run needs no scheduler.

    Policy steps warm up linearly over `learner.warmup_steps` (step 0 already moves), then stay, fall
    linearly or fall as a half cosine, to 0 after the last of `train.steps`. Supervised steps take
    `train.warm_start.learning_rate` throughout.

    Args:
        step: counted from 0 in each phase.

    Example:
        >>> learning_rate(Config(), step=3)
        1e-05
    """
    if loss == "supervised":
        return config.train.warm_start.learning_rate
    learner, total = config.learner, config.train.steps
    if step < learner.warmup_steps:
        return learner.learning_rate * (step + 1) / learner.warmup_steps
    if learner.schedule == "constant":
        return learner.learning_rate
    done = min(1.0, (step - learner.warmup_steps) / (total - learner.warmup_steps))
    left = 1 - done if learner.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return learner.learning_rate * left


class Learner:
    """One rank: model, optimizer, and a frozen reference where `grpo.kl_coef` asks for one.

    The supervised warm start and GRPO are the same code with another loss per token, and share one
    optimizer: its moments carry over from one phase to the next, the learning rate is set at each step.

    Args:
        config: the whole configuration.
        rank: of `world` ranks, which all get the same configuration.
        master: host and port of rank 0; port 0 picks a free one where `world` is 1.
        hardware: where this rank computes.
        model_folder: weights to start from, instead of `model.name`. The reference is `model.name` always,
            the model that the run began with.

    Raises:
        ModelError: the model cannot be loaded.
        LearnerError: the ranks do not find each other.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        world: int,
        master: tuple[str, int],
        hardware: Hardware,
        model_folder: str | None = None,
    ) -> None:
        self.rank = rank
        self.world = world
        self._config = config
        self._hardware = hardware
        hardware.apply()
        _seed(derive_seed(config.run.seed, "learner", rank))
        self._reference = _frozen(config.model.name, hardware) if config.grpo.kl_coef > 0 else None
        model = load_model(model_folder or config.model.name, hardware)
        self._hf_config, self._generation_config = model.config, model.generation_config
        self._model_class = type(model)
        self._engine = DeepSpeedEngine(model, config.learner, hardware, rank, world, master)

    def update(
        self,
        micro_batches: Sequence[Sequence[Sample]],
        denominator: int,
        step: int,
        loss: LossKind = "policy",
    ) -> dict[str, float]:
        """One optimizer step over the micro-batches of all ranks.

        Args:
            micro_batches: this rank's part of `batch.plan`; as many on every rank, empty ones included.
            denominator: masked tokens of the whole step over all ranks, those left out of the plan
                included; the same on every rank.
            step: number of the step within its phase; decides the learning rate.
            loss: "policy" learns from advantages at the sampling temperature (the distribution that was
                drawn from), "supervised" from the masked tokens as they are, at temperature 1.

        Returns:
            Equal on all ranks but for `seconds`: `loss`, `grad_norm` (before clipping), `learning_rate`,
            `applied` (1.0), `tokens` (forward and backward) and `masked_tokens` over all ranks, `seconds`
            of this rank, `peak_memory_bytes` of the largest rank (device memory; on a CPU, of the
            process). With "policy" also `ratio_mean`, `ratio_max`, `clip_fraction_low`,
            `clip_fraction_high`, `kl_mismatch` and `kl_mismatch_k3` (nats per token, sampler against
            trainer), and `kl_reference` with a reference: means over the masked tokens seen.

        Raises:
            LearnerError: there is nothing to learn from; the loss or a gradient is not finite (on all
                ranks alike, and no weight has changed); or a sample is malformed.
        """
        started = time.perf_counter()
        if not micro_batches or denominator < 1:
            raise LearnerError(
                "there is nothing to learn from",
                given=f"{len(micro_batches)} micro-batches, {denominator} masked tokens",
                mend="skip the update when no sample has an advantage",
            )
        packed = [pack(samples) for samples in micro_batches]
        tally = _Tally(self._hardware.device)
        for batch in packed:
            terms = self._terms(batch, denominator, loss)
            self._engine.backward(terms.loss)
            tally.add(terms, batch)
        sums, maxima = tally.reduce(self._engine)
        if not math.isfinite(sums["loss"]):
            raise LearnerError(
                f"the loss of step {step} is not finite; no weight has changed",
                given=sums["loss"],
                mend="look at kl_mismatch and grad_norm of the steps before; lower learner.learning_rate",
            )
        rate = learning_rate(self._config, step, loss)
        result = self._engine.step(rate)
        if not result.applied:
            raise LearnerError(
                f"a gradient of step {step} is not finite; no weight has changed",
                given=result.grad_norm,
                mend="lower learner.learning_rate, or set model.dtype='float32'",
            )
        return {
            **_means(sums, maxima, loss, self._reference is not None),
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "applied": 1.0,
            "seconds": time.perf_counter() - started,
        }

    def _terms(self, batch: PackedBatch, denominator: int, loss: LossKind) -> LossTerms:
        temperature = self._config.rollout.temperature if loss == "policy" else 1.0
        targets_M = self._tensor(batch.target_ids)
        logprobs_M = token_logprobs(self._engine.forward(batch), targets_M, temperature)
        if batch.padding:
            # It must depend on the parameters, or ZeRO's collectives would wait for this rank.
            return LossTerms(logprobs_M.sum() * 0.0, {}, {})
        if loss == "supervised":
            return supervised_loss(logprobs_M, denominator=denominator)
        reference_M = None
        if self._reference is not None:
            with torch.no_grad():
                logits = ragged_logits(self._reference, batch, self._hardware.device)
                reference_M = token_logprobs(logits, targets_M, temperature)
        grpo = self._config.grpo
        return policy_loss(
            logprobs_M,
            self._tensor(batch.sampler_logprobs),
            self._tensor(batch.advantages),
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            denominator=denominator,
            reference_logprobs_N=reference_M,
            kl_coef=grpo.kl_coef,
        )

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._hardware.device)

    def export_weights(self) -> dict[str, npt.NDArray[Any]]:
        """The weights by name on rank 0 (see `policies.weights`), {} elsewhere; call it on all ranks."""
        return self._engine.export()

    def save_model(self, folder: str | Path) -> None:
        """Write the model in the Hugging Face layout into `folder`: weights, configuration, tokenizer.

        Call it on all ranks; rank 0 writes. `AutoModelForCausalLM.from_pretrained(folder)` loads it.

        Raises:
            CheckpointError: it cannot be written.
        """
        weights = self.export_weights()
        if self.rank != 0:
            return
        try:
            with torch.device("meta"):
                shell = self._model_class(self._hf_config)
            shell.generation_config = self._generation_config
            shell.save_pretrained(folder, state_dict={name: decode(a) for name, a in weights.items()})
            load_tokenizer(self._config.model.name).save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(f"the model cannot be written: {error}", given=str(folder)) from error

    def save_state(self, folder: str | Path) -> None:
        """Write what an exact continuation needs besides the samples: optimizer, weights, this rank's
        random states. Call it on all ranks, with one folder that all of them see.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._engine.save(folder, _ENGINE_TAG)
        try:
            torch.save(_random_states(), Path(folder) / f"random-{self.rank}.pt")
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the random states cannot be written: {error}", given=str(folder)
            ) from error

    def load_state(self, folder: str | Path) -> None:
        """Continue exactly where `save_state` was called; only as the first call on a new learner.

        Call it on all ranks. The number of ranks, the ZeRO stage and the dtype must be the same.

        Raises:
            CheckpointError: the state is missing, incomplete, or of another layout.
        """
        self._engine.load(folder, _ENGINE_TAG)
        path = Path(folder) / f"random-{self.rank}.pt"
        try:
            states = torch.load(path, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(f"the random states cannot be read: {error}", given=str(path)) from error
        _set_random_states(states)

    def close(self) -> None:
        """Free the model and leave the process group."""
        self._engine.destroy()
        self._reference = None


class _Tally:
    """Diagnostics of a step: kept on the device, and reduced over the ranks by one collective."""

    _KEYS = (*(f"sum/{name}" for name in (*SUMS, "packed")), *(f"max/{name}" for name in (*MAXIMA, "memory")))

    def __init__(self, device: str) -> None:
        self._row = torch.zeros(len(self._KEYS), dtype=torch.float64, device=device)
        self._at = {key: index for index, key in enumerate(self._KEYS)}

    def add(self, terms: LossTerms, batch: PackedBatch) -> None:
        for name, value in terms.sums.items():
            self._row[self._at[f"sum/{name}"]] += value
        for name, value in terms.maxima.items():
            at = self._at[f"max/{name}"]
            self._row[at] = torch.maximum(self._row[at], value)
        self._row[self._at["sum/packed"]] += batch.tokens

    def reduce(self, engine: DeepSpeedEngine) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and maxima over all ranks, the same on each."""
        self._row[self._at["max/memory"]] = _peak_memory(self._row.device.type)
        # Each rank fills its own row: the sum gathers all rows, whatever is then taken of them.
        rows = torch.zeros(engine.world, len(self._KEYS), dtype=torch.float64, device=self._row.device)
        rows[engine.rank] = self._row
        table = engine.all_reduce(rows).cpu()
        totals = dict(zip(self._KEYS, table.sum(0).tolist(), strict=True))
        largest = dict(zip(self._KEYS, table.amax(0).tolist(), strict=True))
        return (
            {key.removeprefix("sum/"): value for key, value in totals.items() if key.startswith("sum/")},
            {key.removeprefix("max/"): value for key, value in largest.items() if key.startswith("max/")},
        )


def _means(
    sums: dict[str, float], maxima: dict[str, float], loss: LossKind, reference: bool
) -> dict[str, float]:
    tokens = max(1.0, sums["tokens"])
    metrics = {
        "loss": sums["loss"],
        "tokens": sums["packed"],
        "masked_tokens": sums["tokens"],
        "peak_memory_bytes": maxima["memory"],
    }
    if loss == "supervised":
        return metrics
    if reference:
        metrics["kl_reference"] = sums["kl_reference"] / tokens
    return metrics | {
        "ratio_mean": sums["ratio"] / tokens,
        "ratio_max": maxima["ratio"],
        "clip_fraction_low": sums["clipped_low"] / tokens,
        "clip_fraction_high": sums["clipped_high"] / tokens,
        "kl_mismatch": sums["mismatch_k1"] / tokens,
        "kl_mismatch_k3": sums["mismatch_k3"] / tokens,
    }


def _peak_memory(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _frozen(name: str, hardware: Hardware) -> Any:
    return load_model(name, hardware).requires_grad_(False)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
