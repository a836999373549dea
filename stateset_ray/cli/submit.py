"""`submit`: a run as a job of a cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from stateset_ray.cli.base import Set, app, errors, find_modules_beside, training_config

if TYPE_CHECKING:
    from stateset_ray.job_client import Job, JobClient

__all__ = ["jobs", "logs", "run", "show", "status", "stop"]


class _Submit(TyperGroup):
    """A first word that is no command of its own is what is submitted: `submit CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the word `run` in front of a CONFIG or one of its options."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


jobs = typer.Typer(cls=_Submit, no_args_is_help=True)
app.add_typer(jobs, name="submit", help="Train on a cluster, as a Ray job: submit CONFIG.")

_SAID = {
    "PENDING": "waits", "RUNNING": "runs", "SUCCEEDED": "has succeeded", "FAILED": "has failed",
    "STOPPED": "was stopped",
}  # fmt: skip
_Address = Annotated[
    str, typer.Option(help="The dashboard, http://HOST:8265; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS.")
]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Of a run, or the id of a job.")]


@jobs.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file in the folder that is sent.")],
    address: _Address = "",
    name: Annotated[str, typer.Option(help="Of the job and the run; run.name if not given.")] = "",
    set_: Set = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print what the job prints, to its end.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the job's end.")] = False,
    working_dir: Annotated[
        Path | None, typer.Option(help="What is sent; the current folder if not given.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="A variable for the job; again for more.")
    ] = None,
    pip: Annotated[
        list[str] | None, typer.Option(metavar="REQUIREMENT", help="Installed for the job; again for more.")
    ] = None,
    grace: Annotated[int, typer.Option(min=1, help="Seconds to save in when it is stopped.")] = 600,
    python: Annotated[str, typer.Option(help="The command for Python on the cluster.")] = "python",
) -> None:
    """Submit a run (the word may be left out): checked first, sent, submitted once under its name."""
    with errors():
        from stateset_ray.config import corrected
        from stateset_ray.environments.base import build_environment, check_expert
        from stateset_ray.submit import environment_variables, order, submit

        overrides = [*(set_ or []), *([f"run.name={json.dumps(name)}"] if name else [])]
        settings = corrected(training_config(config, overrides, resume=False))
        find_modules_beside(config)
        environment = build_environment(settings.environment.path, settings.environment.options)
        if settings.train.warm_start.steps:
            check_expert(environment)
        from stateset_ray.job_client import dashboard_address

        where = dashboard_address(address)
        wanted = order(
            settings, config, working_dir=working_dir, overrides=set_ or [],
            variables=environment_variables(env or []), pip=pip or [], grace=grace, python=python,
        )  # fmt: skip
        client = _client(where)
        outcome = submit(client, wanted)
        if outcome.kind == "submitted":
            size = f"{len(wanted.package.files)} files, {wanted.package.size / 2**20:.1f} MiB"
            again = f", attempt {outcome.attempt}" if outcome.attempt > 1 else ""
            typer.echo(f"submitted {outcome.id}{again} to {where} ({size})")
        elif outcome.kind == "runs":
            typer.echo(f"{outcome.id} runs already: nothing was submitted")
            if outcome.other_settings:
                typer.echo("  it has other settings than these; to change them, stop it and submit again")
        else:
            typer.echo(f"{outcome.id} has succeeded with these settings: nothing was submitted")
            return
        if follow or wait:
            _until_it_ends(client, outcome.id, printing=follow, where=address)
        else:
            at = _at(address)
            typer.echo(f"  stateset-ray submit logs {wanted.name} --follow{at}")
            typer.echo(f"  stateset-ray submit stop {wanted.name}{at}")


@jobs.command()
def status(name: _Name, address: _Address = "") -> None:
    """Say how a job is doing; exit code 0 while it runs or has succeeded."""
    with errors():
        client = _client(_address(address))
        job = client.latest(name)
        for attempt in client.attempts(job.name) or [job]:
            typer.echo(_line(attempt))
        if job.over and job.exit_code:
            typer.echo(job.message.strip())
            raise typer.Exit(job.exit_code)


@jobs.command()
def logs(
    name: _Name,
    address: _Address = "",
    follow: Annotated[bool, typer.Option("--follow", help="Go on to its end, and end as it does.")] = False,
) -> None:
    """Print what the last job of a name has printed."""
    with errors():
        client = _client(_address(address))
        job = client.latest(name)
        if follow:
            _until_it_ends(client, job.id, printing=True, where=address)
        else:
            typer.echo(client.logs(job.id), nl=False)


@jobs.command()
def stop(name: _Name, address: _Address = "") -> None:
    """End a job: its run ends its step and saves a checkpoint, and the next attempt goes on from there."""
    with errors():
        client = _client(_address(address))
        job = client.latest(name)
        if job.over or not client.stop(job.id):
            typer.echo(f"{job.id} has ended already: {client.look(job.id).status.lower()}")
            return
        typer.echo(f"stopping {job.id}: it ends its step and saves; Ctrl-C leaves it to that")
        with _left_alone(f"{job.id} goes on stopping"):
            ended = client.wait(job.id, lambda _: None)
        typer.echo(_line(ended))


@jobs.command("list")
def show(address: _Address = "") -> None:
    """List the jobs that were submitted, oldest first."""
    with errors():
        for job in _client(_address(address)).jobs():
            typer.echo(_line(job))


def _address(given: str) -> str:
    from stateset_ray.job_client import dashboard_address

    return dashboard_address(given)


def _client(address: str) -> JobClient:
    from stateset_ray.job_client import JobClient

    return JobClient(address)


def _until_it_ends(client: JobClient, job_id: str, *, printing: bool, where: str) -> None:
    """Stay with a job, and end as it does."""

    def tell(job: Job) -> None:
        why = f": {job.message}" if job.status == "PENDING" and job.message else ""
        typer.echo(f"{job.id} {_SAID.get(job.status, job.status)}{why}", err=True)

    def write(text: str) -> None:
        typer.echo(text, nl=False)

    goes_on = f"{job_id} goes on without you; stateset-ray submit stop {job_id}{_at(where)} ends it"
    with _left_alone(goes_on):
        job = client.follow(job_id, write, tell) if printing else client.wait(job_id, tell)
    if job.exit_code:
        if not printing or job.driver_exit is None:
            typer.echo(job.message.strip(), err=True)
        raise typer.Exit(job.exit_code)


@contextmanager
def _left_alone(note: str) -> Iterator[None]:
    """Ctrl-C ends the waiting and nothing else."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\n{note}", err=True)
        raise


def _at(address: str) -> str:
    return f" --address {address}" if address else ""


def _line(job: Job) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else "not begun"
    return f"{job.id:<24} {job.status.lower():<10} attempt {job.attempt}  {began}  {job.seconds:.0f} s"
