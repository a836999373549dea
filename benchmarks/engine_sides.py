"""The sides of the engine's benchmark, each in a process of its own (`benchmarks.sides.Side`).

| side         | what it is                                                                              |
|--------------|-----------------------------------------------------------------------------------------|
| `ours`       | `TransformersEngine`: each conversation asks for its next turn as soon as it has one    |
| `generate`   | `plain.play_plain`: a static batch, history prefilled again each turn, no log-probs     |
| `continuous` | transformers' continuous batching (what `generate_batch` drives), blocks shared, log-probs |
| `vllm`       | vLLM in this process: prefix caching, log-probs, nothing detokenized                     |

Every question is the same: play these conversations from an empty cache. What happens once in the life of
an engine (loading, compiling, allocating the cache) is not timed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.sides import answer_lines

_PAGE = 32  # tokens: small enough for what the conversations share to fill pages
_PATIENCE = 900  # seconds for a turn: all of its replies end together

Row = tuple[list[int], list[list[int]]]
"""The tokens of an opening, and those that follow each reply but the last."""
Replies = Sequence[tuple[Sequence[int], Sequence[float]]]
"""Of each conversation, in order: the tokens of its reply, and their log-probabilities where there are."""


def _timed(play: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started, busy = time.perf_counter(), time.process_time()
    answer = play()
    spent = time.perf_counter() - started, time.process_time() - busy
    return answer | {"seconds": spent[0], "processor_seconds": spent[1]}


def _turn_by_turn(rows: Sequence[Row], ask: Callable[[list[list[int]]], Replies]) -> dict[str, Any]:
    """Play turn after turn, all conversations together, with what answers a batch of prompts."""
    prompts = [list(opening) for opening, _ in rows]
    sampled, total, scored = 0, 0.0, 0
    for turn in range(1 + len(rows[0][1])):
        if turn:
            prompts = [p + suffixes[turn - 1] for p, (_, suffixes) in zip(prompts, rows, strict=True)]
        replies = ask(prompts)
        prompts = [p + list(ids) for p, (ids, _) in zip(prompts, replies, strict=True)]
        sampled += sum(len(ids) for ids, _ in replies)
        total += sum(sum(logprobs) for _, logprobs in replies)
        scored += sum(len(logprobs) for _, logprobs in replies)
    return {"sampled_tokens": sampled, "mean_logprob": total / scored}


class _Ours:
    def __init__(self, options: Mapping[str, Any]) -> None:
        from benchmarks.ours import new_engine
        from stateset_ray.config import RolloutConfig
        from stateset_ray.models import load_model

        hardware = _hardware(options)
        limits = RolloutConfig(concurrency=options["conversations"], max_context=options["max_context"])
        self._engine = new_engine(load_model(options["model"], hardware), limits, hardware)
        self._loop = asyncio.new_event_loop()

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        return _timed(lambda: self._loop.run_until_complete(self._play(question)))

    async def _play(self, question: Mapping[str, Any]) -> dict[str, Any]:
        before = dict(vars(self._engine.stats))
        logprobs = await asyncio.gather(
            *[self._converse(i, row, question) for i, row in enumerate(question["rows"])]
        )
        await self._engine.close()  # ends its loop and empties its cache; the next reply starts it again
        stats = {name: value - before[name] for name, value in vars(self._engine.stats).items()}
        sampled = int(stats["decode_tokens"])
        return {
            "sampled_tokens": sampled,
            "mean_logprob": sum(logprobs) / sampled,
            "prefill_tokens": int(stats["prefill_tokens"]),
            "forwards": int(stats["forwards"]),
            "seconds_in_forwards": stats["seconds"],
        }

    async def _converse(self, index: int, row: Row, question: Mapping[str, Any]) -> float:
        from stateset_ray.policies.base import ReplyRequest

        opening, suffixes = row
        prompt, total = tuple(opening), 0.0
        for turn in range(1 + len(suffixes)):
            seed = hash((question["seed"], index, turn)) % 2**31
            request = ReplyRequest(str(index), prompt, (), question["tokens"], 1.0, seed)
            reply = await self._engine.reply(request)
            total += sum(reply.logprobs)
            if turn < len(suffixes):
                prompt = (*prompt, *reply.token_ids, *suffixes[turn])
        return total


class _Generate:
    def __init__(self, options: Mapping[str, Any]) -> None:
        from benchmarks.plain import load_plain

        self._model = load_plain(options["model"], _hardware(options))

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        from benchmarks.plain import play_plain

        rows = [(tuple(opening), [tuple(s) for s in suffixes]) for opening, suffixes in question["rows"]]
        return _timed(lambda: play_plain(self._model, rows, question["tokens"], question["seed"]))


class _Continuous:
    def __init__(self, options: Mapping[str, Any]) -> None:
        from benchmarks.plain import load_plain

        self._model = load_plain(options["model"], _hardware(options))
        self._pages = options["conversations"] * -(-options["max_context"] // _PAGE)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        tokens = question["tokens"]
        generation = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, eos_token_id=-1
        )
        batching = ContinuousBatchingConfig(
            page_size=_PAGE, num_blocks=self._pages, max_batch_tokens=2048, return_logprobs=True,
            seed=question["seed"],
        )  # fmt: skip
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching
        ) as manager:

            def ask(prompts: list[list[int]]) -> Replies:
                names = manager.add_requests(inputs=prompts, max_new_tokens=tokens)
                found: dict[str, Any] = {}
                while len(found) < len(names):
                    result = manager.get_result(timeout=_PATIENCE)
                    if result is None or result.error:
                        raise RuntimeError(f"continuous batching gave {result and result.error}")
                    if result.is_finished():
                        found[result.request_id] = result
                return [(found[name].generated_tokens, found[name].logprobs) for name in names]

            return _timed(lambda: _turn_by_turn(question["rows"], ask))


class _Vllm:
    def __init__(self, options: Mapping[str, Any]) -> None:
        from vllm import LLM  # runs in an interpreter that has it

        self._llm = LLM(
            options["folder"], dtype="float32", max_model_len=options["max_context"],
            max_num_seqs=options["conversations"], enable_prefix_caching=True, block_size=_PAGE,
            disable_log_stats=True, seed=options["seed"],
        )  # fmt: skip

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams, TokensPrompt

        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        params = SamplingParams(
            max_tokens=question["tokens"], temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False
        )
        cached = 0

        def ask(prompts: list[list[int]]) -> Replies:
            nonlocal cached
            given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
            outputs = self._llm.generate(given, params, use_tqdm=False)
            cached += sum(output.num_cached_tokens or 0 for output in outputs)
            return [_vllm_reply(output.outputs[0]) for output in outputs]

        answer = _timed(lambda: _turn_by_turn(question["rows"], ask))
        return answer | {"cached_tokens": cached}


def _vllm_reply(output: Any) -> tuple[list[int], list[float]]:
    ids = list(output.token_ids)
    return ids, [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]


def _hardware(options: Mapping[str, Any]) -> Any:
    import torch

    from stateset_ray.models import Hardware

    hardware = Hardware("cpu", torch.float32, options["threads"])
    hardware.apply()
    return hardware


def vllm_environment(threads: int, cores: Sequence[int]) -> dict[str, str]:
    """Environment variables under which vLLM has as many threads as the others, and its own process only."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[:threads])),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the other process would take turns on the same cores
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": str(threads),
    }


if __name__ == "__main__":
    answer_lines({"ours": _Ours, "generate": _Generate, "continuous": _Continuous, "vllm": _Vllm})
