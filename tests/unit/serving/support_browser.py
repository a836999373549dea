"""A real browser for tests: Debian's chromium, asked through its own protocol."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Tab:
    """One page; `said` has what it wrote to its console, and what its policy has kept it from."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.said: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async for message in self._socket:
            body = json.loads(message.data)
            if body.get("method") in (
                "Runtime.consoleAPICalled",
                "Runtime.exceptionThrown",
                "Log.entryAdded",
            ):
                self.said.append(json.dumps(body["params"]))
            if body.get("id") == number:
                assert "error" not in body, body
                return body["result"]
        raise AssertionError("the browser has gone")

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> Any:
        """Wait until an expression holds."""
        async with asyncio.timeout(30):
            while not (found := await self.run(f"Boolean({script})")):
                await asyncio.sleep(0.05)
        return found


@asynccontextmanager
async def browser(folder: Path, url: str) -> AsyncIterator[Tab]:
    """A tab at a URL, in a browser of its own that is gone afterwards."""
    assert CHROMIUM
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--remote-debugging-port=0", f"--user-data-dir={folder}")  # fmt: skip
    process = subprocess.Popen(
        [CHROMIUM, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = folder / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not (port.is_file() and port.read_text().strip()):
                assert process.poll() is None, "the browser did not start"
                await asyncio.sleep(0.05)
        where = f"http://127.0.0.1:{port.read_text().split()[0]}"
        async with aiohttp.ClientSession() as web:
            async with web.get(f"{where}/json") as answer:
                pages = await answer.json()
            [page] = [page for page in pages if page["type"] == "page"]
            async with web.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.navigate", url=url)
                await tab.until("document.readyState === 'complete' && location.href !== 'about:blank'")
                yield tab
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
