"""What `stateset-ray serve` is asked for: to serve, or one of the things that are done instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stateset_ray.errors import CheckpointError, ConfigError
from stateset_ray.serve import check_new, check_port, prepared, serve, write_deploy_file
from stateset_ray.serving import release
from stateset_ray.serving.security import add_key
from stateset_ray.serving.source import Source

__all__ = ["Errand", "run_errand"]


@dataclass(frozen=True)
class Errand:
    """What was asked for; one of `new_key`, `check`, the four of a release and `write` is done alone."""

    source: str | None
    port: int
    host: str
    keys: Path | None
    new_key: str | None
    admin: bool
    pin: str | None
    write: Path | None
    check: Path | None
    overrides: tuple[str, ...]
    canary: str | None = None
    share: float = 0.1
    promote: bool = False
    rollback: bool = False
    agent: bool = False


def run_errand(errand: Errand, say: Callable[[str], None]) -> None:
    """Do an errand; `say` shows what a person needs to know.

    Raises:
        StatesetError: what is wrong, and how to mend it.
    """
    if errand.new_key is not None:
        if errand.keys is None:
            raise ConfigError(
                "--new-key needs a file to put the key's hash into", mend="add --keys keys.json"
            )
        try:
            key = add_key(errand.keys, errand.new_key, admin=errand.admin, agent=errand.agent)
        except OSError as error:
            raise ConfigError(
                f"the file of keys cannot be written: {error.strerror}", given=str(errand.keys),
                mend="make its folder and let this user write there, or name another file with --keys",
            ) from error  # fmt: skip
        say(key)
        return
    if errand.check is not None:
        from stateset_ray.serving.deploy_file import check_deploy_file

        check_deploy_file(errand.check)
        say(f"{errand.check} is as Serve will understand it")
        return
    if errand.source is None:
        raise ConfigError(
            "there is nothing to serve", mend="give a run's folder, a checkpoint or a model's name"
        )
    releases = [errand.pin is not None, errand.canary is not None, errand.promote, errand.rollback]
    if any(releases):
        try:
            say(_release(errand.source, errand))
        except OSError as error:
            raise CheckpointError(
                f"which checkpoint answers cannot be noted in the run's folder: {error.strerror}",
                given=errand.source, mend="let this user write there",
            ) from error  # fmt: skip
        return
    if errand.write is not None:
        check_new(errand.write)
    else:
        check_port(errand.host, errand.port)
    overrides = (*(["agent.enabled=true"] if errand.agent else []), *errand.overrides)
    settings = prepared(errand.source, overrides, errand.host, errand.keys)
    if errand.write is not None:
        write_deploy_file(settings, errand.write, errand.host, errand.port)
        say(f"wrote {errand.write}; now: serve deploy {errand.write}")
        return
    serve(
        settings, host=errand.host, port=errand.port,
        on_ready=lambda url: say(f"{settings.name} answers at {url} (Ctrl-C stops)"),
    )  # fmt: skip


def _release(source: str, errand: Errand) -> str:
    """Change which checkpoints of a run answer; what was done, in a sentence."""
    run = Source(source).run
    if run is None:
        raise ConfigError("only a run has checkpoints to choose from", given=source)
    for name in (errand.pin, errand.canary):
        found = [path.name for path in (run / "checkpoints").glob("step-*")]
        there = sorted(filter(release.STEP.fullmatch, found))
        if name is not None and release.STEP.fullmatch(name) and name not in there:
            raise CheckpointError(
                "this run has no such checkpoint", given=name,
                mend=f"it has: {', '.join(there) or 'none'}",
            )  # fmt: skip
    if errand.pin is not None:
        release.pin(run, None if errand.pin == "latest" else errand.pin)
        return f"{source} is served from {errand.pin} on, by everyone who follows it"
    if errand.canary is not None:
        stable = release.start_canary(run, errand.canary, errand.share)
        return f"{errand.canary} answers {errand.share:.1%} of all conversations, {stable} the others"
    if errand.promote:
        return f"{release.promote(run)} answers all of {source}"
    return f"{release.rollback(run)} answers all of {source} again"
