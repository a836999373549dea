"""An inference engine on plain transformers: many conversations, one process, CPU or GPU.

Every forward pass takes whatever is ready: one token for each conversation that is decoding, and the new
tokens of each that begins a turn, end to end in one ragged row. History is never prefilled twice, because
each conversation keeps its KV cache across its turns; what several conversations share (a system prompt,
the opening of a group) is computed once and copied.

The forward pass runs in the event loop's own thread, on purpose: then the composition of every batch
follows from the seeds alone, and the same run gives the same bits. Environments that block run in threads
of their own and overlap with it.

Who waits for whom: `reply` waits for the loop to finish its turn; the loop waits for requests; `load_weights`
waits for running turns to end and holds back new ones meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stateset_ray.errors import InfrastructureFault, ModelError
from stateset_ray.models import Hardware
from stateset_ray.policies.base import EngineStats, Reply, ReplyRequest, check_fits
from stateset_ray.policies.inference_weights import InferenceWeights
from stateset_ray.policies.kv_cache import CachedRows, Ids, KVCache, Slot, common_prefix
from stateset_ray.policies.nucleus import Sampled, likeliest, nucleus

__all__ = ["TransformersEngine"]

_PREFILL_BUDGET = 2048  # new prompt tokens per forward pass
_WORTH_SHARING = 16  # tokens of common prefix that justify waiting one pass to copy them
_BELOW_ONE = 1 - 2**-24  # the largest float32 below 1: rounding must not reach past the last token
_SETTLE = 4  # passes of the event loop in which conversations may come in before a batch is closed


@dataclass(eq=False)
class _Turn:
    """A reply in the making."""

    request: ReplyRequest
    prompt: Ids
    future: asyncio.Future[Reply]
    uniforms: np.ndarray[Any, np.dtype[np.float64]]
    on_token: Callable[[Sampled], None] | None = None
    top_p: float = 1.0
    top: int = 0
    slot: Slot | None = None
    pending: Ids = field(default_factory=lambda: np.zeros(0, np.int32))
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """Serves many conversations with one model; implements `Engine`.

    Args:
        model: from `stateset_ray.models.load_model`. The engine takes it over and changes it
            (`inference_weights`): nobody else may use it.
        stop_ids: tokens that end a reply.
        slots: conversations whose cache is kept at once.
        max_context: tokens per conversation.
        hardware: where the model sits.

    Attributes:
        vocabulary: ids that a prompt may hold are below it.
    """

    def __init__(
        self, model: Any, stop_ids: Collection[int], *, slots: int, max_context: int,
        hardware: Hardware,
    ) -> None:  # fmt: skip
        config = model.config
        heads = config.num_attention_heads
        self._model = model
        self._weights = InferenceWeights(model, hardware)
        self._stop_ids = frozenset(stop_ids)
        self._hardware = hardware
        self._max_context = max_context
        self._cache = KVCache(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            slots=slots, context=max_context, device=hardware.device, dtype=hardware.dtype,
        )  # fmt: skip
        self._waiting: list[_Turn] = []
        self._running: list[_Turn] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._open = asyncio.Event()
        self._idle.set()
        self._open.set()
        self._task: asyncio.Task[None] | None = None
        self.vocabulary = int(config.vocab_size)
        self.version = 0
        self.dead = False  # it lives and dies with its process
        self._asleep = False
        self.stats = EngineStats()

    async def reply(
        self, request: ReplyRequest, on_token: Callable[[Sampled], None] | None = None, *,
        top_p: float = 1.0, top: int = 0,
    ) -> Reply:  # fmt: skip
        """Sample one reply; see `Policy.reply`.

        A caller that is cancelled frees its slot before the next forward pass.

        Args:
            on_token: told each token as it is sampled. It is called between two forward passes, in the event
                loop's thread, and must neither wait nor raise.
            top_p: for serving only, see `nucleus`.
            top: how many of the likeliest tokens `on_token` is told as well.
        """
        check_fits(request, self._max_context)
        await self._open.wait()
        turn = _Turn(
            request,
            np.asarray(request.prompt_ids, np.int32),
            asyncio.get_running_loop().create_future(),
            np.random.default_rng(request.seed).random(request.max_tokens),
            on_token, top_p, top,
        )  # fmt: skip
        self._waiting.append(turn)
        self._idle.clear()
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve(), name="engine")
        return await turn.future

    def release(self, conversation: str) -> None:
        """Forget a conversation; see `Policy.release`."""
        self._cache.release(conversation)

    def forget(self) -> None:
        """See `Engine.forget`; does nothing while a turn is under way, which needs what is cached."""
        if not self._running and not self._waiting:
            self._cache.clear()

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.load_weights`."""
        if wrong := self._weights.mismatch(tensors):
            raise ModelError("the weights do not belong to this model", given=wrong[:5])
        self._open.clear()
        try:
            await self._idle.wait()
            self._weights.load(tensors)
            self._cache.clear()
            self._cache.restore()
            self.version, self._asleep = version, False
        finally:
            if not self._asleep:
                self._open.set()

    async def sleep(self) -> None:
        """See `Engine.sleep`."""
        if self._asleep:
            return
        self._open.clear()
        try:
            await self._idle.wait()
            self._weights.drop()
            self._cache.drop()
            self._hardware.give_back()
            self._asleep = True
            self.stats.sleeps += 1
        finally:
            if not self._asleep:
                self._open.set()

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail(InfrastructureFault("the engine was closed"))

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            for _ in range(_SETTLE):
                await asyncio.sleep(0)
            self._drop_abandoned()
            self._admit()
            if not self._running:
                if not self._waiting:
                    self._wake.clear()
                    self._idle.set()
                continue
            try:
                self._forward()
            except Exception as error:  # a broken pass fails its conversations, not the engine
                self._fail(InfrastructureFault(f"the engine failed: {type(error).__name__}: {error}"))

    def _drop_abandoned(self) -> None:
        """Forget turns whose caller timed out or was cancelled."""
        for turn in [t for t in self._running if t.future.done()]:
            self._running.remove(turn)
            if turn.slot is not None:
                turn.slot.busy = False
        self._waiting = [t for t in self._waiting if not t.future.done()]

    def _admit(self) -> None:
        """Give waiting turns a slot, first come first served, within the prefill budget."""
        budget = _PREFILL_BUDGET - sum(len(t.pending) for t in self._running)
        computing = [t.prompt for t in self._running if len(t.pending)]
        deferred: list[_Turn] = []
        for place, turn in enumerate(self._waiting):
            if budget <= 0 or self._cache.full:  # however many wait, they cost a pass nothing
                deferred += self._waiting[place:]
                break
            known = self._cache.known(turn.request.conversation, turn.prompt)
            soon = max((common_prefix(p, turn.prompt) for p in computing), default=0)
            # Another turn of this very pass computes what this one could copy in the next.
            slot = None
            if soon < known + _WORTH_SHARING:
                slot = self._cache.acquire(turn.request.conversation, turn.prompt)
            if slot is None:
                deferred.append(turn)
                continue
            turn.slot, turn.pending = slot, turn.prompt[slot.length :]
            budget -= len(turn.pending)
            computing.append(turn.prompt)
            self._running.append(turn)
            self.stats.prompt_tokens += len(turn.prompt)
        self._waiting = deferred

    @torch.inference_mode()
    def _forward(self) -> None:
        """One pass: a token for each decoding turn, a chunk of prompt for each that begins."""
        started = time.perf_counter()
        decoding = [t for t in self._running if not len(t.pending)]
        prefilling: list[tuple[_Turn, Ids]] = []
        budget = _PREFILL_BUDGET
        for turn in self._running:
            if len(turn.pending) and budget > 0:
                prefilling.append((turn, turn.pending[:budget]))
                budget -= len(prefilling[-1][1])
        ids = [np.asarray([t.token_ids[-1]], np.int32) for t in decoding] + [c for _, c in prefilling]
        turns = decoding + [t for t, _ in prefilling]
        slots = [_slot(t) for t in turns]
        rows = CachedRows(
            self._cache, slots[: len(decoding)],
            [(_slot(t), len(chunk)) for t, chunk in prefilling],
        )  # fmt: skip
        positions = [np.arange(s.length, s.length + len(c)) for s, c in zip(slots, ids, strict=True)]
        ends = np.cumsum([len(c) for c in ids]) - 1
        ready = [i for i, t in enumerate(turns) if i < len(decoding) or len(t.pending) == len(ids[i])]
        device = self._hardware.device
        logits = self._model(
            input_ids=torch.as_tensor(np.concatenate(ids), dtype=torch.long, device=device)[None],
            position_ids=torch.as_tensor(np.concatenate(positions), device=device)[None],
            rows=rows, use_cache=False,
            logits_to_keep=torch.as_tensor(ends[ready], device=device),
        ).logits[0]  # fmt: skip
        for turn, slot, chunk in zip(turns, slots, ids, strict=True):
            self._cache.extend(slot, chunk)
            turn.pending = turn.pending[len(chunk) :]
        self._sample([turns[i] for i in ready], logits)
        self.stats.forwards += 1
        self.stats.prefill_tokens += sum(len(c) for _, c in prefilling)
        self.stats.decode_tokens += len(ready)
        self.stats.seconds += time.perf_counter() - started

    def _sample(self, turns: list[_Turn], logits: torch.Tensor) -> None:
        """Draw one token per turn and finish the turns that end with it.

        Sampling inverts the cumulative distribution with one uniform number per token, drawn from the
        request's own seed, so it does not depend on what else is in the batch.
        """
        if not turns:
            return
        # The vocabulary is long: a pass over all logits that changes none of them is left out.
        temperatures = [t.request.temperature for t in turns]
        scaled, greedy = logits.float(), None
        if any(heat != 1 for heat in temperatures):
            heats = scaled.new_tensor(temperatures)[:, None]
            greedy = heats == 0
            scaled = scaled / torch.where(greedy, 1.0, heats)
        probabilities = torch.softmax(scaled, dim=-1)
        cut = nucleus(probabilities, [t.top_p for t in turns])
        total = cut.cumsum(dim=-1)
        uniforms = logits.new_tensor(
            [t.uniforms[len(t.token_ids)] for t in turns], dtype=torch.float32
        ).clamp_(max=_BELOW_ONE)
        drawn = torch.searchsorted(total, uniforms[:, None] * total[:, -1:], right=True)
        drawn = drawn.clamp_(max=logits.shape[-1] - 1)
        if greedy is not None:
            drawn = torch.where(greedy, logits.argmax(-1, keepdim=True), drawn)
        chosen = own = probabilities.gather(-1, drawn).log_()
        if cut is not probabilities:
            chosen = own - total[:, -1:].log()
        if greedy is not None:
            chosen = chosen.masked_fill(greedy, 0.0)
        told = own[:, 0].tolist()
        for i, (turn, token, logprob) in enumerate(
            zip(turns, drawn[:, 0].tolist(), chosen[:, 0].tolist(), strict=True)
        ):
            turn.token_ids.append(token)
            turn.logprobs.append(logprob)
            if turn.on_token is not None:
                turn.on_token(Sampled(token, told[i], likeliest(probabilities[i], turn.top)))
            if not np.isfinite(logprob):
                self._finish(turn, error="the model gave no finite probabilities")
            elif token in self._stop_ids or len(turn.token_ids) == turn.request.max_tokens:
                self._finish(turn)

    def _finish(self, turn: _Turn, error: str = "") -> None:
        self._running.remove(turn)
        _slot(turn).busy = False
        if turn.future.done():
            return
        if error:
            turn.future.set_exception(InfrastructureFault(error, mend="check the weights for NaN"))
            return
        stopped = turn.token_ids[-1] in self._stop_ids
        turn.future.set_result(
            Reply(
                tuple(turn.token_ids), tuple(turn.logprobs), self.version,
                "stop" if stopped else "length",
            )
        )  # fmt: skip

    def _fail(self, error: InfrastructureFault) -> None:
        for turn in self._running + self._waiting:
            if not turn.future.done():
                turn.future.set_exception(error)
        self._running, self._waiting = [], []
        self._cache.clear()


def _slot(turn: _Turn) -> Slot:
    assert turn.slot is not None  # admitted turns have one
    return turn.slot
