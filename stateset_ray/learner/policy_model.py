"""The policy as one module: tokens in, a log-probability and an entropy per sampled token out.

The logits of all sampled tokens at once are often the largest tensor of a step (a vocabulary of 150,000
in float32 is 0.6 MB a token). Here they exist in chunks of rows only: forward, each chunk becomes two
numbers a row; backward, it is computed again.

Letters: N tokens of a packed batch; M sampled ones; H hidden size; V vocabulary; C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stateset_ray.config import LearnerConfig
from stateset_ray.errors import ModelError
from stateset_ray.grpo.loss import token_logprobs
from stateset_ray.learner.adapters import Adapters
from stateset_ray.learner.batch import PackedBatch
from stateset_ray.learner.flex_rows import FlexRows
from stateset_ray.learner.trainable import freeze
from stateset_ray.models import Rows, TreeRows, state_tensors

__all__ = ["Gather", "PolicyModel", "TokenScores", "after_the_head", "buckets"]

_ENTROPY_ROWS = 16
"""Rows of logits whose probabilities exist at one time where the entropy needs no gradient."""

_BUCKET_BYTES = 1 << 30
"""How much of a divided model is whole at one time while its weights are read."""

Gather = Callable[[list[nn.Parameter], bool], AbstractContextManager[Any]]
"""Makes divided parameters whole inside a context; True: what is changed there shall last."""


class PolicyModel(nn.Module):
    """A Hugging Face causal language model that says what it thinks of given tokens, and no more.

    Its two children together hold every parameter once. Names of weights are those of the Hugging Face
    model, whatever they are called in here.

    Args:
        model: from `models.load_model`; it belongs to this module from now on.
        config: the `[learner]` section: chunks, adapters, frozen parameters, checkpointing.

    Raises:
        ConfigError: what shall be frozen or adapted is not there.
        ModelError: between its last layer and its logits, this model does something unknown here.
    """

    def __init__(self, model: Any, config: LearnerConfig) -> None:
        super().__init__()
        between = after_the_head(model)
        self._device = str(model.device)
        self._rows = FlexRows if config.attention == "flex" else TreeRows
        # Named before anything divides or wraps them: under ZeRO 3, tied ones can no longer be told apart.
        every = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        self._weights = {name: every[name] for name in state_tensors(model)}
        self._sizes = {name: tensor.nbytes for name, tensor in self._weights.items()}
        self.adapters = Adapters(model, config.lora) if config.lora.rank else None
        if config.freeze:
            freeze(model, config.freeze)
        self._whole = (model,)  # in a tuple, so that its parameters are not registered a second time
        self.backbone = model.base_model
        self.head = TokenScores(model.get_output_embeddings(), between, config.logit_chunk)
        _check_complete(self, model)
        _prepare_for_training(model, config.gradient_checkpointing)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self._whole[0].config.get_text_config().hidden_size)

    @property
    def tied(self) -> bool:
        """Whether the output layer shares its weight with the backbone."""
        within = {id(p) for p in self.backbone.parameters()}
        return any(id(p) in within for p in self.head.parameters())

    def describe(self) -> dict[str, list[Any]]:
        """Name -> [shape, trained] of every parameter, adapters included, before anything divided them."""
        return {
            name: [list(getattr(p, "ds_shape", p.shape)), p.requires_grad]
            for name, p in self._whole[0].named_parameters()
        }

    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter by its name in the Hugging Face model, adapters included, tied ones once."""
        return dict(self._whole[0].named_parameters())

    def nbytes(self, parameter: nn.Parameter) -> int:
        """Size of a whole parameter, divided or not."""
        return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.dtype.itemsize

    def trained(self) -> list[nn.Parameter]:
        """The parameters that an optimizer is for."""
        return [p for p in self.parameters() if p.requires_grad]

    def score(
        self, run: Callable[..., Any], packed: PackedBatch, temperature: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of a packed batch, computed by `run`: this or its wrapper."""
        device = self._device
        scores: tuple[torch.Tensor, torch.Tensor] = run(
            torch.from_numpy(packed.input_ids).to(device),
            torch.from_numpy(packed.position_ids).to(device),
            self._rows(packed.segments, device),
            torch.from_numpy(packed.logit_indices).to(device),
            torch.from_numpy(packed.target_ids).to(device),
            temperature,
            entropy_gradient,
        )
        return scores

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        rows: Rows,
        logit_indices_M: torch.Tensor,
        target_ids_M: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies, float32 [M] each; see `learner.engine.Scores`."""
        output = self.backbone(input_ids=input_ids, position_ids=position_ids, rows=rows, use_cache=False)
        hidden_MH = output.last_hidden_state[0, logit_indices_M]
        scores: tuple[torch.Tensor, torch.Tensor] = self.head(
            hidden_MH, target_ids_M, temperature, entropy_gradient
        )
        return scores

    @torch.no_grad()
    def weights(self, gather: Gather) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is saved, adapters merged, tied ones once.

        Call it on all ranks and take every item: parameters are gathered in buckets, so that no device ever
        holds the whole of a divided model. A tensor is valid until the next one is asked for.

        Args:
            gather: makes divided parameters whole inside a context.
        """
        for bucket in buckets(self._sizes):
            parameters = [w for name in bucket if isinstance(w := self._weights[name], nn.Parameter)]
            if self.adapters is not None:
                parameters += [p for name in bucket for p in self.adapters.of(name)]
            with gather(parameters, False):
                for name in bucket:
                    weight = self._weights[name]
                    yield name, weight if self.adapters is None else self.adapters.merged(name, weight)

    @torch.no_grad()
    def copy_into(self, model: Any, gather: Gather) -> None:
        """Copy `weights` into another model of the same architecture."""
        targets = state_tensors(model)
        for name, tensor in self.weights(gather):
            targets[name].copy_(tensor)


def buckets(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of tensors, in order, as many at a time as fit in a bucket; one that is larger goes alone.

    Example:
        >>> list(buckets({"a": 1 << 29, "b": 1 << 29, "c": 1}))
        [['a', 'b'], ['c']]
    """
    bucket: list[str] = []
    size = 0
    for name, nbytes in sizes.items():
        if bucket and size + nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += nbytes
    if bucket:
        yield bucket


class TokenScores(nn.Module):
    """The output layer, a chunk of rows at a time.

    One module for all chunks, so that an engine that divides weights gathers them once a pass (ZeRO 3, which
    treats it as a leaf), however many chunks there are.

    Args:
        lm_head: hidden states to logits.
        between: what the model does to its logits afterwards.
        chunk: rows, C.
    """

    def __init__(
        self, lm_head: nn.Module, between: Callable[[torch.Tensor], torch.Tensor], chunk: int
    ) -> None:
        super().__init__()
        self.lm_head = lm_head
        self._between = between
        self._chunk = chunk

    def forward(
        self, hidden_MH: torch.Tensor, ids_M: torch.Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies, float32 [M] each."""
        chunks = list(zip(hidden_MH.split(self._chunk), ids_M.split(self._chunk), strict=True))
        # A single chunk may stay: computing it again would save nothing.
        again = len(chunks) > 1 and torch.is_grad_enabled()
        pieces = [
            checkpoint(
                self._scores, hidden_CH, ids_C, temperature, entropy_gradient,
                use_reentrant=False, preserve_rng_state=False,
            )
            if again
            else self._scores(hidden_CH, ids_C, temperature, entropy_gradient)
            for hidden_CH, ids_C in chunks
        ]  # fmt: skip
        return torch.cat([l for l, _ in pieces]), torch.cat([h for _, h in pieces])  # noqa: E741

    def _scores(
        self, hidden_CH: torch.Tensor, ids_C: torch.Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_CV = self._between(self.lm_head(hidden_CH))
        # What has a gradient comes first: a chunk is computed again only up to the last tensor that it saves.
        logprobs_C = token_logprobs(logits_CV, ids_C, temperature)
        if entropy_gradient and torch.is_grad_enabled():
            entropies_C = _entropies(logits_CV, temperature)
        else:
            with torch.no_grad():
                entropies_C = torch.cat(
                    [_entropies(rows, temperature) for rows in logits_CV.split(_ENTROPY_ROWS)]
                )
        return logprobs_C, entropies_C


def _entropies(logits_CV: torch.Tensor, temperature: float) -> torch.Tensor:
    logprobs_CV = torch.log_softmax(logits_CV.float() / temperature, dim=-1)
    return -(logprobs_CV.exp() * logprobs_CV).sum(-1)


def after_the_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What this model does to the output layer's logits, checked against its own forward pass.

    Gemma caps them, Granite and Cohere scale them. A model that does something else is refused: its
    log-probabilities would be those of another policy than the one that samples.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(model, "logit_scale", None)

    def between(logits: torch.Tensor) -> torch.Tensor:
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        return logits

    parameter = next(model.parameters())
    ids = torch.tensor([[1, 2]], device=parameter.device)
    given = {
        "input_ids": ids,
        "position_ids": torch.arange(2, device=parameter.device)[None],
        "rows": TreeRows(((2, -1),), str(parameter.device)),
        "use_cache": False,
    }
    with torch.no_grad():
        whole = model(**given).logits.float()
        ours = between(model.get_output_embeddings()(model.base_model(**given).last_hidden_state)).float()
    if ours.shape != whole.shape or not torch.allclose(ours, whole, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ModelError(
            "between its output layer and its logits, this model does something that is not known here",
            given=type(model).__name__,
            mend="choose a Llama, Qwen, Mistral, SmolLM, Gemma, Granite or Cohere style model",
        )
    return between


def _check_complete(policy: PolicyModel, model: Any) -> None:
    ours = {id(p) for p in policy.parameters()}
    lost = [name for name, p in model.named_parameters() if id(p) not in ours]
    if lost:
        raise ModelError(
            f"this model has parameters outside its backbone and its output layer: {', '.join(lost[:3])}",
            given=type(model).__name__,
            mend="choose a model of one decoder and one output layer",
        )


def _prepare_for_training(model: Any, checkpointing: bool) -> None:
    model.train()  # transformers checkpoints in training mode only
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # the policy that is trained must be the one that sampled
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
