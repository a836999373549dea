"""`chat`."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from stateset_ray.cli.base import Set, app, errors, find_modules_beside, quiet, training_config
from stateset_ray.errors import ConfigError, StatesetError

if TYPE_CHECKING:
    from stateset_ray.config import Config
    from stateset_ray.types import Message

__all__ = ["chat"]

# For a model that brings no configuration. Nothing is learned here, so the last one only has to be enough.
_TALK = ("rollout.max_turn_tokens=256", "rollout.max_context=2048", "learner.micro_batch_tokens=1000000")


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run folder, a checkpoint, a TOML file or a model's name."),
    ] = None,
    set_: Set = None,
    play: Annotated[
        bool, typer.Option("--play", help="Be the policy: answer an environment yourself.")
    ] = False,
    environment: Annotated[
        str | None, typer.Option(metavar="MODULE:CLASS", help="With --play: the environment to answer.")
    ] = None,
) -> None:
    """Talk to a policy, or (--play) be one."""
    with errors():
        if environment is not None and not play:
            raise ConfigError("--environment goes with --play", mend="add --play")
        find_modules_beside(Path(model or "."))
        console = Console(highlight=False)
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history in input()
        settings, system = (
            _play_config(model, environment, set_ or []) if play else _chat_config(model, set_ or [])
        )
        quiet(settings)
        import stateset_ray.chat as face
        from stateset_ray.report import clean, line

        def show(message: Message) -> None:
            console.print(line(message.role, message.content), soft_wrap=True)

        def note(text: str) -> None:
            console.print(Text(clean(text), style="dim"), soft_wrap=True)

        if play:
            face.play(settings, input, show, note)
        else:
            opening: tuple[Message, ...] = ()
            try:
                opening = face.instructions(settings) if system else ()
            except StatesetError as error:  # one can talk to a policy without the environment at hand
                note(f"without the instructions that it was trained under: {error.problem}")
            face.chat(settings, input, show, note, system=opening)


def _chat_config(model: str | None, overrides: list[str]) -> tuple[Config, bool]:
    """What to talk to, and whether it was trained in the configured environment."""
    from stateset_ray.config import load_config

    if model is None:
        raise ConfigError(
            "chat needs someone to talk to",
            mend="give a run folder, a checkpoint or a model's name (smollm2), or --play an environment",
        )
    from stateset_ray.committed import check_not_a_path, trained_config

    check_not_a_path(model)
    there = (os.path.join(model, name) for name in ("manifest.json", "config.toml", "checkpoints"))
    if os.path.isfile(model) or any(map(os.path.exists, there)):
        return trained_config(model, overrides), True
    return load_config(None, [*_TALK, f"model.name={json.dumps(model)}", *overrides]), False


def _play_config(path: str | None, environment: str | None, overrides: list[str]) -> tuple[Config, bool]:
    from stateset_ray.config import load_config

    if (path is None) == (environment is None):
        raise ConfigError("--play needs a TOML file or --environment module:Class, one of the two")
    if environment is not None:
        setting = f"environment.path={json.dumps(environment)}"
        return load_config(None, ["rollout.max_turns=100", setting, *overrides]), False
    return training_config(Path(str(path)), overrides, resume=False), False
