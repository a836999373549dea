"""What hostile clients and hostile checkpoints are kept from, beside what the other files here test.

The numbers are those of the list in docs/serving.md.
"""

from __future__ import annotations

import ast
import asyncio
import json
import runpy
import struct
from pathlib import Path

import httpx2
import pytest

from stateset_ray.errors import CheckpointError
from stateset_ray.serving import release, replying
from stateset_ray.serving.events import Began, Ended, Piece
from stateset_ray.serving.gate import Gate
from stateset_ray.serving.rates import Rates
from stateset_ray.serving.replica import PolicyReplica
from stateset_ray.serving.routes import routes
from stateset_ray.serving.security import KeyRing, digest
from stateset_ray.serving.settings import (
    DeadlineSettings,
    KeyEntry,
    PolicySettings,
    RateSettings,
    SecuritySettings,
    ServeSettings,
    SwapSettings,
)
from stateset_ray.serving.source import Source

ROOT = Path(__file__).parents[3]
KEY = "k" * 32
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
save = runpy.run_path(str(Path(__file__).with_name("support_checkpoints.py")))["save"]


class Scripted:
    """Answers everything with one word; implements `Policies`."""

    async def ask(self, ask):
        yield (Began("v", 1), *(Piece(i, "word") for i in range(ask.choices)))
        yield tuple(Ended(i, "stop", 1) for i in range(ask.choices))

    async def status(self):
        return {"version": "v"}

    async def statuses(self):
        return [await self.status()]


@pytest.fixture
def gate(meters):
    security = SecuritySettings(keys=(KeyEntry(name="shop", sha256=digest(KEY)),))
    settings = ServeSettings(
        source="tiny",
        security=security,
        deadlines=DeadlineSettings(body=0.2),
        rates=RateSettings(concurrent=2),
    )
    return Gate(
        routes(settings, Scripted(), meters), KeyRing(security, {}), Rates(settings.rates), settings, meters
    )


def web(gate):
    return httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=gate, raise_app_exceptions=False), base_url="http://localhost",
        headers={"authorization": f"Bearer {KEY}"},
    )  # fmt: skip


def test_s4_a_key_is_in_no_metric_and_no_settings(gate, recorders):
    async def play():
        async with web(gate) as client:
            for more in ({}, {"user": KEY}, {"top_p": 3}, {KEY: 1}):
                await client.post("/v1/chat/completions", json=ASK | more, headers={"x-session-id": KEY})
            await client.get(f"/{KEY}")

    asyncio.run(play())
    labels = json.dumps([list(recorder.counted) for recorder in recorders.values()])
    assert "/v1/chat/completions" in labels
    assert KEY not in labels
    assert KEY not in repr(gate._settings) + gate._settings.model_dump_json()


@pytest.mark.parametrize(
    "headers",
    [
        {"serve_multiplexed_model_id": "other"}, {"Serve-Multiplexed-Model-Id": "other"},
        {"x-request-timeout-seconds": "0"},
        {"X-Request-Disconnect-Disabled": "?1"}, {"x-request-id": "x" * 129}, {"x-request-id": "a;b"},
        {"x-session-id": "x" * 257}, {"X_Session_Id": "s"}, {"Idempotency-Key": "once"},
    ],
)  # fmt: skip
def test_s9_s27_headers_that_steer_serve_or_rely_on_replay_are_refused(gate, headers):
    async def play():
        async with web(gate) as client:
            answer = await client.post("/v1/chat/completions", json=ASK, headers=headers)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] in ("unsupported_header", "invalid_header")

    asyncio.run(play())


@pytest.mark.parametrize("pieces", [[], [b'{"model": ']])
def test_s10_a_body_that_does_not_come_gives_its_place_back(gate, pieces):
    """Else a few sockets would hold all places of a key, and the memory of what came, for ever."""

    async def play():
        told = []
        parts = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]

        async def receive():
            if parts:
                return parts.pop(0)
            await asyncio.Event().wait()

        async def send(message):
            told.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
            "headers": [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")],
        }  # fmt: skip
        async with asyncio.timeout(10):
            await gate(scope, receive, send)
        assert told[0]["status"] == 408
        assert json.loads(told[1]["body"])["error"]["code"] == "body_too_slow"
        assert gate.running == 0
        async with web(gate) as client:  # what comes in time is answered, however long that takes
            assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200

    asyncio.run(play())


def asked(body: dict) -> tuple[dict, list]:
    """The scope and the messages of a request, as a server gives them."""
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "headers": [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")],
    }  # fmt: skip
    return scope, [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]


@pytest.mark.parametrize("leaves", [True, False])
def test_s10_a_client_that_does_not_read_gives_its_place_back(meters, recorders, monkeypatch, leaves):
    """Straight behind a server that waits until there is room for more; and also if it leaves meanwhile."""
    monkeypatch.setattr(replying, "_SPARE_SECONDS", 0.1)
    closed = []

    class Endless(Scripted):
        async def ask(self, ask):
            try:
                yield (Began("v", 1),)
                while True:
                    yield (Piece(0, "word"),)
                    await asyncio.sleep(0)
            finally:
                await asyncio.sleep(0)  # as what waits for the other side does
                closed.append(ask.id)

    security = SecuritySettings(keys=(KeyEntry(name="shop", sha256=digest(KEY)),))
    settings = ServeSettings(
        source="tiny", security=security, deadlines=DeadlineSettings(total=60.0 if leaves else 0.2)
    )
    gate = Gate(
        routes(settings, Endless(), meters), KeyRing(security, {}), Rates(settings.rates), settings, meters
    )

    async def play():
        scope, messages = asked(ASK | {"stream": True})
        stuck, told = asyncio.Event(), []

        async def receive():
            if messages:
                return messages.pop(0)
            await (stuck.wait() if leaves else asyncio.Event().wait())
            return {"type": "http.disconnect"}

        async def send(message):
            told.append(message)
            if len(told) > 4:
                stuck.set()
                await asyncio.Event().wait()

        async with asyncio.timeout(10):
            await gate(scope, receive, send)
            while not closed:
                await asyncio.sleep(0)
        assert gate.running == 0
        assert recorders["cancelled"].counted[()] == 1

    asyncio.run(play())


def test_a_client_that_leaves_while_it_sends_is_no_failure_of_ours(gate, recorders, caplog):
    async def play():
        told, scope = [], asked(ASK)[0]
        messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            told.append(message)

        await gate(scope, receive, send)
        assert not told

    asyncio.run(play())
    assert [status for _, status in recorders["requests"].counted] == ["4xx"]
    assert "failed" not in caplog.text


def test_nobody_is_sent_elsewhere(gate):
    """By Starlette's redirect a key would travel to an http:// address that nobody has checked."""

    async def play():
        async with web(gate) as client:
            for method, path in (
                ("POST", "/v1/chat/completions/"),
                ("GET", "/v1/models/"),
                ("GET", "/healthz/"),
            ):
                answer = await client.request(method, path, json=ASK)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")

    asyncio.run(play())


def test_an_answer_that_stops_before_its_end_is_asked_for_again(gate, monkeypatch, recorders):
    begun = []

    async def ask(self, ask):
        begun.append(ask.id)
        yield (Began("v", 1), Piece(0, "half"))
        if len(begun) > 1:
            yield (Ended(0, "stop", 1),)

    monkeypatch.setattr(Scripted, "ask", ask)

    async def play():
        async with web(gate) as client:
            answer = await client.post("/v1/chat/completions", json=ASK)
            assert answer.json()["choices"][0]["finish_reason"] == "stop"

    asyncio.run(play())
    assert len(begun) == 2


def test_s14_a_checkpoint_that_is_a_link_is_not_chosen(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    save(run, 2)
    (run / "checkpoints" / "step-00000002").rename(other / "step-00000002")
    (run / "checkpoints" / "step-00000002").symlink_to(other / "step-00000002")
    for choose in (release.pin, lambda run, name: release.start_canary(run, name, 0.1)):
        with pytest.raises(CheckpointError, match="a link"):
            choose(run, "step-00000002")


TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "change": "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}",
    "open": "{{ cycler.__init__.__globals__.os.system('touch /tmp/never') }}",
}


@pytest.mark.parametrize("evil", [*TEMPLATES, "bomb", "negative"])
def test_s15_s19_hostile_checkpoints_are_refused(run, meters, evil):
    """A header that claims more than there is; a chat template that reaches for what it must not have."""
    if evil in TEMPLATES:
        extra = {"chat_template.jinja": TEMPLATES[evil].encode()}
    else:
        size = 2**62 if evil == "bomb" else 2
        extra = {"model.safetensors": struct.pack("<Q", size) + b"{}" + b"\0" * 64}

    async def play():
        settings = ServeSettings(
            source=str(run), policy=PolicySettings(slots=2, threads=1), swap=SwapSettings(poll_seconds=0)
        )
        held = PolicyReplica(settings, meters)
        await held.start()
        save(run, 2, extra=extra)
        assert not await held.swap(Source(str(run)).wanted())
        status = await held.status()
        assert (status["step"], "step-00000002" in status["problem"]) == (1, True)

    asyncio.run(play())


def test_s26_no_other_site_is_let_in(gate):
    async def play():
        async with web(gate) as client:
            for method, path in (("OPTIONS", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/")):
                answer = await client.request(
                    method, path,
                    headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
                )  # fmt: skip
                assert not [name for name in answer.headers if name.startswith("access-control")]

    asyncio.run(play())


ALLOWED = {
    ("stateset_ray/actors/jobs.py", "pickle"),
    ("stateset_ray/batch.py", "pickle"),
    ("stateset_ray/actors/batch/worker.py", "pickle"),
    ("stateset_ray/sweep/tuning.py", "pickle"),
}
"""What travels between our own actors, as Ray itself does it; a sweep's searcher among Tune's own files."""


def risks(path, text):
    """S18: what runs code that is data."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            for name in ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"):
                if name in [part for full in names for part in full.split(".")]:
                    yield path, "pickle"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            words = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if called in ("eval", "exec", "compile", "os.system", "os.popen", "__import__"):
                yield path, called
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield path, called
            if called == "torch.load" and words.get("weights_only") is not True:
                yield path, called
            if words.get("shell") or words.get("trust_remote_code"):
                yield path, "shell"


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from ray import cloudpickle", "eval(x)", "torch.load(x)", "run(x, shell=True)",
     "yaml.load(x)", "f(trust_remote_code=True)", "torch.load(x, weights_only=False)"],
)  # fmt: skip
def test_s18_a_risk_is_found(text):
    assert list(risks("a.py", text))


def test_s18_no_source_runs_what_is_data():
    files = sorted((ROOT / "stateset_ray").rglob("*.py"))
    found = {risk for file in files for risk in risks(file.relative_to(ROOT).as_posix(), file.read_text())}
    assert len(files) > 100
    assert found <= ALLOWED
