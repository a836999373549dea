"""`serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stateset_ray.cli.base import Set, app, errors
from stateset_ray.errors import ConfigError

__all__ = ["serve"]

_ALONE = {
    "new_key": {"keys", "admin", "agent"},
    "check": set(),
    "pin": {"source"},
    "canary": {"source", "share"},
    "promote": {"source"},
    "rollback": {"source"},
    "write": {"source", "port", "host", "tls", "page", "keys", "agent", "set_"},
}
"""What is done instead of serving, and the options that it knows."""


@app.command()
def serve(
    context: typer.Context,
    source: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run folder, a checkpoint or a model's name.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 8000,
    host: Annotated[str, typer.Option(help="Which address; others than loopback need keys.")] = "127.0.0.1",
    tls: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="CERT KEY", help="Speak HTTPS, with these two files.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="A page to chat in a browser, at /.")] = True,
    keys: Annotated[Path | None, typer.Option(help="A file of API keys.")] = None,
    new_key: Annotated[str | None, typer.Option(metavar="NAME", help="Add a key to --keys, show it.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="With --new-key: it may change weights.")] = False,
    agent: Annotated[
        bool,
        typer.Option("--agent", help="Let the policy call its environment's tools; with --new-key: for it."),
    ] = False,
    pin: Annotated[
        str | None, typer.Option(metavar="STEP", help="Hold RUN at a checkpoint; 'latest' lets it go on.")
    ] = None,
    canary: Annotated[
        str | None, typer.Option(metavar="STEP", help="Let a checkpoint answer a share of the conversations.")
    ] = None,
    share: Annotated[float, typer.Option(help="With --canary: the share, between 0 and 1.")] = 0.1,
    promote: Annotated[bool, typer.Option("--promote", help="Let the canary answer everybody.")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="End the canary, or go back to the version before.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="Write a file for 'serve deploy'.")] = None,
    check: Annotated[Path | None, typer.Option(help="Check such a file, strictly.")] = None,
    set_: Set = None,
) -> None:
    """Put a policy behind an endpoint that OpenAI's clients understand."""
    with errors():
        _refuse_idle(context)
        from stateset_ray.cli.errand import Errand, run_errand

        overrides = [*(set_ or ()), *([] if page else ["page=false"])]
        for name, path in zip(("cert", "key"), tls or (), strict=False):
            overrides.append(f"security.tls_{name}={json.dumps(str(path.absolute()))}")
        errand = Errand(
            source, port, host, keys, new_key, admin, pin, write, check, tuple(overrides),
            canary=canary, share=share, promote=promote, rollback=rollback, agent=agent,
        )  # fmt: skip
        run_errand(errand, typer.echo)


def _refuse_idle(context: typer.Context) -> None:
    """Refuse options that would do nothing beside the others, by name.

    Raises:
        ConfigError: two things are asked for at once, or an option that goes with none of what is asked for.
    """

    def shown(name: str) -> str:
        return "RUN" if name == "source" else f"--{name.rstrip('_').replace('_', '-')}"

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    errands = [name for name in _ALONE if name in given]
    if len(errands) > 1:
        raise ConfigError(f"choose one of {' and '.join(map(shown, errands))}: each is done alone")
    for name, owner in (("admin", "new_key"), ("share", "canary")):
        if name in given and owner not in errands:
            mend = f"add {shown(owner)}, or leave it out"
            raise ConfigError(f"{shown(name)} goes with {shown(owner)}", mend=mend)
    for errand in errands:
        if idle := sorted(given - _ALONE[errand] - {errand}):
            raise ConfigError(
                f"{', '.join(map(shown, idle))} would do nothing beside {shown(errand)}",
                mend=f"leave it out, or do without {shown(errand)}",
            )
