"""What clients of an endpoint notice: faults, load, and time.

    python -m benchmarks.serving                                 # 10 of each of the first four faults
    python -m benchmarks.serving --faults stream ingress --times 5
    python -m benchmarks.serving --faults --load latency overhead
    python -m benchmarks.serving --faults --soak 240

Prints one JSON object (`--output FILE`: into a file too). Ray Serve on this machine, two ingress and two
policy replicas, the tiny model (`--model smollm2` for another); four clients ask for 20 tokens without a
pause and without retries of their own, each in a session of its own.

| fault       | what is done                                                                              |
|-------------|-------------------------------------------------------------------------------------------|
| `none`      | nothing, for 20 seconds                                                                   |
| `kill`      | SIGKILL to a policy replica; the next one when there are two again                        |
| `swap`      | a newer checkpoint; the next one when both replicas answer with it                        |
| `bad`       | a checkpoint whose weights are NaN; the next one when both replicas have refused it       |
| `stream`    | as `kill`, and what is asked for is streamed, 60 tokens of it                             |
| `ingress`   | SIGKILL to an ingress replica; clients are OpenAI's, with the retries that are its default |
| `update`    | other settings are deployed, which builds every policy replica anew, one by one           |
| `deploy`    | the same by Ray's own command, `serve deploy FILE`                                        |
| `downscale` | one policy replica fewer (and then two again, not counted)                                 |

| figure           | what it is                                                                         |
|------------------|------------------------------------------------------------------------------------|
| `requests`       | that clients made meanwhile                                                         |
| `failed`         | of them, by what clients were told                                                  |
| `total_ms`, `first_token_ms`, `between_tokens_ms` | 50th and 99th percentile in milliseconds           |
| `after_ms`       | the same of all the time, of those begun 5 s after a fault                          |

`--load` measures without faults (`benchmarks.serving_load`): `latency` by clients at a time, the `overhead`
of the endpoint over the engine (`benchmarks.serving_overhead`), first tokens of conversations with and
without `affinity`, an `overload` of ten times what can be answered, 1,000 `disconnects`. `--soak SECONDS`
(`benchmarks.serving_soak`) says how replicas grow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from benchmarks import machine
from benchmarks.serving_clients import HI, Told, crowd, percentiles, summary
from benchmarks.serving_endpoint import PATIENCE, Endpoint, endpoint
from benchmarks.serving_load import affinity, disconnects, latency, overload
from benchmarks.serving_overhead import overhead
from benchmarks.serving_soak import soak
from stateset_ray.metrics import versions

__all__ = ["FAULTS", "LOADS", "main"]

FAULTS = ("none", "kill", "swap", "bad", "stream", "ingress", "update", "deploy", "downscale")
LOADS = {
    "latency": latency, "overhead": overhead, "affinity": affinity, "overload": overload,
    "disconnects": disconnects,
}  # fmt: skip
_CLIENTS = 4
_CALM = 20.0  # seconds without a fault
_AFTER = 5.0  # seconds in which a fault may be felt


def main() -> None:
    """Measure, then print."""
    options = _options()
    result: dict[str, Any] = {
        "machine": machine.describe(), "commit": machine.commit(), "versions": versions(),
        "command": " ".join(["python -m benchmarks.serving", *sys.argv[1:]]),
        "model": options.model, "times": options.times,
    }  # fmt: skip
    # A server that is to be overloaded must be small: its queue is counted in answers.
    slots = 4 if "overload" in options.load else 16
    context = 512 if options.model == "tiny" else 2048
    with (
        tempfile.TemporaryDirectory(prefix="ssr", dir="/tmp") as folder,
        endpoint(
            Path(folder),
            model=options.model,
            context=context,
            slots=slots,
            dashboard="deploy" in options.faults,
        ) as made,
    ):
        made.seconds = options.seconds
        if options.ingress_ongoing is not None:
            made.settings = made.settings.model_copy(update={"ingress_ongoing": options.ingress_ongoing})
            made.deploy()
        if options.remembered is not None:
            made.deploy(remembered=options.remembered)
        for fault in options.faults:
            result.setdefault("faults", {})[fault] = _measured(made, fault, options.times)
            _write(options.output, result)
        for name in options.load:
            result.setdefault("load", {})[name] = LOADS[name](made)
            _write(options.output, result)
        if options.soak:
            result["soak"] = soak(made, options.soak, options.warm_up)
            _write(options.output, result)
    print(json.dumps(result, indent=1))


def _write(path: Path | None, result: dict[str, Any]) -> None:
    """What is known so far: the rest may take long."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=FAULTS[:4])
    parser.add_argument("--times", type=int, default=10, help="of each fault")
    parser.add_argument("--load", nargs="*", choices=tuple(LOADS), default=())
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--warm-up", type=float, metavar="SECONDS", help="of a soak; default: a third of it")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seconds", type=float, default=10, help="of each level of `overload`")
    parser.add_argument("--remembered", type=int, help="`policy.remembered`, for a soak")
    parser.add_argument("--ingress-ongoing", type=int, help="`ingress_ongoing`, for `overload`")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.warm_up is not None and not 0 <= options.warm_up <= 0.8 * options.soak:
        parser.error(f"--warm-up {options.warm_up:g}: from 0 to 0.8 of --soak ({options.soak:g})")
    return options


def _measured(made: Endpoint, fault: str, times: int) -> dict[str, Any]:
    """Clients ask while a fault is done so many times, one after the other."""
    moments: list[float] = []

    def work() -> None:
        for _ in range(times if fault != "none" else 1):
            moments.append(time.monotonic())
            _do(made, fault)

    if fault == "ingress":
        found = _openai_crowd(made, work)
    else:
        tokens, stream = (60, True) if fault == "stream" else (20, False)
        found = asyncio.run(crowd(made, _CLIENTS, work, tokens=tokens, stream=stream))
    if fault == "downscale":
        made.deploy(replicas=2)
    after = [t for t in found if any(0 <= t.begun - m <= _AFTER for m in moments) and t.told == "answered"]
    return {
        **summary(found),
        "after_ms": percentiles([t.ended - t.begun for t in after]) if fault != "none" else None,
        "seconds_per_fault": round((found[-1].ended - moments[0]) / len(moments), 1),
    }


def _do(made: Endpoint, fault: str) -> None:
    """One fault, until it is over."""
    if fault == "none":
        time.sleep(_CALM)
    elif fault in ("kill", "stream"):
        made.kill_policy()
    elif fault == "ingress":
        made.kill_ingress()
    elif fault == "swap":
        step = made.save(1.001)
        made.reaches(lambda found: len(found) == 2 and all(r["step"] == step for r in found))
    elif fault == "bad":
        name = f"step-{made.save(float('nan')):08d}"
        made.reaches(lambda found: all(r["problem"].startswith(name) for r in found))
    else:
        before = {replica["pid"] for replica in made.replicas()}
        change = {"remembered": made.settings.policy.remembered + 1}
        if fault == "downscale":
            made.deploy(replicas=3 - made.settings.policy.replicas)
        elif fault == "update":
            made.deploy(**change)
        else:
            made.deploy_by_command(**change)
        wanted = made.settings.policy.replicas
        made.reaches(lambda found: len(found) == wanted and not before & {r["pid"] for r in found})


def _openai_crowd(made: Endpoint, work: Callable[[], None]) -> list[Told]:
    """OpenAI's own client, which asks again by itself."""
    found: list[Told] = []
    over = threading.Event()

    def ask(number: int) -> None:
        with openai.OpenAI(base_url=f"{made.url}/v1", api_key=made.key, timeout=PATIENCE) as client:
            while not over.is_set():
                told = Told(time.monotonic())
                try:
                    answer = client.chat.completions.create(
                        model="bench", max_tokens=20, messages=HI, extra_headers={"x-session-id": str(number)}
                    )  # type: ignore[arg-type]
                    told.tokens = answer.usage.completion_tokens if answer.usage else 0
                except openai.OpenAIError as error:
                    told.told = f"{type(error).__name__}: {error}"
                told.ended = time.monotonic()
                found.append(told)

    with ThreadPoolExecutor(_CLIENTS) as pool:
        asking = [pool.submit(ask, number) for number in range(_CLIENTS)]
        try:
            work()
        finally:
            over.set()
        for one in asking:
            one.result(timeout=PATIENCE)
    return found


if __name__ == "__main__":
    main()
