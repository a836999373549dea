"""Following a job over connections that break: a server that speaks Ray's routes, and breaks them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from stateset_ray.errors import ClusterError
from stateset_ray.job_client import Job, JobClient

PRINTED = "one\ntwo\nthree\nfour\n"


class Head:
    """The routes of a head node for one job, which prints `PRINTED`.

    Args:
        tails: for each connection that follows the log, how many characters come before it breaks; None ends
            it properly, after the job has ended.
    """

    def __init__(self, tails: list[int | None]) -> None:
        self.tails = list(tails)
        self.over = False
        self.failing = 0  # questions after the status that are answered with an error

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get("/api/version", self.version)
        application.router.add_get("/api/jobs/a", self.job)
        application.router.add_get("/api/jobs/a/logs", self.logs)
        application.router.add_get("/api/jobs/a/logs/tail", self.tail)
        return application

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        )

    async def job(self, _: web.Request) -> web.Response:
        if self.failing:
            self.failing -= 1
            return web.Response(status=500, text="the head restarts")
        status = "SUCCEEDED" if self.over else "RUNNING"
        details = {"type": "SUBMISSION", "submission_id": "a", "status": status, "entrypoint": "train"}
        return web.json_response(details)

    async def logs(self, _: web.Request) -> web.Response:
        return web.json_response({"logs": PRINTED})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        length = self.tails.pop(0)
        self.over = self.over or not self.tails
        if length is None:
            for line in PRINTED.splitlines(keepends=True):
                await socket.send_str(line)
            await socket.close()
            return socket
        await socket.send_str(PRINTED[:length])
        self.failing = 2
        assert request.transport is not None
        request.transport.abort()
        return socket


@pytest.fixture
def serve() -> Iterator[object]:
    """A function that serves a head and gives its address."""
    loops: list[asyncio.AbstractEventLoop] = []

    def start(head: Head) -> str:
        loop = asyncio.new_event_loop()
        loops.append(loop)
        threading.Thread(target=loop.run_forever, daemon=True).start()

        async def up() -> str:
            runner = web.AppRunner(head.application())
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            return "http://127.0.0.1:%d" % runner.addresses[0][1]  # noqa: UP031

        return asyncio.run_coroutine_threadsafe(up(), loop).result(20)

    yield start
    for loop in loops:
        loop.call_soon_threadsafe(loop.stop)


@pytest.mark.parametrize("tails", [[None], [0, 9, None], [4, 8]], ids=lambda t: "-".join(map(str, t)))
def test_every_line_is_printed_once_however_often_the_connection_breaks(serve, tails) -> None:  # type: ignore[no-untyped-def]
    client = JobClient(serve(Head(tails)))
    printed: list[str] = []
    told: list[str] = []
    job = client.follow("a", printed.append, lambda job: told.append(job.status))
    assert "".join(printed) == PRINTED
    assert (job.status, job.exit_code, told[-1]) == ("SUCCEEDED", 0, "SUCCEEDED")


def test_waiting_goes_on_over_a_head_that_restarts(serve) -> None:  # type: ignore[no-untyped-def]
    head = Head([])
    head.failing, head.over = 2, True
    told: list[Job] = []
    assert JobClient(serve(head)).wait("a", told.append).over
    assert [job.status for job in told] == ["SUCCEEDED"]


def test_an_error_of_the_server_is_told_in_one_sentence(serve) -> None:  # type: ignore[no-untyped-def]
    head = Head([])
    head.failing = 1
    with pytest.raises(ClusterError, match=r"cannot be asked: .*500.*the head restarts"):
        JobClient(serve(head)).look("a")


class Known(JobClient):
    """Asks nobody."""

    def __init__(self, *jobs: Job) -> None:
        self.address = "nowhere"
        self._known = list(jobs)

    def jobs(self) -> list[Job]:
        return self._known


def test_a_name_that_may_mean_two_jobs_means_none() -> None:
    second, other = Job("demo-2", "demo", 2, "RUNNING"), Job("demo-2-2", "demo-2", 2, "RUNNING")
    assert Known(Job("demo", "demo", 1, "FAILED"), second).latest("demo") == second
    assert Known(second).latest("demo-2") == second
    with pytest.raises(ClusterError, match="also attempt 2 of the run 'demo'"):
        Known(second, other).latest("demo-2")
    assert Known(second, other).latest("demo-2-2") == other
