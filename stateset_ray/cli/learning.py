"""`train` and `evaluate`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stateset_ray.cli.base import Set, What, app, errors, find_modules_beside, quiet, training_config

if TYPE_CHECKING:
    from stateset_ray.config import Config

__all__ = ["evaluate", "train"]


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A TOML file, or a run folder (its config.toml).")
    ],
    set_: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, exactly.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Resume the run if it has been begun, else begin it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would run; start nothing.")
    ] = False,
) -> None:
    """Train a policy; try examples/quickstart.toml first."""
    with errors():
        from stateset_ray.config import corrected

        settings = corrected(training_config(config, set_ or [], resume or go_on))
        find_modules_beside(config)
        quiet(settings)
        # Before torch and Ray are loaded: a missing environment is the commonest mistake.
        _check_environment(settings)
        from stateset_ray.actors.run_folder import begun, check_room_for

        resume = resume or (go_on and begun(settings))
        check_room_for(settings, resume=resume)
        if dry_run:
            _dry_run(settings)
            return
        from stateset_ray.report import Progress

        with Progress() as progress:
            if settings.train.max_staleness:
                from stateset_ray.train_async import train_async as run
            else:
                from stateset_ray.train import train as run
            run(settings, resume=resume, on_event=progress)


@app.command()
def evaluate(
    run: What,
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Play the held-out tasks with a trained policy and print what it earns."""
    with errors():
        find_modules_beside(Path(run))
        from stateset_ray.committed import trained_config

        settings = trained_config(run, set_ or [])
        from stateset_ray.evaluate import evaluate as play
        from stateset_ray.report import show_evaluation

        quiet(settings)
        console = Console(highlight=False)
        moving = console.status("playing") if console.is_terminal and not as_json else nullcontext()
        # Actors may print; with --json, standard output holds the result and nothing else.
        with redirect_stdout(sys.stderr) if as_json else nullcontext(), moving:
            result = play(settings)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            show_evaluation(result, console)


def _check_environment(config: Config) -> Any:
    """Build the environment once, with its expert where warm start needs one."""
    from stateset_ray.environments.base import build_environment, check_expert

    environment = build_environment(config.environment.path, config.environment.options)
    if config.train.warm_start.steps:
        check_expert(environment)
    return environment


def _dry_run(config: Config) -> None:
    """Print the resolved configuration, and as comments what it would take: all of it is valid TOML."""
    from stateset_ray.models import check_fits, check_reference, check_targets

    check_fits(config)
    check_reference(config)
    check_targets(config)
    from stateset_ray.actors.memory import expected_memory
    from stateset_ray.actors.placement import describe

    typer.echo(config.to_toml())
    _comment(f"objective  {config.grpo.summary()}")
    room = describe(config)
    _comment("what Ray would be asked for")
    for key in ("address", "strategy", "rollout_workers", "inference_engines", "learner_ranks", "total"):
        _comment(f"  {key:<16} {room[key]}")
    for role, bundle in (("a rollout worker", room["bundles"][0]), ("a learner rank", room["bundles"][-1])):
        _comment(f"  {role:<16} {bundle}")
    _comment("expected memory")
    for row in expected_memory(config).rows():
        _comment(f"  {row}")


def _comment(text: str) -> None:
    typer.echo(f"# {text}")
