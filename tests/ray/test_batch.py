"""Batches over the shared cluster: replies, scores and games, ends and deaths in the middle, one account."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playground import small

from stateset_ray.actors.batch.answers import Player, Replier
from stateset_ray.actors.batch.scores import Scorer
from stateset_ray.batch import batch
from stateset_ray.config import Config
from stateset_ray.dataset.rows import Row, row_of
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import ClusterError, ConfigError
from stateset_ray.evaluate import evaluate
from stateset_ray.types import Message

pytestmark = pytest.mark.ray

PLAYGROUND = 'environment.path="playground:Playground"'


def asking(*texts: str) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "messages": [{"role": "user", "content": t}]} for i, t in enumerate(texts)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def finished(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("part-*")) for line in path.open()]


def test_a_batch_that_was_interrupted_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    config = small(tmp_path, "rollout.concurrency=1", "rollout.workers=2", "evaluate.temperature=1")
    rows: list[Any] = asking(*(f"Say: {word}" for word in ("cab", "bac", "abc") * 20))
    rows[3], rows[9] = "{broken", {"id": "long", "messages": [{"role": "user", "content": "x" * 100}]}
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"

    def interrupt(done: int, whole: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch(config, source, out, "generate", replicas=1, on_progress=interrupt)
    kept = {path: path.read_bytes() for path in out.glob("part-*")}
    assert kept
    before = sum(text.count(b"\n") for text in kept.values())
    assert 0 < before < 60
    told: list[tuple[int, int]] = []
    result = batch(config, source, out, "generate", on_progress=lambda *t: told.append(t))
    assert (result["rows"], result["done"], result["before"]) == (60, 58, before)
    assert result["errors"] == {"invalid": 1, "too_long": 1}
    assert told[-1] == (60, 60)
    assert all(path.read_bytes() == text for path, text in kept.items())
    done = {row["id"]: row for row in finished(out)}
    assert len(finished(out)) == 60
    assert done.keys() == {"row-4", "long", *(f"r{i}" for i in range(60) if i not in (3, 9))}
    assert done["r0"]["finish_reason"] in ("stop", "length")
    # Each row has a seed of its own, and no other worker or piece would have given it another reply.
    again = Replier(config, 1).answer(
        [Row(f"r{i}", (Message("user", rows[i]["messages"][0]["content"]),)) for i in (59, 0)]
    )
    assert again == [done["r59"], done["r0"]]
    assert done["r0"]["logprob"] != done["r18"]["logprob"]  # the same words under another id
    # Nothing is left to do: no worker is started for it.
    assert batch(config, source, out, "generate")["before"] == 60
    with pytest.raises(ConfigError, match=r"temperature was 1\.0 and is 0\.0"):
        batch(config.with_overrides(["evaluate.temperature=0"]), source, out, "generate")


@pytest.fixture
def talker(tmp_path: Path) -> str:
    """A model of tiny's shape whose greedy replies say something: tiny's own repeat half of a letter."""
    import torch

    from stateset_ray.models import choose_hardware, load_model, load_tokenizer

    model = load_model("tiny", choose_hardware(small(tmp_path).model, 0, 1))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "talker")
    load_tokenizer("tiny").save_pretrained(tmp_path / "talker")
    return str(tmp_path / "talker")


def test_batch_rollout_and_endpoint_give_the_same_greedy_reply(tmp_path: Path, talker: str) -> None:
    from stateset_ray.models import choose_hardware
    from stateset_ray.rollout import rollout
    from stateset_ray.serving.events import Ask, Piece
    from stateset_ray.serving.held_policy import load_policy
    from stateset_ray.serving.settings import ServeSettings
    from stateset_ray.serving.source import Candidate

    config = small(
        tmp_path, f'model.name="{talker}"', "evaluate.temperature=0", "rollout.max_turn_tokens=16",
        "rollout.max_turns=1",
    )  # fmt: skip
    hardware = choose_hardware(config.model, 0, 1)
    held = load_policy(Candidate(talker, "talker", -1), ServeSettings(source=talker), hardware, 96, None)

    async def elsewhere() -> list[tuple[Message, str, str]]:
        """(what was asked, what a rollout replied, what the endpoint replied)"""
        found = []
        for index in range(4):
            task, id = Echo().task("heldout", index), f"t{index}"
            game = await rollout(
                Echo(), task, held.engine, held.renderer, config.rollout, id=id, seed=index, temperature=0.0
            )
            ask = Ask(id, "", "", game.messages[:1], 16, 0.0, 0)
            events = [event async for several in held.answer(ask) for event in several]
            said = "".join(event.text for event in events if isinstance(event, Piece))
            found.append((game.messages[0], game.messages[1].content, said))
        await held.engine.close()
        return found

    asked, played, served = zip(*asyncio.run(elsewhere()), strict=True)
    rows = Replier(config, 1).answer([Row(i, (message,)) for i, message in enumerate(asked)])
    assert [row["message"]["content"] for row in rows] == list(played) == list(served)
    assert len(set(played)) > 1


def test_scores_are_the_models_own_log_probabilities(tmp_path: Path) -> None:
    import torch

    from stateset_ray.models import TreeRows, choose_hardware, load_model, load_tokenizer
    from stateset_ray.policies.renderer import Renderer

    config = small(tmp_path, "rollout.temperature=0.7")
    said = [("user", "Say: cab"), ("assistant", "cab"), ("user", "Say: bac"), ("assistant", "b")]
    talk = tuple(Message(role, text) for role, text in said)  # type: ignore[arg-type]
    long = (Message("user", "x" * 80), Message("assistant", "y" * 80))
    short, failed, twin = Scorer(config, 1).answer([Row("a", talk), Row(2, long), Row("b", talk[:2])])
    renderer = Renderer(load_tokenizer("tiny"))
    first = renderer.opening(talk[:1]), renderer.reply("cab")
    second = renderer.suffix(talk[2:3]), renderer.reply("b")
    ids = [token for part in (*first, *second) for token in part]
    model = load_model("tiny", choose_hardware(config.model, 0, 1))
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None],
            rows=TreeRows(((len(ids), -1),)), use_cache=False,
        ).logits[0].double() / 0.7  # fmt: skip
    logprobs = torch.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()
    start = len(first[0]) - 1
    wanted = [logprobs[start : start + len(first[1])], logprobs[len(ids) - len(second[1]) - 1 :]]
    for reply, expected in zip(short["replies"], wanted, strict=True):
        assert reply["tokens"] == len(expected)
        np.testing.assert_allclose(reply["logprob"], expected.sum(), rtol=1e-4)
        np.testing.assert_allclose(reply["mean"], expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(short["logprob"], sum(e.sum() for e in wanted), rtol=1e-4)
    np.testing.assert_allclose(short["mean"], np.concatenate(wanted).mean(), rtol=1e-4)
    np.testing.assert_allclose(twin["logprob"], short["replies"][0]["logprob"], rtol=1e-5)
    assert failed["error"]["kind"] == "too_long"


def test_playing_gives_the_figures_of_an_evaluation(tmp_path: Path) -> None:
    config = small(tmp_path, "evaluate.tasks=16")
    wanted = evaluate(config)
    result = batch(config, "heldout:16", tmp_path / "out", "play")
    for figure in ("reward", "tasks", "failed", "stop_reasons", "conversation"):
        assert result[figure] == wanted[figure], figure
    assert {row["task"]: row["reward"] for row in finished(tmp_path / "out")} == wanted["rewards"]


def test_what_a_dead_actor_had_is_done_elsewhere(tmp_path: Path) -> None:
    """And a row that every process dies of ends as an error, alone."""
    config = small(tmp_path, PLAYGROUND, "rollout.retries=0")
    rows: list[dict[str, Any]] = [{"id": i, "seed": i} for i in range(6)]
    rows[2]["data"] = {"fault": "exit"}
    rows[4]["data"] = {"fault": "raise"}
    result = batch(config, write(tmp_path / "in.jsonl", rows), tmp_path / "out", "play")
    assert (result["rows"], result["done"]) == (6, 4)
    assert result["errors"] == {"died": 1, "environment_error": 1}
    assert (result["tasks"], result["failed"]) == (6, 2)
    [shard] = (tmp_path / "out").glob("part-*")
    done = [json.loads(line) for line in shard.open()]
    assert [row["id"] for row in done] == [0, 1, 2, 3, 4, 5]
    # Alone or together, in whatever process: a row's result follows from the row.
    again = Player(config, 1).answer([row_of(row, 0, "play") for row in rows[:2]])
    assert [row["reward"] for row in again] == [row["reward"] for row in done[:2]]


def test_what_cannot_be_placed_or_loaded_is_said(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", asking("hello"))
    with pytest.raises(ClusterError, match="there was no room for a worker of the batch"):
        batch(small(tmp_path, "cluster.worker_cpus=99"), source, tmp_path / "out", "generate")
    config = small(tmp_path, "model.device=cuda")
    with pytest.raises(ConfigError, match="asks for a GPU"):
        batch(config, source, tmp_path / "out2", "generate")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    """The command line, with a cluster of its own, killed when its first shard is there."""
    toml = tmp_path / "tiny.toml"
    toml.write_text(Config.model_validate(small(tmp_path, "rollout.concurrency=2")).to_toml())
    source = write(tmp_path / "in.jsonl", asking(*(f"Say: {i}" for i in range(400))))
    command = [sys.executable, "-m", "stateset_ray.cli", "batch", str(toml), source, str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": tempfile.mkdtemp(prefix="ssb", dir="/tmp")
    }  # fmt: skip
    first = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 150
    while not list((tmp_path / "out").glob("part-*")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=30)
    before = len(finished(tmp_path / "out"))
    assert 0 < before < 400
    done = subprocess.run(
        [*command, "--json"], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"] == result["done"] == 400
    assert before <= result["before"] < 400
    assert sorted(row["id"] for row in finished(tmp_path / "out")) == sorted(f"r{i}" for i in range(400))
