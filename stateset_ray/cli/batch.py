"""`batch`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stateset_ray.cli.base import Set, What, app, errors, find_modules_beside, quiet
from stateset_ray.errors import ConfigError

if TYPE_CHECKING:
    from stateset_ray.dataset.rows import Mode

__all__ = ["batch"]


@app.command()
def batch(
    run: What,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="JSON lines or Parquet, or a folder of them; with --play also heldout:N."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A folder; a later run continues it.")],
    generate: Annotated[bool, typer.Option("--generate", help="Reply to every row's messages.")] = False,
    score: Annotated[bool, typer.Option("--score", help="Score the replies that rows hold.")] = False,
    play: Annotated[bool, typer.Option("--play", help="Play every row's task, as evaluate does.")] = False,
    replicas: Annotated[int, typer.Option(min=0, help="Models at once; 0: as many as a run would have.")] = 0,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Redo rows that died, timed out or met a failing engine.")
    ] = False,
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Work on a whole data set with a policy; begin again after an interruption, and it goes on."""
    with errors():
        asked: dict[Mode, bool] = {"generate": generate, "score": score, "play": play}
        chosen = [mode for mode, wanted in asked.items() if wanted]
        if len(chosen) > 1:
            raise ConfigError("--generate, --score and --play exclude each other", given=chosen)
        find_modules_beside(Path(run))
        from stateset_ray.committed import trained_config
        from stateset_ray.dataset.files import check_source

        settings = trained_config(run, set_ or [])
        check_source(source)  # before anything heavy loads
        from stateset_ray.batch import batch as work

        quiet(settings)
        console = Console(highlight=False, stderr=as_json)
        moving = console.status("starting") if console.is_terminal else nullcontext()

        def progress(done: int, rows: int) -> None:
            text = f"{done:,} of {rows:,} rows"
            if not isinstance(moving, nullcontext):
                moving.update(text)
            else:
                typer.echo(text, err=True)

        # Actors may print; with --json, standard output holds the result and nothing else.
        with redirect_stdout(sys.stderr) if as_json else nullcontext(), moving:
            mode: Mode = chosen[0] if chosen else "generate"
            result = work(
                settings, source, output, mode,
                replicas=replicas, retry_errors=retry_errors, on_progress=progress,
            )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
        else:
            _show(result, console)


def _show(result: Mapping[str, Any], console: Console) -> None:
    from stateset_ray.report import clean, show_evaluation

    failed = sum(result["errors"].values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(result["errors"].items()))
    lines = [
        f"rows             {result['rows']:,} ({result['before']:,} finished before)",
        f"done             {result['done']:,}",
        f"errors           {failed:,}" + (f" ({kinds})" if failed else ""),
        *(f"                 {clean(text)}" for text in result["first_errors"]),
        f"output           {result['output']}",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if result["mode"] == "play":
        show_evaluation(result, console)
