"""An inference engine on vLLM: the same protocol as the one on transformers, for GPUs above all.

vLLM is not imported before an engine is made. Its model runs in a process of its own, which vLLM starts and
which ends with this one. Token ids go in and token ids come out: it has no tokenizer here. Log-probabilities
are those of the distribution that was sampled from, temperature applied; or, for serving, those of the policy
at temperature 1, whatever a request's is, because a cut distribution (`top_p`) has none that others compare.

What an older version of the weights has cached never answers a newer one: weights are replaced while no turn
runs, vLLM's cache is emptied then, and every prompt's cache key is salted with the version besides.

Who waits for whom: `reply` waits for vLLM, and while weights are replaced for these; `load_weights` waits for
running turns to end and holds back new ones meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from stateset_ray.errors import InfrastructureFault, ModelError
from stateset_ray.models import Hardware, config_only, local_folder, parameter_shapes
from stateset_ray.policies.base import EngineStats, Reply, ReplyRequest, check_fits
from stateset_ray.policies.nucleus import Sampled

__all__ = ["VllmEngine"]

_BLOCK = 32  # tokens of a cache block: what is shared is shared by whole blocks; vLLM's CPU kernels want 32
_LEAST_MASS = 1e-6  # the smallest nucleus that vLLM takes: one token
_SPARE_BLOCKS = 2  # of each conversation: the one that is being written, and vLLM's own
_SHUTDOWN = 10.0  # seconds for vLLM's process to end by itself
_MEMORY_FILES = Path("/dev/shm")


class VllmEngine:
    """Serves many conversations with vLLM; implements `Engine`.

    Args:
        model: name or folder, as in `model.name`; vLLM loads it itself.
        stop_ids: tokens that end a reply.
        slots: conversations whose cache is kept at once; beyond them, the least recently used lose theirs.
        max_context: tokens per conversation.
        hardware: where the model sits.
        serving: whether it answers clients, and nothing is learned from what it says.

    Attributes:
        vocabulary: ids that a prompt may hold are below it.

    Raises:
        ModelError: vLLM is not installed, or cannot serve this model here.
    """

    def __init__(
        self, model: str, stop_ids: Collection[int], *, slots: int, max_context: int, hardware: Hardware,
        serving: bool = False,
    ) -> None:  # fmt: skip
        if importlib.util.find_spec("vllm") is None:
            key = _key(serving)
            raise ModelError(
                f"{key} = 'vllm' needs vLLM, which is not installed where the engine runs",
                mend="pip install 'stateset-ray[vllm]' there; for CPUs: make vllm; "
                f"or set {key} = 'transformers'",
            )
        self._stop_ids = sorted(stop_ids)
        self._max_context = max_context
        self._shapes = parameter_shapes(model)
        self.vocabulary = int(config_only(model).get_text_config().vocab_size)
        self._llm = _start(model, slots, max_context, hardware, serving)
        self._turns = _Turns()
        self._numbers = count()
        self._cleared = 0  # how often what was cached was given up within one version
        self._broken = ""
        self.version = 0
        self.stats = EngineStats()

    async def reply(
        self, request: ReplyRequest, on_token: Callable[[Sampled], None] | None = None, *,
        top_p: float = 1.0, top: int = 0,
    ) -> Reply:  # fmt: skip
        """Sample one reply; see `Policy.reply`. Cancelling it frees what vLLM held for it.

        Args:
            on_token: as in `TransformersEngine.reply`, like `top_p` and `top`.
        """
        check_fits(request, self._max_context)
        async with self._turns.one():
            if self._broken:
                raise InfrastructureFault(self._broken, mend="restart the engine")
            reply = await self._generate(request, on_token, top_p, top)
        self.stats.seconds = self._turns.seconds
        return reply

    def release(self, conversation: str) -> None:
        """See `Policy.release`: nothing to do, vLLM gives up what was not used for longest."""

    def forget(self) -> None:
        """See `Engine.forget`; while turns run, what they have cached stays."""
        if self._turns.idle:
            self._cleared += 1

    @property
    def dead(self) -> bool:
        """See `Engine`: vLLM's own process has ended, or holds half of the weights."""
        return bool(self._broken or self._llm.errored)

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.load_weights`.

        The weights travel through a file in memory where there is one, which every process of vLLM reads.

        Raises:
            ModelError: also where vLLM cannot take them; then this engine answers nothing any more.
        """
        given = {name: tensor.shape for name, tensor in tensors.items()}
        if given != self._shapes:
            differ = sorted({name for name, _ in given.items() ^ self._shapes.items()})
            raise ModelError("the weights do not belong to this model", given=differ[:5])
        async with self._turns.none():
            try:
                await self._reload(tensors)
            except Exception as error:
                self._broken = f"vLLM took new weights only in part: {type(error).__name__}: {error}"
                raise ModelError(self._broken, mend="restart the engine; vLLM's own log says more") from error
            self.version = version

    async def sleep(self) -> None:
        """Not offered.

        Raises:
            InfrastructureFault: always; `rollout.sleep` is refused for this engine.
        """
        raise InfrastructureFault("an engine of vLLM does not sleep", mend="set rollout.sleep = false")

    async def close(self) -> None:
        """See `Engine.close`; ends vLLM's process."""
        self._broken = "the engine was closed"
        # It waits for that process: other engines of this one go on answering meanwhile.
        await asyncio.to_thread(self._llm.shutdown, timeout=_SHUTDOWN)

    async def _generate(
        self, request: ReplyRequest, on_token: Callable[[Sampled], None] | None, top_p: float, top: int
    ) -> Reply:
        from vllm import SamplingParams, TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = TokensPrompt(
            prompt_token_ids=list(request.prompt_ids), cache_salt=f"{self.version}.{self._cleared}"
        )
        # A conversation may be asked for twice at a time: by a caller that died, and by its retry.
        name = f"{request.conversation}#{next(self._numbers)}"
        sampled: list[Sampled] = []
        outputs: list[Any] = []
        try:
            params = SamplingParams(
                max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed,
                top_p=max(top_p, _LEAST_MASS), stop_token_ids=self._stop_ids, ignore_eos=True, logprobs=top,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA if on_token else RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            async for output in self._llm.generate(prompt, params, name):
                outputs = [output]
                for one in _sampled(output.outputs[0], top):
                    sampled.append(one)
                    if on_token is not None:
                        on_token(one)
        except (EngineDeadError, EngineGenerateError, VLLMClientError) as error:
            raise InfrastructureFault(
                f"vLLM failed: {type(error).__name__}: {error.__cause__ or error}",
                mend="its own log says why; the conversation is retried elsewhere",
            ) from error
        if not sampled:
            raise InfrastructureFault("vLLM ended a request without a token")
        return self._reply(request, sampled, outputs[-1])

    def _reply(self, request: ReplyRequest, sampled: Sequence[Sampled], last: Any) -> Reply:
        ids = tuple(one.token for one in sampled)
        # What is greedy is certain.
        logprobs = tuple(one.logprob if request.temperature else 0.0 for one in sampled)
        self.stats.prompt_tokens += len(request.prompt_ids)
        self.stats.prefill_tokens += len(request.prompt_ids) - (last.num_cached_tokens or 0)
        self.stats.decode_tokens += len(ids)
        stopped = last.outputs[0].finish_reason == "stop"
        return Reply(ids, logprobs, self.version, "stop" if stopped else "length")

    async def _reload(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        size = sum(tensor.nbytes for tensor in tensors.values())
        with tempfile.TemporaryDirectory(prefix="stateset-ray-weights-", dir=_roomy(size)) as folder:
            owned = {name: tensor.contiguous() for name, tensor in tensors.items()}
            await asyncio.to_thread(save_file, owned, Path(folder) / "model.safetensors")
            await self._llm.collective_rpc("take_weights", args=(folder,))
        if not await self._llm.reset_prefix_cache():
            raise RuntimeError("its prefix cache was not emptied")


def _key(serving: bool) -> str:
    """The setting that chose this engine."""
    return "policy.engine" if serving else "rollout.engine_kind"


def _sampled(output: Any, top: int) -> list[Sampled]:
    """The tokens of a part of an answer, each with the likeliest ones."""
    found = []
    for token, known in zip(output.token_ids, output.logprobs or (), strict=True):
        ranked = sorted(((one.rank or 0, i, one.logprob) for i, one in known.items()))
        found.append(Sampled(token, known[token].logprob, tuple((i, p) for _, i, p in ranked[:top])))
    return found


def _start(model: str, slots: int, max_context: int, hardware: Hardware, serving: bool) -> Any:
    if hardware.device == "cpu":
        # Ray says which cores an actor has; vLLM would bind its threads to the first ones of the machine.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(hardware.threads)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=local_folder(model), dtype=str(hardware.dtype).removeprefix("torch."),
        max_model_len=max_context, max_num_seqs=slots, block_size=_BLOCK, enable_prefix_caching=True,
        kv_cache_memory_bytes=_cache_bytes(model, slots, max_context, hardware.dtype),
        logprobs_mode="raw_logprobs" if serving else "processed_logprobs",
        generation_config="vllm", skip_tokenizer_init=True,
        disable_log_stats=True, enable_log_requests=False,
        worker_extension_cls="stateset_ray.policies.vllm_worker.TakesWeights",
        # Compiling for a CPU takes a minute, and no part of a compiled graph may hold packed weights.
        enforce_eager=hardware.device == "cpu",
    )  # fmt: skip
    try:
        return AsyncLLM.from_engine_args(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"vLLM cannot serve the model: {type(error).__name__}: {error}",
            given=model,
            mend=f"its own log above says why; {_key(serving)} = 'transformers' serves it without vLLM",
        ) from error


def _cache_bytes(model: str, slots: int, max_context: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values for `slots` conversations of `max_context` tokens, in whole blocks."""
    config = config_only(model).get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    blocks = slots * (-(-max_context // _BLOCK) + _SPARE_BLOCKS)
    entry: int = 2 * config.num_hidden_layers * keys * size * dtype.itemsize  # of one token
    return blocks * _BLOCK * entry


def _roomy(size: int) -> str | None:
    """Files in memory if they have room for the weights; else wherever temporary files go."""
    with contextlib.suppress(OSError):
        room = os.statvfs(_MEMORY_FILES)
        if os.access(_MEMORY_FILES, os.W_OK) and room.f_bavail * room.f_frsize > 2 * size:
            return str(_MEMORY_FILES)
    return None


class _Turns:
    """Many turns at a time, or none and something else.

    Attributes:
        seconds: of wall clock during which a turn ran, up to when none did last.
    """

    def __init__(self) -> None:
        self._running = 0
        self._began = 0.0
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()
        self._changing = asyncio.Lock()
        self.seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether no turn runs."""
        return not self._running

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold a turn; waits while there must be none."""
        while not self._open.is_set():
            await self._open.wait()
        if not self._running:
            self._idle.clear()
            self._began = time.perf_counter()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
                self.seconds += time.perf_counter() - self._began

    @contextlib.asynccontextmanager
    async def none(self) -> AsyncIterator[None]:
        """Let no turn begin; waits until those that run have ended."""
        async with self._changing:
            self._open.clear()
            try:
                await self._idle.wait()
                yield
            finally:
                self._open.set()
