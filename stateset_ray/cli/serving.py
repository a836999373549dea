"""`serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stateset_ray.cli.base import Set, app, errors

__all__ = ["serve"]


@app.command()
def serve(
    source: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run folder, a checkpoint or a model's name.")
    ] = None,
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
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
        from stateset_ray.serve import Errand, serve_command

        overrides = [*(set_ or ()), *([] if page else ["page=false"])]
        for name, path in zip(("cert", "key"), tls or (), strict=False):
            overrides.append(f"security.tls_{name}={json.dumps(str(path.absolute()))}")
        errand = Errand(
            source, port, host, keys, new_key, admin, pin, write, check, tuple(overrides),
            canary=canary, share=share, promote=promote, rollback=rollback, agent=agent,
        )  # fmt: skip
        serve_command(errand, typer.echo)
