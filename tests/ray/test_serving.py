"""The endpoint on a real Serve: OpenAI's own client, and what fails under load without a failed request."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import openai
import pytest

from stateset_ray.config import ModelConfig
from stateset_ray.models import choose_hardware, load_model, load_tokenizer
from stateset_ray.policies.base import ReplyRequest
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.serving.security import add_key
from stateset_ray.serving.settings import (
    SERVE_LOGGING,
    AgentSettings,
    AutoscalingSettings,
    ConversationSettings,
    PolicySettings,
    RateSettings,
    SecuritySettings,
    ServeSettings,
    SwapSettings,
    TranscriptSettings,
)
from stateset_ray.types import Message

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SHOP = "stateset_ray.environments.customer_service:CustomerService"
HI = [{"role": "user", "content": "hi"}]
PATIENCE = 60.0  # seconds that anything may take on a busy machine


_SUPPORT = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "serving" / "support_checkpoints.py"))
_CERTIFICATE = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "serving" / "support_certificate.py"))
new_run, save = _SUPPORT["new_run"], _SUPPORT["save"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Endpoint:
    url: str
    key: str
    admin: str
    run: Path
    keys: Path

    def client(self, key: str | None = None, below: str = "") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1{below}", api_key=key or self.key, max_retries=0, timeout=PATIENCE
        )

    def replicas(self) -> list[dict]:
        answer = httpx2.get(
            f"{self.url}/admin/weights", headers={"authorization": f"Bearer {self.admin}"}, timeout=PATIENCE
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["replicas"]

    def reaches(self, wanted) -> list[dict]:
        """Wait until the replicas are as wanted."""
        end = time.monotonic() + PATIENCE
        while not wanted(found := self.replicas()):
            assert time.monotonic() < end, found
            time.sleep(0.1)
        return found


@pytest.fixture(scope="module")
def endpoint(local_ray, tmp_path_factory):
    from ray import serve

    from stateset_ray.serving.app import build

    folder = tmp_path_factory.mktemp("serving")
    keys = folder / "keys.json"
    settings = ServeSettings(
        source=str(new_run(folder / "shop", 512, f"environment.path={SHOP}")),
        agent=AgentSettings(enabled=True, tools=("lookup",)),
        conversations=ConversationSettings(store=f"sqlite:///{folder / 'kept.db'}"),
        policy=PolicySettings(replicas=2, threads=1, slots=4, ongoing=4, queued=4),
        swap=SwapSettings(poll_seconds=0.2),
        rates=RateSettings(requests="100000/minute", concurrent=1000),
        security=SecuritySettings(keys_file=keys),
        transcripts=TranscriptSettings(folder=folder / "transcripts", share=1),
    )
    made = Endpoint("", add_key(keys, "shop"), add_key(keys, "boss", admin=True), folder / "shop", keys)
    port = free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        proxy_location="HeadOnly",
        logging_config=SERVE_LOGGING,
    )
    serve.run(build(settings), name="policy", route_prefix="/")
    made.url = f"http://127.0.0.1:{port}"
    yield made
    serve.shutdown()


@contextmanager
def load(endpoint: Endpoint, clients: int = 4, **more):
    """Clients that ask without a pause; gives what they were told, by version or by error."""
    told: Counter[str] = Counter()
    over = threading.Event()

    def ask(number: int) -> None:
        with endpoint.client() as ai:
            while not over.is_set():
                try:
                    answer = ai.chat.completions.create(
                        model="shop", messages=HI, extra_headers={"x-session-id": str(number)},
                        **{"max_tokens": 20} | more,
                    )  # fmt: skip
                    told[str(answer.system_fingerprint)[:13]] += 1
                except Exception as error:
                    told[f"failed: {type(error).__name__}: {error}"] += 1

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, number) for number in range(clients)]
        try:
            yield told
        finally:
            over.set()
            for one in asking:
                one.result(timeout=PATIENCE)


def failed(told: Counter[str]) -> dict[str, int]:
    return {what: count for what, count in told.items() if what.startswith("failed")}


def test_the_openai_client_unmodified(endpoint):
    with endpoint.client() as ai:
        assert [model.id for model in ai.models.list()] == ["shop"]
        assert ai.models.retrieve("shop").id == "shop"
        answer = ai.chat.completions.with_raw_response.create(
            model="shop", messages=HI, max_tokens=6, seed=5, n=2, logprobs=True
        )
        assert len(answer.headers.get_list("x-request-id")) == 1
        whole = answer.parse()
        assert whole.system_fingerprint == answer.headers["x-policy-version"]
        assert whole.system_fingerprint.startswith("step-00000001-")
        assert whole.usage.completion_tokens == sum(len(c.logprobs.content) for c in whole.choices)
        again = ai.chat.completions.create(model="shop", messages=HI, max_tokens=6, seed=5, n=2)
        assert [c.message for c in again.choices] == [c.message for c in whole.choices]
        stream = ai.chat.completions.create(
            model="shop", messages=HI, max_tokens=6, seed=5, n=2, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        assert chunks[-1].usage == whole.usage
        for choice in whole.choices:
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
            assert mine[-1].finish_reason == choice.finish_reason
        long = ai.chat.completions.create(model="shop", messages=HI, max_tokens=40, seed=1).choices[0].message
        stop = long.content[8]
        cut = ai.chat.completions.create(model="shop", messages=HI, max_tokens=40, seed=1, stop=stop).choices[
            0
        ]
        assert (cut.message.content, cut.finish_reason) == (long.content.partition(stop)[0].strip(), "stop")


def test_every_error_is_in_one_shape(endpoint):
    with endpoint.client() as ai:
        for error, code, more in (
            (openai.BadRequestError, "unsupported_parameter", {"presence_penalty": 0.5}),
            (openai.BadRequestError, "unknown_parameter", {"extra_body": {"topk": 5}}),
            (openai.BadRequestError, "context_length_exceeded", {"max_tokens": 1000}),
            (openai.NotFoundError, "model_not_found", {"model": "x"}),
            (
                openai.BadRequestError, "unsupported_header",
                {"extra_headers": {"x-request-timeout-seconds": "0"}},
            ),
        ):  # fmt: skip
            with pytest.raises(error) as caught:
                ai.chat.completions.create(**{"model": "shop", "messages": HI} | more)
            assert caught.value.code == code
            assert caught.value.request_id
    with pytest.raises(openai.AuthenticationError), endpoint.client("sk-wrong-key-of-someone") as stranger:
        stranger.models.list()
    with httpx2.Client(base_url=endpoint.url, timeout=PATIENCE) as web:
        for path in ("/healthz", "/readyz", "/health", "/health/live", "/health/ready"):
            assert web.get(path).status_code == 200
        assert web.get("/readyz").json()["version"].startswith("step-00000001-")
        assert web.get("/v1/models").json()["error"]["code"] == "missing_api_key"
        web.headers |= {"authorization": f"Bearer {endpoint.key}", "content-type": "application/json"}
        bad = web.post("/v1/chat/completions", content=b'{"model": "shop", "messages": [')
        assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_json")
        large = web.post("/v1/chat/completions", content=b" " * (2 << 20))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        assert web.get("/admin/weights").status_code == 403
        assert web.get("/openapi.json").json()["paths"]["/v1/chat/completions"]


def test_a_request_has_one_line_in_the_logs(endpoint):
    """The gate's, of all that proxy, ingress and policy could write; Serve tells a console, too."""
    from ray._private.worker import _global_node

    logs, mark = Path(_global_node.get_session_dir_path()) / "logs", "line-of-a-request"

    def lines() -> list[str]:
        files = [file for file in logs.rglob("*") if file.is_file()]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        return [line for text in texts for line in text.splitlines() if mark in line]

    with endpoint.client() as ai:
        ai.chat.completions.create(
            model="shop", messages=HI, max_tokens=4, extra_headers={"x-request-id": mark}
        )
    end = time.monotonic() + PATIENCE
    while not (found := [json.loads(line) for line in lines() if line.startswith("{")]):
        assert time.monotonic() < end, lines()
        time.sleep(0.1)
    assert [line["request_id"] for line in found] == [mark], found
    assert all(found[0]["message"] in line for line in lines())


def test_what_was_trained_is_what_is_served(endpoint):
    """Greedy replies over two turns: those of an engine that is asked as a rollout asks it."""
    folder = str(endpoint.run / "checkpoints" / "step-00000001")
    hardware = choose_hardware(ModelConfig(threads=1, device="cpu"), gpus=0)
    renderer = Renderer(load_tokenizer(folder))
    engine = TransformersEngine(
        load_model(folder, hardware), renderer.stop_ids, slots=2, max_context=512, hardware=hardware
    )

    async def play() -> list[str]:
        said = [Message("user", "hi")]
        ids: tuple[int, ...] = renderer.opening(said)
        texts = []
        for words in ("and?", ""):
            reply = await engine.reply(ReplyRequest("r", ids, (), 24, 0.0, 0))
            texts.append(renderer.text(reply.token_ids))
            said += [Message("assistant", texts[-1]), Message("user", words)]
            ids = (*ids, *reply.token_ids)
            more, _ = renderer.next_prompt(ids, said, 1, stopped=reply.finish == "stop")
            ids = (*ids, *more)
        await engine.close()
        return texts

    wanted = asyncio.run(play())
    talk = list(HI)
    with endpoint.client() as ai:
        for text, words in zip(wanted, ("and?", ""), strict=True):
            answer = ai.chat.completions.create(
                model="shop", messages=talk, max_tokens=24, temperature=0, prompt_cache_key="identity"
            )
            assert answer.choices[0].message.content == text
            talk += [{"role": "assistant", "content": text}, {"role": "user", "content": words}]


def test_every_ingress_replica_has_the_same_conversations(endpoint):
    said = ["hi"]
    with endpoint.client() as ai:
        made = ai.conversations.create(items=[{"type": "message", "role": "user", "content": "hi"}])
    for place in range(4):
        with endpoint.client() as ai:  # another connection, and so perhaps another replica
            answer = ai.chat.completions.create(
                model="shop", messages=[{"role": "user", "content": f"and {place}?"}], max_tokens=4,
                extra_body={"conversation": made.id},
            )  # fmt: skip
            said += [f"and {place}?", answer.choices[0].message.content]
            page = ai.conversations.items.list(made.id, order="asc")
            assert [item.content[0].text for item in page.data] == said
    with endpoint.client(endpoint.admin) as boss, pytest.raises(openai.NotFoundError):
        boss.conversations.retrieve(made.id)


def test_texts_and_agents_are_served_too(endpoint):
    with endpoint.client() as ai:
        asked = {"model": "shop", "max_tokens": 6, "temperature": 0}
        alone = [ai.completions.create(prompt=text, **asked).choices[0].text for text in ("hi", "and?")]
        both = ai.completions.create(prompt=["hi", "and?"], logprobs=2, **asked)
        assert [choice.text for choice in both.choices] == alone
    with endpoint.client(below="/agent") as stranger, pytest.raises(openai.PermissionDeniedError):
        stranger.chat.completions.create(model="shop", messages=HI)
    desk = add_key(endpoint.keys, "desk", agent=True)
    with endpoint.client(desk, "/agent") as agent:
        offered = agent.get("/tools", cast_to=dict)
        assert [tool["name"] for tool in offered["data"]] == ["lookup"]
        answer = agent.chat.completions.create(model="shop", messages=HI, max_tokens=4)
        assert (answer.steps, answer.stopped) == ([], None)
        assert answer.system_fingerprint.startswith("step-00000001-")


def test_a_session_stays_with_its_replica(endpoint):
    before = {r["pid"]: r["sampled"] for r in endpoint.replicas()}
    with endpoint.client() as ai:
        for _ in range(6):
            ai.chat.completions.create(
                model="shop", messages=HI, max_tokens=3, extra_headers={"x-session-id": "one"}
            )
    grew = [r["pid"] for r in endpoint.replicas() if r["sampled"] > before[r["pid"]]]
    assert len(grew) == 1


def test_a_client_that_leaves_frees_its_slot(endpoint):
    sampled = sum(r["sampled"] for r in endpoint.replicas())
    with endpoint.client() as ai:
        stream = ai.chat.completions.create(model="shop", messages=HI, max_tokens=480, n=4, stream=True)
        next(iter(stream))
        stream.close()
    found = endpoint.reaches(lambda replicas: all(r["running"] == 0 and r["tokens"] == 0 for r in replicas))
    assert sum(r["sampled"] for r in found) - sampled < 4 * 480


def test_overload_is_refused_and_the_rest_answered(endpoint):
    """48 at once, where 2 replicas take 4 each and 2 ingress replicas let 4 each wait."""

    def ask(_: int) -> str:
        with endpoint.client() as ai:
            try:
                ai.chat.completions.create(model="shop", messages=HI, max_tokens=300)
            except openai.RateLimitError as error:
                headers = error.response.headers
                return f"{error.code} {headers['retry-after']} {headers['content-type']}"
            return "answered"

    with ThreadPoolExecutor(48) as pool:
        told = Counter(pool.map(ask, range(48)))
    assert set(told) == {"answered", "overloaded 1 application/json"}, told
    assert told["answered"] >= 8


def test_checkpoints_are_taken_over_under_load_without_a_failed_request(endpoint):
    with load(endpoint) as told:
        for step in (2, 3):
            save(endpoint.run, step, 1 + step / 100)
            endpoint.reaches(lambda replicas: all(r["step"] == step for r in replicas))  # noqa: B023
        bad = save(endpoint.run, 4, float("nan"))
        found = endpoint.reaches(lambda replicas: all(r["problem"] for r in replicas))
        assert {r["step"] for r in found} == {3}
        shutil.rmtree(bad)
        web = httpx2.Client(base_url=endpoint.url, headers={"authorization": f"Bearer {endpoint.admin}"})
        assert web.post("/admin/weights", json={"checkpoint": "step-00000001"}).status_code == 200
        endpoint.reaches(lambda replicas: all(r["step"] == 1 for r in replicas))
        assert web.post("/admin/weights", json={"checkpoint": None}).status_code == 200
    assert not failed(told)
    assert {"step-00000001", "step-00000002", "step-00000003"} <= set(told), told
    assert "step-00000004" not in told


def test_a_canary_is_tried_promoted_and_taken_back_without_a_failed_request(endpoint):
    """Through the routes, on two replicas; each session is answered by one version until it is promoted."""
    web = httpx2.Client(base_url=endpoint.url, headers={"authorization": f"Bearer {endpoint.admin}"})
    web.timeout = PATIENCE
    assert web.post("/admin/weights", json={"checkpoint": "step-00000001"}).status_code == 200
    endpoint.reaches(lambda replicas: all(r["step"] == 1 for r in replicas))
    save(endpoint.run, 5, 1.05)
    versions: dict[str, set[str]] = {}
    with load(endpoint) as told, endpoint.client() as ai:
        started = web.post("/admin/canary", json={"checkpoint": "step-00000005", "share": 0.5})
        assert started.json()["canary"] == {"checkpoint": "step-00000005", "share": 0.5}
        endpoint.reaches(lambda replicas: all(r["canary"] for r in replicas))
        for number in range(16):
            answer = ai.chat.completions.create(
                model="shop", messages=HI, max_tokens=2, prompt_cache_key=f"c{number % 8}"
            )
            versions.setdefault(f"c{number % 8}", set()).add(str(answer.system_fingerprint)[:13])
        counted = [r["versions"] for r in endpoint.replicas()]
        assert web.post("/admin/promote", json={}).json()["checkpoint"] == "step-00000005"
        endpoint.reaches(lambda replicas: all(r["step"] == 5 and not r["canary"] for r in replicas))
        assert web.post("/admin/rollback", json={}).json()["checkpoint"] == "step-00000001"
        endpoint.reaches(lambda replicas: all(r["step"] == 1 for r in replicas))
        assert web.post("/admin/weights", json={"checkpoint": None}).status_code == 200
    assert not failed(told)
    assert all(len(found) == 1 for found in versions.values()), versions
    assert set.union(*versions.values()) == {"step-00000001", "step-00000005"}
    answered = {name[:13] for tallies in counted for name, tally in tallies.items() if tally["answered"]}
    assert {"step-00000001", "step-00000005"} <= answered


def test_what_was_said_is_logged_and_can_be_replayed(endpoint):
    talk = [{"role": "user", "content": "write to jo@shop.example"}]
    with endpoint.client() as ai:
        for _ in range(2):
            answer = ai.chat.completions.create(
                model="shop", messages=talk, max_tokens=5, temperature=0, prompt_cache_key="logged"
            )
            reply = answer.choices[0].message.content
            talk += [{"role": "assistant", "content": reply}, {"role": "user", "content": "and?"}]
    folder = endpoint.keys.parent / "transcripts"
    end = time.monotonic() + PATIENCE
    while len(found := [r for r in lines(folder) if "[email]" in r["messages"][0]["content"]]) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    last = max(found, key=lambda record: len(record["messages"]))
    assert [m["content"] for m in last["messages"]] == ["write to [email]", talk[1]["content"], "and?"]
    assert last["replies"][0]["content"] == talk[3]["content"]
    assert (last["key"], last["version"]) == ("shop", answer.system_fingerprint)
    assert not any(endpoint.key in path.read_text() for path in folder.iterdir())


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def test_a_replica_is_killed_without_a_failed_request(endpoint):
    endpoint.reaches(lambda replicas: len(replicas) == 2)
    with load(endpoint) as told:
        victim = endpoint.replicas()[0]["pid"]
        while sum(told.values()) < 8:
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        endpoint.reaches(lambda replicas: len(replicas) == 2 and all(r["pid"] != victim for r in replicas))
        count = sum(told.values())
        while sum(told.values()) < count + 8:
            time.sleep(0.01)
    assert not failed(told)


@pytest.mark.slow
def test_replicas_follow_the_load(endpoint):
    """Live, up and down, by the tokens that wait; a second application below a prefix of its own."""
    from ray import serve

    from stateset_ray.serving.app import build

    settings = ServeSettings(
        source=str(endpoint.run / "checkpoints" / "step-00000001"),
        policy=PolicySettings(threads=1, slots=2),
        ingress_replicas=1,
        security=SecuritySettings(keys_file=endpoint.keys),
        autoscaling=AutoscalingSettings(
            max_replicas=2, target_tokens=50, upscale_delay=0, downscale_delay=0.5, interval=0.5
        ),
    )
    serve.run(build(settings), name="busy", route_prefix="/busy")
    busy = replace(endpoint, url=f"{endpoint.url}/busy")
    assert len(busy.replicas()) == 1
    with load(busy, max_tokens=400) as told:
        busy.reaches(lambda replicas: len(replicas) == 2)
    busy.reaches(lambda replicas: len(replicas) == 1)
    assert not failed(told)
    serve.delete("busy")


@pytest.mark.slow
def test_nobody_there_and_the_next_request_waits_for_one(endpoint):
    """Scaling to zero, live; health checks keep no replica awake."""
    from ray import serve

    from stateset_ray.serving.app import build

    settings = ServeSettings(
        source=str(endpoint.run / "checkpoints" / "step-00000001"),
        policy=PolicySettings(threads=1, slots=2),
        ingress_replicas=1,
        security=SecuritySettings(keys_file=endpoint.keys),
        autoscaling=AutoscalingSettings(
            min_replicas=0, max_replicas=1, target_tokens=50, upscale_delay=0, downscale_delay=2, interval=0.5
        ),
    )
    serve.run(build(settings), name="idle", route_prefix="/idle")
    idle = replace(endpoint, url=f"{endpoint.url}/idle")
    end = time.monotonic() + PATIENCE
    while (ready := httpx2.get(f"{idle.url}/readyz", timeout=PATIENCE)).json().get("version") != "asleep":
        assert time.monotonic() < end, ready.text
        time.sleep(0.2)
    assert ready.status_code == 200
    assert idle.replicas() == []
    with idle.client() as ai:
        answer = ai.chat.completions.create(model="shop", messages=HI, max_tokens=3)
        assert answer.usage.completion_tokens == 3
    idle.reaches(lambda replicas: not replicas)
    serve.delete("idle")


@pytest.mark.slow
def test_the_command_serves_and_drains(tmp_path):
    """`stateset-ray serve --tls` in a process of its own: SIGTERM lets the stream under way end."""
    pytest.importorskip("cryptography")
    certificate, key = _CERTIFICATE["write_certificate"](tmp_path)
    run, port = new_run(tmp_path / "shop", 512), free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "TQDM_DISABLE": "1"}
    environment.pop("RAY_ADDRESS", None)
    environment.pop("STATESET_RAY_API_KEYS", None)
    command = [sys.executable, "-m", "stateset_ray.cli", "serve", str(run), "--port", str(port)]
    command += ["--tls", str(certificate), str(key)]
    trusted = ssl.create_default_context(cafile=str(certificate))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if f"https://127.0.0.1:{port}/v1" in line:
                    break
            web = openai.DefaultHttpxClient(verify=trusted)
            ai = openai.OpenAI(
                base_url=f"https://127.0.0.1:{port}/v1", api_key="none", max_retries=0, http_client=web
            )
            assert "content-security-policy" in web.get(f"https://127.0.0.1:{port}/").headers
            with pytest.raises(httpx2.HTTPError):  # neither without TLS, nor by whom nobody vouches for
                httpx2.get(f"http://127.0.0.1:{port}/healthz")
            with pytest.raises(httpx2.ConnectError, match="certificate"):
                httpx2.get(f"https://127.0.0.1:{port}/healthz")
            stream = iter(
                ai.chat.completions.create(model="shop", messages=HI, max_tokens=480, seed=1, stream=True)
            )
            chunks = [next(stream)]
            os.kill(process.pid, signal.SIGTERM)
            chunks += list(stream)
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")
            assert process.wait(PATIENCE) == 0
        finally:
            if process.poll() is None:
                process.kill()
    with pytest.raises(openai.APIConnectionError):
        ai.models.list()
