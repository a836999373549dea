"""The page at `/`: its headers, and what it does in a real browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import runpy
import socket
import subprocess
import sys
import zipfile
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import httpx2
import pytest
import uvicorn

from stateset_ray.serving.events import Began, Ended, Piece
from stateset_ray.serving.gate import Gate
from stateset_ray.serving.rates import Rates
from stateset_ray.serving.routes import routes
from stateset_ray.serving.security import KeyRing, digest
from stateset_ray.serving.settings import KeyEntry, SecuritySettings, ServeSettings

support = runpy.run_path(str(Path(__file__).with_name("support_browser.py")))
ROOT = Path(__file__).parents[3]
KEY = "k" * 32
EVIL = "<img src=x onerror='document.title=1'><script>document.title=2</script>\n\ndata: [DONE]"
HTML = resources.files("stateset_ray.serving").joinpath("page.html").read_text(encoding="utf-8")


class Scripted:
    """Policies that repeat what was said, piece by piece; implements `Policies`."""

    def __init__(self) -> None:
        self.asked = []
        self.left = 0
        self.slow = asyncio.Event()
        self.slow.set()

    async def ask(self, ask):
        self.asked.append(ask)
        try:
            yield (Began("step-00000007-abcd", 3),)
            words = ask.messages[-1].content
            for place in range(0, len(words), 5):
                yield (Piece(0, words[place : place + 5]),)
                await self.slow.wait()
            yield (Ended(0, "stop", 12),)
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    async def status(self):
        return {"version": "step-00000007-abcd"}

    async def statuses(self):
        return []


def made(meters, policies=None, **more):
    security = SecuritySettings(keys=(KeyEntry(name="shop", sha256=digest(KEY)),))
    settings = ServeSettings(source="tiny", security=security, **more)
    return Gate(
        routes(settings, policies, meters), KeyRing(settings.security, {}), Rates(settings.rates), settings,
        meters,
    )  # fmt: skip


async def got(gate, path, method="GET"):
    transport = httpx2.ASGITransport(app=gate)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as web:
        return await web.request(method, path)


def test_its_headers(meters):
    async def play():
        answer = await got(made(meters), "/")
        assert (answer.status_code, answer.text) == (200, HTML)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
            assert policy[name] == "'none'"
        assert policy["connect-src"] == "'self'"
        for name, tag in (("script-src", "script"), ("style-src", "style")):
            [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
            wanted = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert policy[name] == f"'sha256-{wanted}'"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert (await got(made(meters), "/", "POST")).status_code == 405
        assert (await got(made(meters), "/page.html")).status_code == 401

    asyncio.run(play())


def test_it_can_be_left_out(meters):
    answer = asyncio.run(got(made(meters, page=False), "/"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key")


def test_it_asks_nobody_else_and_keeps_nothing():
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert not {"src", "href", "style", "action", "srcdoc"} & {name for name, _ in attrs}, tag
            assert not any(name.startswith("on") for name, _ in attrs), tag
            assert tag not in ("iframe", "object", "embed", "link", "base")

    Reader().feed(HTML)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(",
                 "localStorage", "sessionStorage", "indexedDB", "document.cookie", "://"):  # fmt: skip
        assert word not in HTML


def test_the_wheel_has_it(tmp_path):
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    assert "stateset_ray/serving/page.html" in zipfile.ZipFile(wheel).namelist()


@asynccontextmanager
async def listening(gate):
    """A real server on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(gate, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    )
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(30):
            while not server.started:
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        await task


def say(text):
    return f"(() => {{ at('text').value = {text!r}; at('form').requestSubmit(); return true }})()"


IDLE = "running === null"


@pytest.mark.skipif(not support["CHROMIUM"], reason="there is no chromium here: apt-get install chromium")
def test_in_a_real_browser(meters, tmp_path):
    async def play():
        policies = Scripted()
        async with listening(made(meters, policies)) as url, support["browser"](tmp_path, url) as tab:
            # Without a key
            await tab.run(say("hi"))
            await tab.until("document.querySelector('.error')")
            assert "API key" in await tab.run("document.querySelector('.error').textContent")
            assert not policies.asked
            # With one, typed by the user
            await tab.run(f"(() => {{ fresh(); at('key').value = '{KEY}'; return true }})()")
            await tab.until(IDLE)
            await tab.run(say("Where is my parcel?"))
            await tab.until(IDLE + " && document.querySelectorAll('.assistant').length === 1")
            assert await tab.run("document.querySelector('.assistant').textContent") == "Where is my parcel?"
            assert await tab.run("at('model').textContent") == "tiny"
            assert await tab.run("at('version').textContent") == "step-00000007-abcd"
            assert await tab.run("at('tokens').textContent") == "12"
            assert float(await tab.run("at('speed').textContent")) > 0
            # What is said stays text
            await tab.run(
                f"(() => {{ at('text').value = {EVIL!r}; at('form').requestSubmit(); return true }})()"
            )
            await tab.until(IDLE + " && document.querySelectorAll('.assistant').length === 2")
            shown = await tab.run("document.querySelectorAll('.assistant')[1].textContent")
            assert shown == EVIL
            assert await tab.run("document.querySelectorAll('#talk *:not(li)').length") == 0
            assert await tab.run("document.title") == "stateset_ray"
            # It is one conversation
            first, second = policies.asked
            assert [m.content for m in second.messages[:2]] == ["Where is my parcel?"] * 2
            assert first.session == second.session != ""
            # Stopping stops the policy
            policies.slow.clear()
            await tab.run(say("one two three"))
            await tab.until("document.querySelectorAll('.assistant').length === 3")
            await tab.run("(() => { at('stop').click(); return true })()")
            await tab.until(IDLE)
            async with asyncio.timeout(30):
                while not policies.left:
                    await asyncio.sleep(0.01)
            policies.slow.set()
            await tab.run("(() => { at('fresh').click(); return true })()")
            await tab.run(say("again"))
            await tab.until(IDLE + " && document.querySelectorAll('.assistant').length === 1")
            assert [m.content for m in policies.asked[-1].messages] == ["again"]
            assert policies.asked[-1].session != first.session
            # The key is nowhere but in its field, and nothing was kept from the page by its own policy
            assert KEY not in await tab.run("document.documentElement.outerHTML")
            kept = (
                "JSON.stringify([document.cookie, localStorage.length, sessionStorage.length, location.href])"
            )
            assert await tab.run(kept) == f'["",0,0,"{url}"]'.replace(",", ",")
            assert not [line for line in tab.said if "Content Security Policy" in line or "exception" in line]
            # What came from elsewhere would not run
            await tab.run(
                "(() => { const s = document.createElement('script');"
                " try { s.textContent = 'document.title = 3' } catch { return true };"
                " document.body.append(s); return true })()"
            )
            assert await tab.run("document.title") == "stateset_ray"

    asyncio.run(play())
