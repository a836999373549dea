"""Training as a job of a cluster: checked here, sent, and submitted once, however often one asks.

What the cluster runs is `python -m stateset_ray.cli train CONFIG --continue` in the folder that was sent. So
a run that was begun goes on, and a job that was killed is mended by submitting it again: the next *attempt*
of its name continues from the newest whole checkpoint, exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, ConfigError
from stateset_ray.job_client import JobClient
from stateset_ray.packing import Package, collect, left_out, write_archive

__all__ = ["GRACE", "Order", "Outcome", "environment_variables", "order", "submit"]

GRACE = 600
"""Seconds that a job which is told to stop has to end its step and save, before Ray kills it."""
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # read by the actor that supervises the job
_CARRIED = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE")
"""What decides here whether and where models are downloaded decides it there, too."""
_RACES = 20  # submissions of one name at the same moment that are got out of the way of


@dataclass(frozen=True)
class Order:
    """A job that was checked and can be submitted.

    Attributes:
        name: of the run and of the job.
        command: what a shell in the unpacked folder runs.
        settings: a digest of the whole configuration.
        package: the files that are sent.
        variables: of the environment, for the job and all its actors.
        pip: requirements that Ray installs on every node before the job begins.
    """

    name: str
    command: str
    settings: str
    package: Package
    variables: Mapping[str, str]
    pip: tuple[str, ...] = ()

    def runtime_env(self, archive: Path) -> dict[str, Any]:
        """What Ray prepares for the job on every node."""
        environment: dict[str, Any] = {"working_dir": str(archive), "env_vars": dict(self.variables)}
        return environment | ({"pip": list(self.pip)} if self.pip else {})


@dataclass(frozen=True)
class Outcome:
    """What became of an order.

    Attributes:
        kind: "submitted"; "runs": an earlier attempt does, nothing was submitted; "done": one with the same
            settings has succeeded, nothing was submitted.
        id: of the job that is meant.
        attempt: how many of this name there have been, with it.
        other_settings: the job that runs was submitted with other ones.
    """

    kind: Literal["submitted", "runs", "done"]
    id: str
    attempt: int
    other_settings: bool = False


def order(
    config: Config, source: Path, *, working_dir: Path | None = None, overrides: Sequence[str] = (),
    variables: Mapping[str, str] | None = None, pip: Sequence[str] = (), grace: int = GRACE,
    python: str = "python",
) -> Order:  # fmt: skip
    """Check everything about a job that can be checked without the cluster.

    Its environment has been built already, so that its module is loaded.

    Args:
        config: the resolved configuration; `run.name` is the job's name.
        source: the TOML file it was read from.
        working_dir: what is sent; the current folder if None.
        overrides: the `section.key=value` settings that lead from the file to the configuration.
        variables: of the environment, besides those that are carried over.
        pip: requirements to be installed for the job.
        grace: see `GRACE`.
        python: the command that runs Python in the cluster's image.

    Raises:
        ConfigError: what would fail on the cluster, or leave nothing behind.
    """
    root = Path(working_dir or Path.cwd()).absolute()
    source = source.absolute()
    if source.is_dir():
        raise ConfigError(
            "a job is submitted from a TOML file, since run folders are not sent", given=str(source),
            mend="give the file that the run was started from",
        )  # fmt: skip
    _check_folder(config)
    own = [
        config.run.dir,
        *([Path(config.run.mirror)] if config.run.mirror and "://" not in config.run.mirror else []),
    ]
    package = collect(root, never=[path.absolute() for path in own])
    _check_sent(package, source, "the configuration")
    module = sys.modules.get(config.environment.path.partition(":")[0])
    file = Path(getattr(module, "__file__", None) or root).absolute()
    # Modules from anywhere else are installed here, and are expected to be in the cluster's image, too.
    if any(file.is_relative_to(place) for place in (root, source.parent, Path.cwd())):
        _check_sent(package, file, "the environment's module")
    words = [python, "-m", "stateset_ray.cli", "train", source.relative_to(root).as_posix(), "--continue"]
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--set", f"run.name={json.dumps(config.run.name)}"]
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    return Order(
        name=config.run.name,
        command="exec " + shlex.join(words),  # no shell between Ray's signals and the run
        settings=hashlib.sha256(settings.encode()).hexdigest()[:16],
        package=package,
        variables={**carried, _STOP_WAIT: str(grace), **(variables or {})},
        pip=tuple(pip),
    )


def environment_variables(given: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`, or `NAME` for what it is here.

    Raises:
        ConfigError: one is neither, or is not set here.

    Example:
        >>> environment_variables(["AGENT_MODE=strict"])
        {'AGENT_MODE': 'strict'}
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name.replace("_", "a").isalnum() or name[0].isdigit():
            raise ConfigError("a variable is given as NAME=VALUE or NAME", given=text)
        if not equals and name not in os.environ:
            raise ConfigError("this variable is not set here", given=name, mend=f"give --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def submit(server: JobClient, wanted: Order) -> Outcome:
    """Submit a job, unless one of its name runs, or has succeeded with the same settings.

    Args:
        server: the job server of a cluster.

    Raises:
        ClusterError: the server does not answer, or refuses.
    """
    for _ in range(_RACES):
        jobs = server.jobs()
        of_name = [job for job in jobs if job.name == wanted.name]
        for job in of_name:
            if not job.over:
                return Outcome("runs", job.id, len(of_name), other_settings=job.settings != wanted.settings)
        for job in of_name:
            if job.status == "SUCCEEDED" and job.settings == wanted.settings:
                return Outcome("done", job.id, len(of_name))
        attempt = len(of_name) + 1
        taken = {job.id for job in jobs}
        job_id = next(job_id for job_id in _ids(wanted.name, attempt) if job_id not in taken)
        with tempfile.TemporaryDirectory(prefix="stateset-submit-") as scratch:
            archive = Path(scratch) / "package.zip"
            write_archive(wanted.package, archive)
            if server.submit(
                job_id, wanted.command, name=wanted.name, attempt=attempt, settings=wanted.settings,
                runtime_env=wanted.runtime_env(archive),
            ):  # fmt: skip
                return Outcome("submitted", job_id, attempt)
    raise ClusterError(
        f"the job {wanted.name!r} could not be submitted: others submit jobs of this name at the same moment",
        given=server.address, mend="choose another --name",
    )  # fmt: skip


def _ids(name: str, attempt: int) -> Iterator[str]:
    return (name if number == 1 else f"{name}-{number}" for number in count(attempt))


def _check_folder(config: Config) -> None:
    if not config.run.dir.is_absolute() and not config.run.mirror:
        raise ConfigError(
            "run.dir is relative, so the run would lie in the folder that Ray unpacks for the job "
            "and removes after it: nothing would be left, and no attempt could continue another",
            given=f"run.dir = {str(config.run.dir)!r}",
            mend="set run.dir to an absolute path on storage that the nodes share, or set run.mirror",
        )


def _check_sent(package: Package, file: Path, what: str) -> None:
    """Refuse what the job would look for in vain."""
    if not file.is_relative_to(package.root):
        raise ConfigError(
            f"{what} lies outside of the folder that is sent, {package.root}", given=str(file),
            mend="name a folder that holds it with --working-dir",
        )  # fmt: skip
    name = file.relative_to(package.root)
    if name in package.files:
        return
    found, may_come = left_out(package.root, file) or (name, False)
    if may_come:
        again = f"!/{found.as_posix()}" + ("" if found == name else "/")
        raise ConfigError(
            f"{what} is not sent: a .gitignore or a .rayignore leaves {found} out", given=str(file),
            mend=f"add {again} to {package.root / '.rayignore'}, or move it",
        )  # fmt: skip
    raise ConfigError(
        f"{what} is not sent: nothing that lies in such a place is ({found})", given=str(file), mend="move it"
    )
