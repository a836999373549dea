"""The job server of a Ray cluster: what it is asked, with a limit on every answer and errors in our words.

A Ray job is a command that a cluster runs (`ray job submit`). Several jobs may bear the name of one run: its
*attempts*, of which at most one runs. Ray is loaded when a server is asked, not before.

Who waits: a caller for the server, seconds per request; `follow` and `wait` for the job, as long as it runs
and the server can be reached at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stateset_ray.errors import ClusterError, ConfigError

__all__ = ["Job", "JobClient", "dashboard_address"]

_logger = logging.getLogger(__name__)
_DEFAULT = "http://127.0.0.1:8265"
_LIMITS = (3.0, 5.0)  # seconds to connect, and for the first answer
_PATIENCE = (3.0, 60.0)  # the same once the server has answered: it may wait for an agent, or take an upload
_LOST = 60.0  # seconds without an answer after which following is given up
_EVERY = 1.0  # seconds between two looks at a job
_SILENT = 10.0  # seconds without a line after which the job is looked at
_NAME, _ATTEMPT, _SETTINGS = "stateset_ray.name", "stateset_ray.attempt", "stateset_ray.settings"


@dataclass(frozen=True)
class Job:
    """A job as its server describes it.

    Attributes:
        id: what it is called there: the name, with a number from the second attempt on.
        name: of the run; of a job that others submitted, its id.
        attempt: 1 for the first.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: why it is so, in the server's words.
        settings: a digest of the configuration.
        started, ended: seconds since 1970; 0 where that has not happened.
        driver_exit: of the command; None while it runs, or where nobody knows.
    """

    id: str
    name: str
    attempt: int
    status: str
    message: str = ""
    settings: str = ""
    started: float = 0.0
    ended: float = 0.0
    driver_exit: int | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int:
        """0 if it succeeded, 2 if it said that its configuration is wrong, else 1."""
        if self.status == "SUCCEEDED":
            return 0
        return 2 if self.driver_exit == 2 else 1

    @property
    def seconds(self) -> float:
        """How long it has run, until now or its end."""
        return max(0.0, (self.ended or time.time()) - self.started) if self.started else 0.0


def dashboard_address(given: str = "") -> str:
    """The address of the dashboard, which takes the jobs of a cluster.

    Args:
        given: as `--address`; else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else this machine.

    Raises:
        ConfigError: it is of another kind.

    Example:
        >>> dashboard_address("head:8265")
        'http://head:8265'
    """
    where = given or os.environ.get("RAY_API_SERVER_ADDRESS", "") or os.environ.get("RAY_ADDRESS", "")
    address = _DEFAULT if where in ("", "auto", "local") else where
    if "://" not in address:
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        right = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80) != 6379
    except ValueError:
        right = False
    if not right:
        raise ConfigError(
            "jobs are taken by the dashboard of a cluster, and this is not the address of one", given=where,
            mend="give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS",
        )  # fmt: skip
    return address.rstrip("/")


class JobClient:
    """What can be asked of a job server.

    Args:
        address: see `dashboard_address`.

    Raises:
        ClusterError: it does not answer, or refuses the token. All methods raise it so, and where there is no
            such job.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with self._told():
            self._client = _connect(address)

    def jobs(self) -> list[Job]:
        """All jobs that were submitted, oldest first."""
        with self._told():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: (job.started or float("inf"), job.attempt))

    def attempts(self, name: str) -> list[Job]:
        """The jobs of a name, the first attempt first."""
        return sorted((job for job in self.jobs() if job.name == name), key=lambda job: job.attempt)

    def latest(self, name: str) -> Job:
        """The last attempt of a name, or the job with this id.

        Raises:
            ClusterError: there is none; or it is the name of one run and the id of another one's attempt.
        """
        jobs = self.jobs()
        of_name = [job for job in jobs if job.name == name]
        others = [job for job in jobs if job.id == name and job.name != name]
        if of_name and others:
            raise ClusterError(
                f"{name!r} is a run, and also attempt {others[0].attempt} of the run {others[0].name!r}",
                given=[of_name[-1].id, others[0].id],
                mend=f"give {others[0].name!r} or {of_name[-1].id!r}",
            )
        of_name = of_name or others
        if not of_name:
            known = ", ".join(dict.fromkeys(job.name for job in jobs[-10:])) or "none"
            raise ClusterError(f"there is no job {name!r}; there are: {known}", given=self.address)
        return max(of_name, key=lambda job: job.attempt)

    def submit(
        self, job_id: str, command: str, *, name: str, attempt: int, settings: str,
        runtime_env: Mapping[str, Any],
    ) -> bool:  # fmt: skip
        """Hand a job in; False if there has been one of this id, now or ever.

        Args:
            command: what a shell in the unpacked folder runs.
            settings: a digest of the configuration.
            runtime_env: as Ray takes it; a `working_dir` here is sent.
        """
        metadata = {_NAME: name, _ATTEMPT: str(attempt), _SETTINGS: settings}
        with self._told():
            try:
                self._client.submit_job(
                    entrypoint=command, submission_id=job_id, runtime_env=dict(runtime_env), metadata=metadata
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    def look(self, job_id: str) -> Job:
        """A job as it is now."""
        with self._told():
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """All that a job has printed."""
        with self._told():
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; False if it has ended."""
        with self._told():
            return bool(self._client.stop_job(job_id))

    def wait(self, job_id: str, tell: Callable[[Job], None], limit: float = float("inf")) -> Job:
        """Wait until a job has ended, or for so many seconds.

        Args:
            tell: called with the job whenever its status has changed, the first time at once.

        Raises:
            ClusterError: the server has not answered for a minute.
        """
        deadline = time.monotonic() + limit
        look = _Changes(lambda: self._patiently(job_id), tell)
        while not (job := look()).over and time.monotonic() < deadline:
            time.sleep(_EVERY)
        return job

    def follow(self, job_id: str, write: Callable[[str], None], tell: Callable[[Job], None]) -> Job:
        """Pass on what a job prints until it has ended; a connection that breaks is taken up again.

        Args:
            write: called with text as it comes.
            tell: see `wait`.

        Raises:
            ClusterError: the server has not answered for a minute.
        """
        return asyncio.run(self._follow(job_id, write, tell))

    # -- inside --------------------------------------------------------------------------------------

    async def _follow(self, job_id: str, write: Callable[[str], None], tell: Callable[[Job], None]) -> Job:
        look = _Changes(lambda: self._patiently(job_id), tell)
        seen = 0
        while True:
            look()
            whole, position = False, 0
            lines = self._client.tail_job_logs(job_id)  # from the beginning, each time
            coming: asyncio.Task[str | None] | None = None
            try:
                while True:
                    coming = coming or asyncio.ensure_future(anext(lines, None))
                    done, _ = await asyncio.wait({coming}, timeout=_SILENT)
                    if not done and look().over:  # a head that died may leave the connection open for ever
                        break
                    if done:
                        text, coming = coming.result(), None
                        if text is None:
                            whole = True
                            break
                        position += len(text)
                        if position > seen:
                            write(text[seen - position :])
                            seen = position
            except (
                Exception
            ) as error:  # aiohttp's and Ray's own; whether the job goes on, the next look tells
                _logger.debug("the connection to %s was lost: %s", self.address, error)
            finally:
                if coming is not None:
                    coming.cancel()
                    await asyncio.wait({coming})
                with suppress(Exception):  # of a connection that is broken anyway
                    await lines.aclose()
            if (job := look()).over:
                if not whole:
                    with suppress(ClusterError):
                        write(self.logs(job_id)[seen:])
                return job
            await asyncio.sleep(_EVERY)

    def _patiently(self, job_id: str) -> Job:
        """`look`, over a head that restarts."""
        deadline = time.monotonic() + _LOST
        while True:
            try:
                return self.look(job_id)
            except ClusterError as error:
                if time.monotonic() > deadline or "does not exist" in error.problem:
                    raise
                time.sleep(_EVERY)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in our words what Ray's client and the network raise. Tokens are in none of them."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            missing = "required" in str(error).partition("\n")[0]
            raise ClusterError(
                "the cluster wants a token" if missing else "the cluster does not take this token",
                given=self.address,
                mend="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's",
            ) from error
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # what requests raises is an OSError
            raise ClusterError(
                f"the cluster's job server cannot be asked: {_reason(error)}", given=self.address,
                mend="check the address (http://HOST:8265), and that the cluster runs with its dashboard",
            ) from error  # fmt: skip


def _connect(address: str) -> Any:
    """Ray's own client, which by itself waits for ever for a server that does not answer."""
    from ray.job_submission import JobSubmissionClient

    class Limited(JobSubmissionClient):
        limits = _LIMITS

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": self.limits, **options})

    for name in ("dashboard_sdk", "job.sdk"):  # say how they are doing, among what the job prints
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    with _nothing_else():
        client = Limited(address)  # asks the server for its version
    client.limits = _PATIENCE
    return client


class _Changes:
    """Looks at a job, and tells of it when its status has changed."""

    def __init__(self, look: Callable[[], Job], tell: Callable[[Job], None]) -> None:
        self._look = look
        self._tell = tell
        self._before = ""

    def __call__(self) -> Job:
        job = self._look()
        if job.status != self._before:
            self._before = job.status
            self._tell(job)
        return job


def _job(details: Any) -> Job:
    known = details.metadata or {}
    job_id = str(details.submission_id)
    return Job(
        id=job_id,
        name=known.get(_NAME, job_id),
        attempt=int(known.get(_ATTEMPT, 1)),
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        settings=known.get(_SETTINGS, ""),
        started=(details.start_time or 0) / 1000,
        ended=(details.end_time or 0) / 1000,
        driver_exit=details.driver_exit_code,
    )


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    # What fails in the server comes as a traceback, whose last line says it.
    text = lines[-1] if "Traceback" in lines[0] else lines[0]
    return text if len(text) <= 300 else f"{text[:300]}…"


@contextmanager
def _nothing_else() -> Iterator[None]:
    """Ray lets these variables override the address that it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
