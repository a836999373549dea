"""Publishing weights: from the learner to engines that answer with them, against copying those bytes.

    python -m benchmarks.publish               # SmolLM2's 540 MB to 2 engines; on 2 cores about 4 minutes
    python -m benchmarks.publish --model tiny --repeats 2 --transports object_store             # a trial

Prints one JSON object (`--output FILE`: into a file too). Learner and engines are the actors of a run. Each
transport publishes `repeats` versions without requests and as many while `--conversations` conversations
talk to the engines without a pause; the first of each is not counted. What is copied for comparison is what
the learner exports, by one thread, in the same process and under the same load, just before each publication.

| figure       | what it is                                                                             |
|--------------|----------------------------------------------------------------------------------------|
| `seconds`    | from the call of `publish` until every engine has answered a request with that version   |
| `learner`    | of these, until `publish` returned                                                     |
| `engines`    | of these, from then until all engines hold the version; the rest is their answers       |
| `turns`      | of these, from `publish`'s return until the turns had ended that were under way then     |
| `copy_twice` | copying the weights into new memory, twice                                             |
| `copy_warm`  | copying them twice into memory that was written before: no page is asked of the system  |
| `ratio`      | `seconds` by `copy_twice`, both medians; `of_each`: publication by publication          |
| `own_ratio`  | the same without `turns`: weights are switched between turns, so a version waits for them |
| `replies`    | that conversations got meanwhile; one that failed would have ended the benchmark       |
| `reply`      | seconds of one of these, on average: a version waits for the turns that are under way   |
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from stateset_ray.actors.inference_pool import inference_engines
from stateset_ray.actors.learner_group import LearnerGroup, learner_group
from stateset_ray.actors.placement import cluster, place
from stateset_ray.actors.router import Router
from stateset_ray.config import Config, load_config
from stateset_ray.metrics import versions
from stateset_ray.models import Hardware, config_only, load_model, state_tensors
from stateset_ray.policies.base import ReplyRequest

__all__ = ["TRANSPORTS", "measure"]

TRANSPORTS = ("object_store", "folder", "collective")
_PROMPT, _REPLY = 4, 8  # tokens of a request


def main() -> None:
    """Measure, then print."""
    options = _options()
    started = machine.describe()
    arrays = [tensor.numpy() for tensor in _weights(options.model)]
    sides = {}
    for transport in options.transports:
        sides[transport] = measure(transport, options, arrays)
        shown = {load: side["ratio"] for load, side in sides[transport].items()}
        print(f"{transport}: {shown}", file=sys.stderr, flush=True)
    result = {
        "command": " ".join(["python -m benchmarks.publish", *sys.argv[1:]]),
        "machine": started | {"load_1min_after": machine.describe()["load_1min"]},
        "commit": machine.commit(),
        "versions": versions(),
        "work": {key: value for key, value in vars(options).items() if key != "output"},
        "megabytes": round(sum(array.nbytes for array in arrays) / 1e6, 1),
        "transports": sides,
    }
    text = json.dumps(result, indent=2)
    print(text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _weights(name: str) -> list[torch.Tensor]:
    model = load_model(name, Hardware("cpu", torch.float32, 1))
    return list(state_tensors(model).values())


def measure(transport: str, options: argparse.Namespace, arrays: Sequence[Any]) -> dict[str, Any]:
    """The figures of one transport, without requests and with them."""
    with tempfile.TemporaryDirectory(prefix="publish", dir=options.folder) as folder:
        config = load_config(
            None,
            [
                f"run.dir={folder}", f"model.name={options.model}", "model.dtype=float32",
                f"rollout.engines={options.engines}", f"rollout.concurrency={options.conversations + 2}",
                "rollout.max_context=512", "learner.engine=torch", f"publish.transport={transport}",
                f"publish.bucket_mib={options.bucket_mib}",
            ],
        )  # fmt: skip
        with (
            cluster(config),
            place(config) as placement,
            inference_engines(config, placement) as engines,
            learner_group(config, placement) as learners,
        ):
            return asyncio.run(_loads(config, engines, learners, options, arrays))


async def _loads(
    config: Config, engines: list[Any], learners: LearnerGroup, options: argparse.Namespace,
    arrays: Sequence[Any],
) -> dict[str, Any]:  # fmt: skip
    bench = _Bench(config, engines, learners, arrays)
    quiet = await bench.publications(options.repeats)
    talking = [asyncio.create_task(bench.talk(index)) for index in range(options.conversations)]
    try:
        await bench.replied(options.conversations)
        busy = await bench.publications(options.repeats)
        for task in talking:
            if task.done():
                task.result()  # raises what ended it
    finally:
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)
    return {"quiet": quiet, "busy": busy}


class _Bench:
    """A learner, engines, and conversations that reach them through a router, as a worker's do."""

    def __init__(
        self, config: Config, engines: list[Any], learners: LearnerGroup, arrays: Sequence[Any]
    ) -> None:
        self._config = config
        self._engines = engines
        self._learners = learners
        self._arrays = arrays
        self._warm = [array.copy() for array in arrays]
        self._router = Router(engines)
        self._version = 0
        self._replies = 0
        self._turns: list[float] = []
        self._under_way: set[asyncio.Future[Any]] = set()
        self._vocabulary = config_only(config.model.name).vocab_size

    async def publications(self, repeats: int) -> dict[str, Any]:
        """Publish one version to warm up and then `repeats` more; medians."""
        found: list[dict[str, float]] = []
        for turn in range(repeats + 1):
            copies = await asyncio.to_thread(self._copy)
            before, self._turns = self._replies, []
            measured = await self._publish()
            if turn:
                waits = statistics.fmean(self._turns) if self._turns else 0.0
                found.append({**measured, **copies, "reply": waits, "replies": self._replies - before})
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        return {
            "ratio": round(medians["seconds"] / medians["copy_twice"], 2),
            "own_ratio": round((medians["seconds"] - medians["turns"]) / medians["copy_twice"], 2),
            **{key: round(value, 3) for key, value in medians.items()},
            "of_each": [round(one["seconds"] / one["copy_twice"], 2) for one in found],
        }

    def _copy(self) -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(2):
            copied = [array.copy() for array in self._arrays]
        middle = time.perf_counter()
        del copied
        warm = time.perf_counter()
        for _ in range(2):
            for target, array in zip(self._warm, self._arrays, strict=True):
                target[...] = array
        return {"copy_twice": middle - started, "copy_warm": time.perf_counter() - warm}

    async def _publish(self) -> dict[str, float]:
        self._version += 1
        started = time.perf_counter()
        published = await asyncio.to_thread(self._learners.publish, self._version)
        returned = time.perf_counter()
        turns = asyncio.create_task(self._end_of(list(self._under_way)))
        await self._router.hold(published.version, published.told)
        await asyncio.gather(*[e.hold.remote(published.version, published.told) for e in self._engines])
        held = time.perf_counter()
        request = self._request("probe", 0, 1)
        asked = [e.reply.remote(published.version, published.told, request) for e in self._engines]
        answers = await asyncio.gather(*asked)
        seconds = time.perf_counter() - started
        if any(answer.policy_version != self._version for answer in answers):
            raise AssertionError(f"an engine answered with another version than {self._version}")
        return {
            "seconds": seconds, "learner": returned - started, "engines": held - returned,
            "turns": await turns - returned,
        }  # fmt: skip

    async def _end_of(self, turns: list[asyncio.Future[Any]]) -> float:
        if turns:
            await asyncio.wait(turns)
        return time.perf_counter()

    def _request(self, name: str, turn: int, tokens: int) -> ReplyRequest:
        # Token ids by arithmetic: no engine minds what they mean.
        ids = tuple((7 * i + turn) % (self._vocabulary - 1) + 1 for i in range(_PROMPT))
        return ReplyRequest(f"{name}/{turn}", ids, (), tokens, 1.0, turn)

    async def talk(self, index: int) -> None:
        """Ask for one reply after the other; raises if one fails."""
        turn = 0
        while True:
            request = self._request(f"conversation {index}", turn, _REPLY)
            started = time.perf_counter()
            asked = asyncio.ensure_future(self._router.reply(request))
            self._under_way.add(asked)
            try:
                await asked
            finally:
                self._under_way.discard(asked)
            self._turns.append(time.perf_counter() - started)
            self._router.release(request.conversation)
            self._replies += 1
            turn += 1

    async def replied(self, count: int) -> None:
        """Wait until conversations have got so many replies."""
        while self._replies < count:
            await asyncio.sleep(0.01)


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", nargs="+", default=list(TRANSPORTS), choices=TRANSPORTS)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=2, help="that ask for replies meanwhile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--folder", help="where transport folder writes; else the temporary folder")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
