"""What a conversation costs besides its model: a scripted policy in the echo environment, 3 turns.

    python -m benchmarks.overhead                                   # about 3 minutes on 2 cores
    python -m benchmarks.overhead --parts process --profile         # and where the time goes
    python -m benchmarks.overhead --parts process --groups 20 --repeats 1               # a trial

Prints one JSON object (`--output FILE`: into a file too). Rates are medians over the repeats, by the wall
clock; `per_processor_second` is less shy of what else the machine does.

| part      | side       | what it is                                                                    |
|-----------|------------|-------------------------------------------------------------------------------|
| `process` | `repeated` | one process, groups of 8: rollout, samples and report of each group            |
|           | `new`      | groups of one and a word of 12 letters a turn: no text has been seen before    |
|           | `bare`     | a task a conversation, a coroutine for each call of environment and policy, and the same records (messages, steps, requests, replies, turns, trajectories): nothing else |
| `ray`     | by group size | jobs through `RolloutPool` and 2 `RolloutWorker`s, each payload opened and credited by an actor in the learner's place (`benchmarks.overhead_ray`) |
|           | `bare`     | as many payloads and reports, of as many bytes, through Ray's streams alone     |
| `open`    | by number  | event-loop lag and memory of conversations whose environment waits (`benchmarks.overhead_open`) |

`of_bare` is the rate by that of side `bare` of the same run.
"""  # noqa: E501 (a table's rows are lines)

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import pstats
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, overhead_open, overhead_ray
from stateset_ray.actors.jobs import GroupJob, report_on
from stateset_ray.config import RolloutConfig
from stateset_ray.environments.echo import Echo
from stateset_ray.metrics import versions
from stateset_ray.models import load_tokenizer
from stateset_ray.policies.base import Reply, ReplyRequest
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.rollout import rollout
from stateset_ray.types import Message, Step, Task, Trajectory, TrajectoryGroup, Turn

__all__ = ["TURNS", "limits", "process", "profile"]

TURNS = 3
_AT_ONCE = 8  # groups that are under way together
_SIDES: dict[str, tuple[int, dict[str, Any]]] = {
    "repeated": (8, {"turns": TURNS}),
    "new": (1, {"turns": TURNS, "length": 12, "alphabet": "abcdefghijklmnop"}),
}


def main() -> None:
    """Measure, then print."""
    options = _options()
    started = machine.describe()
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.overhead", *sys.argv[1:]]),
        "machine": started,
        "commit": machine.commit(),
        "versions": versions(),
        "work": {key: value for key, value in vars(options).items() if key != "output"},
    }
    if "process" in options.parts:
        result["process"] = process(options.groups, options.repeats)
    if options.profile:
        result["profile"] = profile(options.groups)
    if "open" in options.parts:
        result["open"] = overhead_open.measure(options.open, options.wait, options.seconds)
    if "ray" in options.parts:
        result["ray"] = overhead_ray.measure(options.group_sizes, options.flights)
    result["machine"] = started | {"load_1min_after": machine.describe()["load_1min"]}
    text = json.dumps(result, indent=2)
    print(text, flush=True)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def limits() -> RolloutConfig:
    """Limits that no conversation of the benchmark reaches."""
    return RolloutConfig(max_turns=TURNS, max_context=512, max_turn_tokens=48)


def process(groups: int, repeats: int) -> dict[str, Any]:
    """The sides of part `process`, taking turns; `groups` of 8 conversations, or as many alone.

    Raises:
        RuntimeError: a conversation was not played as it should be.
    """
    renderer = Renderer(load_tokenizer("tiny"))
    works: dict[str, Callable[[int], Awaitable[list[Trajectory]]]] = {
        side: _player(renderer, size, options) for side, (size, options) in _SIDES.items()
    }
    [example, *_] = asyncio.run(_drive(works["repeated"], _AT_ONCE))
    works["bare"] = lambda index: _bare_group(example, _SIDES["repeated"][0])
    gc.collect()
    gc.freeze()  # as a worker does
    rates: dict[str, list[tuple[float, float]]] = {side: [] for side in works}
    for repeat in range(repeats):
        for side, work in works.items():
            count = groups * 8 // (_SIDES[side][0] if side in _SIDES else 8)
            start, busy = time.perf_counter(), time.process_time()
            played = asyncio.run(_drive(work, count, first=(repeat + 1) * count))
            spent = time.perf_counter() - start, time.process_time() - busy
            rates[side].append((len(played) / spent[0], len(played) / spent[1]))
    gc.unfreeze()
    medians = {side: statistics.median(rate for rate, _ in found) for side, found in rates.items()}
    return {
        "conversations": groups * 8,
        "sampled_tokens_per_conversation": example.sampled_tokens,
        "tokens_per_conversation": sum(len(t.context_ids) + len(t.token_ids) for t in example.turns),
        "sides": {
            side: {
                "per_second": round(medians[side]),
                "per_processor_second": round(statistics.median(busy for _, busy in found)),
                "microseconds": round(1e6 / medians[side], 1),
                "of_bare": round(medians[side] / medians["bare"], 3),
                "all": [round(rate) for rate, _ in found],
            }
            for side, found in rates.items()
        },
    }


def profile(groups: int, rows: int = 25) -> list[dict[str, Any]]:
    """The functions in which side `repeated` spends most, by their own time under `cProfile`.

    The profile itself makes small functions look dearer than they are.
    """
    size, options = _SIDES["repeated"]
    work = _player(Renderer(load_tokenizer("tiny")), size, options)
    asyncio.run(_drive(work, _AT_ONCE))
    gc.collect()
    gc.freeze()
    watch = cProfile.Profile(time.process_time)
    watch.enable()
    asyncio.run(_drive(work, groups))
    watch.disable()
    gc.unfreeze()
    found = pstats.Stats(watch)
    entries: dict[tuple[str, int, str], Any] = found.stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in entries.values())
    first = sorted(entries.items(), key=lambda entry: -entry[1][2])[:rows]
    return [
        {
            "function": f"{Path(file).name}:{line} {name}" if line else name,
            "own": round(own / total, 4),
            "with_callees": round(cumulated / total, 4),
            "calls_per_conversation": round(calls / (groups * size), 2),
        }
        for (file, line, name), (_, calls, own, cumulated, _) in first
    ]


async def _drive(
    work: Callable[[int], Awaitable[list[Trajectory]]], count: int, first: int = 0
) -> list[Trajectory]:
    """Groups `first` and the next ones, `_AT_ONCE` of them at a time."""
    numbers, played = iter(range(first, first + count)), list[Trajectory]()

    async def lane() -> None:
        for number in numbers:
            played.extend(await work(number))

    await asyncio.gather(*[lane() for _ in range(_AT_ONCE)])
    return played


def _player(
    renderer: Renderer, size: int, options: dict[str, Any]
) -> Callable[[int], Awaitable[list[Trajectory]]]:
    """Plays the group of a number, as a `RolloutWorker` does, and reports on it."""
    tasks, room = Echo(**options), limits()

    async def one(task: Task, index: int, sample: int) -> Trajectory:
        environment = Echo(**options)
        policy = ScriptedPolicy(renderer, lambda _: environment.expert())
        return await rollout(
            environment, task, policy, renderer, room, id=f"r/0/{task.id}/{sample}/0", seed=index,
            sample=sample,
        )  # fmt: skip

    async def group(index: int) -> list[Trajectory]:
        task = tasks.task("train", index)
        played = await asyncio.gather(*[one(task, index, sample) for sample in range(size)])
        job = GroupJob(f"r/0/{task.id}", task, index, size, 1.0)
        report, payload = report_on(job, TrajectoryGroup(task, tuple(played)))
        if any(reward is None or abs(reward - 1) > 1e-9 for reward in report.rewards):
            raise RuntimeError(f"an expert's conversation earned {report.rewards}: {report.errors}")
        if sum(size.masked for size in report.sizes) != sum(report.sampled) or not payload.samples:
            raise RuntimeError("the samples do not hold what was sampled")
        return played

    return group


async def _bare_group(example: Trajectory, size: int) -> list[Trajectory]:
    return list(await asyncio.gather(*[_bare(example) for _ in range(size)]))


async def _bare(example: Trajectory) -> Trajectory:
    """The records of a conversation, made anew."""
    step = await _says(example.messages[0])
    messages, turns, prompts = list(step.messages), list[Turn](), list(example.prompts())
    for index, turn in enumerate(example.turns):
        request = ReplyRequest(example.id, prompts[index], tuple(messages), 48, 1.0, index)
        reply = await _replies(request, turn)
        messages.append(Message("assistant", example.messages[2 * index + 1].content))
        step = await _says(*example.messages[2 * index + 2 : 2 * index + 3])
        messages += step.messages
        turns.append(Turn(turn.context_ids, reply.token_ids, reply.logprobs, 0, turn.reward))
    return Trajectory(
        example.id, example.task, 0, tuple(messages), tuple(turns), example.stop_reason, example.info
    )


async def _says(*messages: Message) -> Step:
    return Step(tuple([Message(message.role, message.content) for message in messages]))


async def _replies(request: ReplyRequest, turn: Turn) -> Reply:
    return Reply(turn.token_ids, turn.logprobs, request.seed, "stop")


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["process", "open", "ray"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--groups", type=int, default=500, help="of 8 conversations, in part process")
    parser.add_argument("--repeats", type=int, default=5, help="of part process")
    parser.add_argument("--profile", action="store_true", help="of part process, side repeated")
    parser.add_argument("--open", nargs="+", type=int, default=[1_000, 10_000], metavar="CONVERSATIONS")
    parser.add_argument("--wait", type=float, default=3.0, help="mean seconds of an answer, in part open")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, in part open")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[8, 32], help="in part ray")
    parser.add_argument("--flights", type=int, default=12, help="of 2,048 conversations, in part ray")
    parser.add_argument("--output", type=Path, help="write the JSON here as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
