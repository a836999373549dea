"""What the commands share: the program, its common options, and how an error ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from stateset_ray.errors import ConfigError, StatesetError

if TYPE_CHECKING:
    from stateset_ray.config import Config

__all__ = ["Set", "What", "app", "errors", "find_modules_beside", "quiet", "training_config"]

app = typer.Typer(
    help="Reinforcement learning for multi-turn conversational agents, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_BUILT_IN = ("smollm2", "tiny")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given again."),
]
What = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a checkpoint or a TOML file.")]


@contextmanager
def errors() -> Iterator[None]:
    """Errors that were foreseen end in their own words; others keep their traceback, for they are bugs."""
    try:
        yield
    except StatesetError as error:
        text = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True, highlight=False).print(text, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`); Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def training_config(path: Path, overrides: list[str], resume: bool) -> Config:
    """The configuration at a path; a run folder stands for the run in it."""
    from stateset_ray.config import load_config

    if not os.path.isdir(path):  # a name that is too long is left to the reader's own words
        return load_config(path, overrides)
    if not (path / "config.toml").is_file():
        raise ConfigError(
            "this folder holds no config.toml", given=str(path), mend="give a TOML file or a run's folder"
        )
    # It may have been moved since: where it lies now is where it goes on.
    here = path.absolute()
    place = [f"run.dir={json.dumps(str(here.parent))}", f"run.name={json.dumps(here.name)}"] if resume else []
    return load_config(path / "config.toml", [*place, *overrides])


def find_modules_beside(path: Path) -> None:
    """Let environments be imported from the configuration's folder and from the current one.

    Actors are told of these folders, too (`actors.placement.import_paths`).
    """
    beside = path.absolute() if os.path.isdir(path) else path.absolute().parent
    for folder in (str(beside), str(Path.cwd())):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)


def quiet(config: Config) -> None:
    """No progress bars for a model that lies on the disk; a download keeps its own."""
    if config.model.name in _BUILT_IN or Path(config.model.name).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if not sys.stderr.isatty():  # in a log, a progress bar is a page of its own
            os.environ.setdefault("TQDM_DISABLE", "1")
