"""Requests made up from the endpoint's own OpenAPI document: none makes the server fail."""

from __future__ import annotations

import runpy
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from stateset_ray.serving.settings import (
    AgentSettings,
    ConversationSettings,
    LimitSettings,
    PolicySettings,
    RateSettings,
)

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed (pip install schemathesis)"
)
uvicorn = pytest.importorskip("uvicorn")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_HERE = Path(__file__)
_SUPPORT = runpy.run_path(str(_HERE.with_name("support_endpoint.py")))
_RUNS = runpy.run_path(str(_HERE.with_name("support_checkpoints.py")))
_CHAT = {"model": "shop", "messages": [{"role": "user", "content": "hi"}], "n": 1, "max_tokens": 4}
_ASKED = {
    "/v1/chat/completions": _CHAT,
    "/v1/agent/chat/completions": _CHAT,
    "/v1/completions": {"model": "shop", "prompt": "hi", "n": 1, "max_tokens": 4},
}
_DROPPED = {"max_completion_tokens", "stop", "seed", "stream_options", "tool_choice", "conversation"}
_DROPPED |= {"logprobs", "top_logprobs", "tools"}
_SHOP = "stateset_ray.environments.customer_service:CustomerService"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("openapi")


@pytest.fixture(scope="module")
def url(hardware, folder):
    """Everything that can be switched on, behind a real server."""
    from stateset_ray.serving.held_policy import load_policy
    from stateset_ray.serving.meters import Meters
    from stateset_ray.serving.source import Candidate

    class Nowhere:
        def __getattr__(self, name):
            return lambda *_, **__: None

    made = _SUPPORT["SETTINGS"].model_copy(
        update={
            "source": str(_RUNS["new_run"](folder / "shop", 512, f"environment.path={_SHOP}")),
            "policy": PolicySettings(slots=4, max_reply_tokens=4),
            "limits": LimitSettings(),
            "rates": RateSettings(requests="1000000/minute"),
            "agent": AgentSettings(enabled=True, turns=2),
            "conversations": ConversationSettings(store=f"sqlite:///{folder / 'kept.db'}", per_key=10**6),
        }
    )
    held = load_policy(Candidate("tiny", "tiny-1", -1), made, hardware, 512, None)
    gate = _SUPPORT["gate"](_SUPPORT["Local"](held), Meters(lambda metric: Nowhere()), made)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(gate, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def document(url):
    key = {"authorization": f"Bearer {_SUPPORT['ROOT']}"}
    return schemathesis.openapi.from_url(f"{url}/openapi.json", headers=key)


def test_no_request_is_a_failure_of_the_server(document):
    key = {"authorization": f"Bearer {_SUPPORT['ROOT']}"}
    tried, told = [], Counter()

    def check(case):
        look(case)
        if case.path in _ASKED and isinstance(case.body, dict):
            # Hardly any body that is made up from a schema is answered: once more, with the usual mistakes
            # put right.
            case.body = {k: v for k, v in case.body.items() if k not in _DROPPED} | _ASKED[case.path]
            look(case)

    def look(case):
        answer = case.call(headers=key)
        told[case.path, answer.status_code] += 1
        assert answer.status_code < 500, (case.method, case.path, answer.text)
        kind = answer.headers["content-type"][0].partition(";")[0]
        assert kind in ("application/json", "text/event-stream")
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        if kind == "text/event-stream":
            assert answer.text.rstrip().endswith("data: [DONE]")
            assert '"type":"server_error"' not in answer.text

    how = settings(
        max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    for found in document.get_all_operations():
        operation = found.ok()
        how(given(case=operation.as_strategy())(check))()
        tried.append(operation.path)
    assert {"/v1/completions", "/v1/agent/chat/completions", "/v1/conversations/{id}/items"} <= set(tried)
    assert all(told[path, 200] > 5 for path in _ASKED), ("what was never answered was not tried", told)
