"""One rank of the learner, without Ray: samples in, one optimizer step, weights out.

All ranks call the same methods in the same order; each method says what every rank must agree on. A rank
that raises leaves the others waiting in a collective: whoever owns the ranks ends them all, builds new
ones and loads the last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from stateset_ray.config import Config
from stateset_ray.errors import CheckpointError, LearnerError
from stateset_ray.grpo.divergence import kl_estimate, kl_returns
from stateset_ray.grpo.loss import LossTerms, Tokens, policy_loss, supervised_loss
from stateset_ray.learner.batch import MiniBatch, PackedBatch, pack
from stateset_ray.learner.engine import Scores, build_engine
from stateset_ray.learner.random_states import random_states, seed_all, set_random_states
from stateset_ray.learner.reference import Reference
from stateset_ray.learner.schedule import LossKind, learning_rate
from stateset_ray.learner.tally import PeakMemory, Tally
from stateset_ray.models import Hardware, load_model, load_tokenizer
from stateset_ray.policies.weights import decode
from stateset_ray.types import derive_seed

__all__ = ["Learner", "LossKind", "learning_rate"]

_ENGINE_TAG = "engine"


class Learner:
    """One rank: model, optimizer, and a frozen reference where `grpo.kl_coef` asks for one.

    The supervised warm start and GRPO are the same code with another loss per token, and share one
    optimizer: its moments carry over from one phase to the next, the learning rate is set at each step.

    Args:
        config: the whole configuration.
        rank: of `world` ranks, which all get the same configuration.
        master: host and port of rank 0; port 0 picks a free one where `world` is 1.
        hardware: where this rank computes.
        model_folder: weights to start from, instead of `model.name`.

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
        seed_all(derive_seed(config.run.seed, "learner", rank))
        model = load_model(model_folder or config.model.name, hardware)
        self._hf_config, self._generation_config = model.config, model.generation_config
        self._model_class = type(model)
        self._engine = build_engine(model, config.learner, hardware, rank, world, master)
        self._reference = Reference(config, self._engine, hardware) if config.grpo.kl_coef > 0 else None
        self._memory = PeakMemory(hardware.device)

    def update(
        self,
        minibatches: Sequence[MiniBatch],
        step: int,
        loss: LossKind = "policy",
        kl_coef: float | None = None,
    ) -> dict[str, float]:
        """One optimizer step for each minibatch, over the micro-batches of all ranks.

        Args:
            minibatches: this rank's part of each; on every rank as many, with as many micro-batches each.
            step: number of the step within its phase; decides the learning rate.
            loss: "policy" learns from advantages at the sampling temperature (the distribution that was
                drawn from), "supervised" from the masked tokens as they are, at temperature 1.
            kl_coef: weight of the KL to the reference, instead of `grpo.kl_coef`, where it is steered.

        Returns:
            Equal on all ranks but for `seconds`: `loss` and `grad_norm` (before clipping), means over the
            optimizer steps; `learning_rate`, `applied` (optimizer steps), `tokens` (computed forward and
            backward), `tokens_unshared` (had no prefix been shared) and `masked_tokens` over all ranks,
            `seconds` of this rank, `peak_memory_bytes` of the largest rank during this update (device
            memory; on a CPU, of the process). With "policy" also means over the masked tokens: the
            diagnostics of `grpo.loss`, named in `Tally.means`.

        Raises:
            LearnerError: there is nothing to learn from; the loss or a gradient is not finite (on all
                ranks alike, and no weight has changed since the last optimizer step); or a sample is
                malformed.
        """
        started = time.perf_counter()
        if not minibatches or any(m.denominator <= 0 or not m.micro_batches for m in minibatches):
            raise LearnerError(
                "there is nothing to learn from",
                given=[(len(m.micro_batches), m.denominator) for m in minibatches],
                mend="skip the update when no sample has an advantage",
            )
        self._memory.reset()
        packed = [
            [pack(samples, groups) for samples, groups in zip(m.micro_batches, m.groups, strict=True)]
            for m in minibatches
        ]
        proximal = self._proximal_logprobs(packed, loss)
        rate = learning_rate(self._config, step, loss)
        total = Tally(self._hardware.device)
        norms = []
        for m, batches, before in zip(minibatches, packed, proximal, strict=True):
            tally = Tally(self._hardware.device)
            advantages, reference = self._rewarded(batches, loss, kl_coef)
            for index, batch in enumerate(batches):
                terms = self._terms(
                    batch, m.denominator, loss, advantages[index], before[index], reference[index], kl_coef
                )
                self._engine.backward(terms.loss)
                tally.add(terms, batch)
            tally.reduce(self._engine)
            norms.append(self._step(tally, rate, step))
            total.merge(tally)
        self._refresh_reference_after(step, loss)
        peak = torch.zeros(self.world, dtype=torch.float64, device=self._hardware.device)
        peak[self.rank] = self._memory.bytes()
        if self._config.rollout.sleep:
            self._hardware.give_back()  # the engines need it now
        return {
            **total.means(loss, len(norms), reference=self._reference is not None),
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": rate,
            "applied": float(len(norms)),
            "peak_memory_bytes": float(self._engine.all_reduce(peak).max()),
            "seconds": time.perf_counter() - started,
        }

    def _step(self, tally: Tally, rate: float, step: int) -> float:
        """Apply what was accumulated; returns the gradient's norm."""
        if not math.isfinite(tally.loss):
            raise LearnerError(
                f"the loss of step {step} is not finite; this optimizer step has changed no weight",
                given=tally.loss,
                mend="look at kl_mismatch and grad_norm of the steps before; lower learner.learning_rate",
            )
        result = self._engine.step(rate)
        if not result.applied:
            raise LearnerError(
                f"a gradient of step {step} is not finite; this optimizer step has changed no weight",
                given=result.grad_norm,
                mend="lower learner.learning_rate, or set model.dtype='float32'",
            )
        return result.grad_norm

    def _terms(
        self,
        batch: PackedBatch,
        denominator: float,
        loss: LossKind,
        advantages: torch.Tensor,
        proximal: torch.Tensor | None,
        reference: torch.Tensor | None,
        kl_coef: float | None,
    ) -> LossTerms:
        objective = self._config.grpo
        scores = self._score(batch, loss, entropy_gradient=loss == "policy" and objective.entropy_coef > 0)
        if batch.padding:
            # It must depend on the parameters, or ZeRO's collectives would wait for this rank.
            return LossTerms(scores.logprobs.sum() * 0.0, {}, {})
        weights = self._tensor(batch.weights)
        if loss == "supervised":
            return supervised_loss(scores.logprobs, weights, denominator=denominator)
        tokens = Tokens(
            scores.logprobs, self._tensor(batch.sampler_logprobs), advantages, weights,
            self._tensor(batch.rows), batch.samples, proximal, reference, scores.entropies,
        )  # fmt: skip
        return policy_loss(tokens, objective, denominator=denominator, kl_coef=kl_coef)

    def _score(self, batch: PackedBatch, loss: LossKind, *, entropy_gradient: bool = False) -> Scores:
        temperature = self._config.rollout.temperature if loss == "policy" else 1.0
        return self._engine.score(batch, temperature, entropy_gradient=entropy_gradient)

    @torch.no_grad()
    def _proximal_logprobs(
        self, packed: Sequence[Sequence[PackedBatch]], loss: LossKind
    ) -> list[list[torch.Tensor | None]]:
        """What the policy says before the first optimizer step moves it; None where no step comes before.

        Every rank scores its padding too: under ZeRO 3 a forward pass is collective.
        """
        wanted = loss == "policy" and self._config.grpo.trust == "proximal"
        return [
            [self._score(batch, loss).logprobs if wanted and index else None for batch in batches]
            for index, batches in enumerate(packed)
        ]

    @torch.no_grad()
    def _rewarded(
        self, batches: Sequence[PackedBatch], loss: LossKind, kl_coef: float | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """The advantages of each batch, the KL in the reward taken off, and the reference's log-probs.

        The KL of a token's return is centred over the whole minibatch, so that it moves no mean.
        """
        objective, temperature = self._config.grpo, self._config.rollout.temperature
        advantages = [self._tensor(batch.advantages) for batch in batches]
        if self._reference is None or loss == "supervised":
            return advantages, [None] * len(batches)
        reference: list[torch.Tensor | None] = []
        returns = []
        for batch in batches:
            reference_M = self._reference.logprobs(batch, temperature)
            sampler_M = self._tensor(batch.sampler_logprobs)
            estimates_M = kl_estimate(sampler_M, reference_M, objective.kl_estimator)
            reference.append(reference_M)
            returns.append(kl_returns(estimates_M, self._tensor(batch.rows), batch.samples))
        if objective.kl_in == "reward":
            real = [r.double() for r, batch in zip(returns, batches, strict=True) if not batch.padding]
            sums = (
                torch.stack([r.sum() for r in real]).sum() if real else torch.zeros((), dtype=torch.float64)
            )
            mean = torch.stack(
                [sums.cpu(), torch.tensor(float(sum(len(r) for r in real)), dtype=torch.float64)]
            )
            total, count = self._engine.all_reduce(mean.to(self._hardware.device)).tolist()
            coef = objective.kl_coef if kl_coef is None else kl_coef
            advantages = [
                a - coef * (r - total / max(1.0, count)) for a, r in zip(advantages, returns, strict=True)
            ]
        return advantages, reference

    def refresh_reference(self) -> None:
        """Make the policy as it is now the reference. Call it on all ranks; nothing without a reference."""
        if self._reference is not None:
            self._reference.refresh()

    def _refresh_reference_after(self, step: int, loss: LossKind) -> None:
        every = self._config.grpo.reference_every
        if loss == "policy" and every and (step + 1) % every == 0:
            self.refresh_reference()

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._hardware.device)

    def export_weights(self, *, copy: bool = True) -> dict[str, npt.NDArray[Any]]:
        """The weights by name on rank 0, {} elsewhere; call it on all ranks. See `LearnerEngine.export`."""
        return self._engine.export(copy=copy)

    def save_model(self, folder: str | Path) -> None:
        """Write the model in the Hugging Face layout into `folder`: weights, configuration, tokenizer.

        Call it on all ranks; rank 0 writes. `AutoModelForCausalLM.from_pretrained(folder)` loads it.

        Raises:
            CheckpointError: it cannot be written.
        """
        weights = self.export_weights(copy=False)
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
        if self._reference is not None and self.rank == 0:
            self._reference.save(folder)
        try:
            torch.save(random_states(), Path(folder) / f"random-{self.rank}.pt")
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the random states cannot be written: {error}", given=str(folder)
            ) from error

    def check_state(self, folder: str | Path) -> None:
        """Compare with what this learner can load; on any rank, at any time, and nothing changes.

        Raises:
            CheckpointError: the state is missing, or of another layout.
        """
        self._engine.layout.check(Path(folder) / _ENGINE_TAG)

    def load_state(self, folder: str | Path) -> None:
        """Continue exactly where `save_state` was called; only as the first call on a new learner.

        Call it on all ranks. The engine, its ZeRO stage and the dtype must be the same. The number of ranks
        may differ: then the state is divided anew (see the engine), and ranks that did not exist keep the
        random states that they began with.

        Raises:
            CheckpointError: the state is missing, incomplete, or of another layout.
        """
        self._engine.load(folder, _ENGINE_TAG)
        if self._reference is not None:
            self._reference.load(folder)
        path = Path(folder) / f"random-{self.rank}.pt"
        if self.rank and not path.is_file():
            return
        try:
            states = torch.load(path, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(f"the random states cannot be read: {error}", given=str(path)) from error
        set_random_states(states)

    def in_force(self) -> dict[str, Any]:
        """What this rank learns with, by the names of the configuration, read where it acts.

        In plain JSON types. `learner.learning_rate` is that of the last step, as the schedule made it.
        """
        acting = self._engine.hyperparameters()
        objective = self._config.grpo.model_dump(mode="json")
        return {
            "learner.learning_rate": float(acting["lr"]),
            "learner.betas": [float(beta) for beta in acting["betas"]],
            "learner.weight_decay": float(acting["weight_decay"]),
            "learner.max_grad_norm": float(acting["max_grad_norm"]),
            "rollout.temperature": self._config.rollout.temperature,
            **{f"grpo.{name}": value for name, value in objective.items()},
        }

    def close(self) -> None:
        """Free the model and leave the process group."""
        self._engine.destroy()
        self._reference = None
