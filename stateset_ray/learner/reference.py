"""The frozen policy that a KL is measured to, on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stateset_ray.config import Config
from stateset_ray.errors import CheckpointError
from stateset_ray.grpo.loss import token_logprobs
from stateset_ray.learner.batch import PackedBatch
from stateset_ray.learner.engine import LearnerEngine
from stateset_ray.learner.policy_model import after_the_head
from stateset_ray.models import Hardware, TreeRows, load_model, state_tensors

__all__ = ["Reference"]

_FILE = "reference.safetensors"


class Reference:
    """The policy as it was when GRPO began, or the model that `grpo.reference` names.

    With adapters it is the model under them: no second model is held. Otherwise a whole frozen copy lies on
    every rank.

    Args:
        config: of the run.
        engine: of the policy.
        hardware: of the rank.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def __init__(self, config: Config, engine: LearnerEngine, hardware: Hardware) -> None:
        self._engine = engine
        self._hardware = hardware
        self._named = bool(config.grpo.reference)
        self._moved = False
        self._model: Any = None
        if self._named or config.learner.lora.rank == 0:
            self._model = load_model(config.grpo.reference or config.model.name, hardware)
            self._model.requires_grad_(False)
            self._between = after_the_head(self._model)
            self._chunk = config.learner.logit_chunk

    @torch.no_grad()
    def logprobs(self, packed: PackedBatch, temperature: float) -> torch.Tensor:
        """Log-probabilities [M] of the masked tokens; call it on all ranks, padding included."""
        if self._model is None:
            with self._engine.reference_mode():
                return self._engine.score(packed, temperature).logprobs
        device = self._hardware.device
        targets_M = torch.from_numpy(packed.target_ids).to(device)
        indices_M = torch.from_numpy(packed.logit_indices).to(device)
        output = self._model.base_model(
            input_ids=torch.from_numpy(packed.input_ids).to(device),
            position_ids=torch.from_numpy(packed.position_ids).to(device),
            rows=TreeRows(packed.segments, device),
            use_cache=False,
        )
        hidden_MH, head = output.last_hidden_state[0, indices_M], self._model.get_output_embeddings()
        parts = zip(hidden_MH.split(self._chunk), targets_M.split(self._chunk), strict=True)
        return torch.cat(
            [token_logprobs(self._between(head(hidden)), ids, temperature) for hidden, ids in parts]
        )

    def refresh(self) -> None:
        """Take over the policy's weights, unless the reference is another model or lies under adapters."""
        if self._model is not None and not self._named:
            self._engine.copy_into(self._model)
            self._moved = True

    def save(self, folder: str | Path) -> None:
        """Write the weights, if they are no longer those of a model with a name.

        Raises:
            CheckpointError: they cannot be written.
        """
        if not self._moved:
            return
        try:
            save_file(
                {n: t.contiguous() for n, t in state_tensors(self._model).items()}, Path(folder) / _FILE
            )
        except OSError as error:
            raise CheckpointError(f"the reference cannot be written: {error}", given=str(folder)) from error

    def load(self, folder: str | Path) -> None:
        """Take what `save` wrote; without such a file the reference stays what it is.

        Raises:
            CheckpointError: the file cannot be read.
        """
        path = Path(folder) / _FILE
        if self._model is None or self._named or not path.is_file():
            return
        try:
            self._model.load_state_dict(load_file(path), strict=False)
        except Exception as error:  # safetensors raises its own kinds
            raise CheckpointError(f"the reference cannot be read: {error}", given=str(path)) from error
        self._moved = True
