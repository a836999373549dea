"""`init`, `doctor` and `version`: what one needs before and beside training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stateset_ray import __version__
from stateset_ray.cli.base import Set, app, errors, find_modules_beside, quiet, training_config

__all__ = ["doctor", "init", "version"]


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Start a project of your own: an environment, its configuration and its test."""
    with errors():
        from stateset_ray.init import init as write

        for path in write(folder):
            typer.echo(f"wrote {path}")
        typer.echo(f"\nnow try\n  cd {folder}\n  pytest\n  stateset-ray train config.toml")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check what this configuration needs.")
    ] = None,
    set_: Set = None,
    ray: Annotated[bool, typer.Option("--ray", help="Also start (or join) Ray and leave it again.")] = False,
) -> None:
    """Check this machine and, with a configuration, whether it can run it; exit code 1 if not."""
    with errors():
        settings = None
        if config is not None:
            settings = training_config(config, set_ or [], resume=False)
            find_modules_beside(config)
            quiet(settings)
        elif set_:
            from stateset_ray.config import load_config

            settings = load_config(None, set_)
            find_modules_beside(Path())
            quiet(settings)
        from stateset_ray.doctor import examine, show

        findings = examine(settings, start_ray=ray)
        show(findings, Console(highlight=False))
        if any(finding.status == "fail" for finding in findings):
            raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
