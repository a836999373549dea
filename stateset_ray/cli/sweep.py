"""`sweep`: many variations of one configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from stateset_ray.cli.base import Set, app, errors, find_modules_beside, quiet, training_config
from stateset_ray.errors import RunError

if TYPE_CHECKING:
    from stateset_ray.config import Config
    from stateset_ray.sweep.plan import Plan

__all__ = ["sweep"]


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file: what is varied.")],
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE",
            help="A TOML file with \\[space], or: customer_service, full, generation, grpo, optimizer.",
        ),
    ],
    set_: Set = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Trials; with a grid, for each of its points.")
    ] = 0,
    name: Annotated[
        str, typer.Option("--name", help="Of the sweep's folder in run.dir; by default <run.name>-sweep.")
    ] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep of this name: ended trials stay.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the trials; start nothing.")
    ] = False,
) -> None:
    """Try many values of some settings, and write down the best configuration."""
    with errors():
        settings = training_config(config, set_ or [], resume=False)
        find_modules_beside(config)
        quiet(settings)
        from stateset_ray.environments.base import build_environment
        from stateset_ray.sweep.plan import read_plan

        plan = read_plan(settings, space, samples=samples)
        build_environment(settings.environment.path, settings.environment.options)
        if dry_run:
            _check_name(settings, name, resume)
            _dry_run(plan)
            return
        from stateset_ray.sweep import sweep as run
        from stateset_ray.sweep.show import SweepProgress, table

        console = Console(highlight=False)
        swept = run(
            plan, name=name, resume=resume, on_event=SweepProgress(settings.train.steps, console)
        )  # fmt: skip
        console.print()
        console.print(table(plan, swept.outcomes))
        console.print()
        if swept.best is not None:
            console.print(f"best configuration  {escape(str(swept.folder / 'best.toml'))}", soft_wrap=True)
        console.print(f"all of it           {escape(str(swept.folder / 'results.json'))}", soft_wrap=True)
        console.print(f"picture             {escape(str(swept.folder / 'sweep.svg'))}", soft_wrap=True)
        if swept.interrupted:
            console.print(
                f"interrupted; go on with: stateset-ray sweep {escape(str(config))} {escape(space)} "
                f"--name {escape(swept.folder.name)} --resume (and the same other options)",
                soft_wrap=True,
            )
            raise typer.Exit(130)


def _check_name(config: Config, name: str, resume: bool) -> None:
    """Refuse a name that no folder can have, and a sweep to resume that is not there."""
    name = name or f"{config.run.name}-sweep"
    config = config.with_overrides([f"run.name={json.dumps(name)}"])
    if resume and not (config.run.folder / "tune").is_dir():
        raise RunError(
            "there is no sweep of this name to resume", given=str(config.run.folder),
            mend="check --name and run.dir, or start without --resume",
        )  # fmt: skip


def _dry_run(plan: Plan) -> None:
    """Print what would be tried, and what each trial would ask Ray for."""
    from stateset_ray.sweep.plan import trials_to_run

    sweep = plan.sweep
    typer.echo(f"space      {plan.source}")
    for dimension in plan.space.dimensions:
        typer.echo(f"  {dimension.key:<32} {dimension.describe()}")
    typer.echo(f"compared   {plan.metric} ({sweep.mode}), {sweep.scheduler}, {sweep.searcher}")
    if sweep.searcher == "random":
        trials, notes = trials_to_run(plan)
        typer.echo(f"trials     {len(trials)}")
        for number, values in enumerate(trials, 1):
            typer.echo(f"  {number:>3}  " + ", ".join(f"{k} = {v}" for k, v in values.items()))
        for note in notes:
            typer.echo(f"  {note}")
    else:
        typer.echo(f"trials     {sweep.samples}, chosen one by one")
    from stateset_ray.actors.placement import bundles

    own = [{"CPU": sweep.trial_cpus}] if sweep.trial_cpus else []
    typer.echo(f"each asks  {[*own, *bundles(plan.config)]}")
