"""What a step reports: sums over micro-batches and ranks, means over tokens, and peak memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from stateset_ray.grpo.loss import MAXIMA, SUMS, LossTerms
from stateset_ray.learner.batch import PackedBatch
from stateset_ray.learner.engine import LearnerEngine

__all__ = ["PeakMemory", "Tally"]

_SUMS = (*SUMS, "computed", "unshared")


class Tally:
    """Diagnostics of an optimizer step: kept on the device, and reduced over the ranks by one collective."""

    _KEYS = (*(f"sum/{name}" for name in _SUMS), *(f"max/{name}" for name in MAXIMA))

    def __init__(self, device: str) -> None:
        self._row = torch.zeros(len(self._KEYS), dtype=torch.float64, device=device)
        self._at = {key: index for index, key in enumerate(self._KEYS)}

    def add(self, terms: LossTerms, batch: PackedBatch) -> None:
        """Count one micro-batch of this rank."""
        for name, value in terms.sums.items():
            self._row[self._at[f"sum/{name}"]] += value
        for name, value in terms.maxima.items():
            at = self._at[f"max/{name}"]
            self._row[at] = torch.maximum(self._row[at], value)
        self._row[self._at["sum/computed"]] += batch.tokens
        self._row[self._at["sum/unshared"]] += batch.unshared

    def reduce(self, engine: LearnerEngine) -> None:
        """Make this the tally of all ranks, the same on each."""
        # Each rank fills its own row: the sum gathers all rows, whatever is then taken of them.
        rows = torch.zeros(engine.world, len(self._KEYS), dtype=torch.float64, device=self._row.device)
        rows[engine.rank] = self._row
        table = engine.all_reduce(rows)
        sums = len(_SUMS)
        self._row = torch.cat([table[:, :sums].sum(0), table[:, sums:].amax(0)])

    def merge(self, other: Tally) -> None:
        """Add the tally of another optimizer step."""
        sums = len(_SUMS)
        self._row[:sums] += other._row[:sums]
        self._row[sums:] = torch.maximum(self._row[sums:], other._row[sums:])

    @property
    def loss(self) -> float:
        """The step's loss, once reduced."""
        return float(self._row[self._at["sum/loss"]])

    def means(self, loss: str, steps: int, *, reference: bool) -> dict[str, float]:
        """What is reported, once reduced.

        Args:
            loss: "policy" or "supervised".
            steps: optimizer steps merged here.
            reference: whether there was one.

        Returns:
            `loss`, `tokens`, `tokens_unshared`, `masked_tokens`; for a policy step also, as means over the
            masked tokens, `ratio_mean`, `clip_fraction_low` and `_high`, `entropy` (nats per token),
            `kl_mismatch` and `kl_mismatch_k3` (nats per token, sampler against trainer), the extremes
            `ratio_max` and `ratio_min`, and where they apply `kl_reference`, `correction_mean`,
            `correction_cut` (the share of tokens cut or dropped) and `effective_sample_share` (Kish's:
            squared sum of the weights over n times the sum of their squares).
        """
        values = dict(zip(self._KEYS, self._row.tolist(), strict=True))
        tokens = max(1.0, values["sum/tokens"])
        metrics = {
            "loss": values["sum/loss"] / steps,
            "tokens": values["sum/computed"],
            "tokens_unshared": values["sum/unshared"],
            "masked_tokens": values["sum/tokens"],
        }
        if loss == "supervised":
            return metrics
        names = {
            "ratio": "ratio_mean", "clipped_low": "clip_fraction_low", "clipped_high": "clip_fraction_high",
            "entropy": "entropy", "mismatch_k1": "kl_mismatch", "mismatch_k3": "kl_mismatch_k3",
        }  # fmt: skip
        metrics |= {theirs: values[f"sum/{ours}"] / tokens for ours, theirs in names.items()}
        metrics["ratio_max"] = values["max/ratio"]
        if values["max/inverse_ratio"]:
            metrics["ratio_min"] = 1 / values["max/inverse_ratio"]
        if reference:
            metrics["kl_reference"] = values["sum/kl_reference"] / tokens
        if values["sum/correction"]:
            metrics["correction_mean"] = values["sum/correction"] / tokens
            metrics["correction_cut"] = values["sum/corrected"] / tokens
            metrics["effective_sample_share"] = values["sum/correction"] ** 2 / (
                tokens * values["sum/correction_squared"]
            )
        return metrics


class PeakMemory:
    """The most memory that was taken since the last `reset`: of the device, or on a CPU of the process."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def reset(self) -> None:
        """Begin anew. Where the system does not allow it, the peak is that of the process's whole life."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: see proc(5)

    def bytes(self) -> float:
        """Bytes at the peak; NaN where the system does not tell."""
        if self._cuda:
            return float(torch.cuda.max_memory_allocated())
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return float("nan")
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")] or ["VmHWM: nan kB"]
        return float(line.split()[1]) * 1024
