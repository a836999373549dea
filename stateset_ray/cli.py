"""The command line. Every command imports what it needs when it is called: `--help` loads nothing heavy.

Exit codes: 0 done, 1 it failed, 2 the configuration or the command is wrong, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from stateset_ray import __version__
from stateset_ray.errors import ConfigError, StatesetError

if TYPE_CHECKING:
    from stateset_ray.config import Config
    from stateset_ray.types import Message

__all__ = ["app", "chat", "doctor", "evaluate", "init", "main", "serve", "train", "version"]

app = typer.Typer(
    help="Reinforcement learning for multi-turn conversational agents, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_BUILT_IN = ("smollm2", "tiny")
# For a model that brings no configuration. Nothing is learned here, so the last one only has to be enough.
_TALK = ("rollout.max_turn_tokens=256", "rollout.max_context=2048", "learner.micro_batch_tokens=1000000")


_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given again."),
]
_What = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a checkpoint or a TOML file.")]


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A TOML file, or a run folder (its config.toml).")
    ],
    set_: _Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, exactly.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would run; start nothing.")
    ] = False,
) -> None:
    """Train a policy; try examples/quickstart.toml first."""
    with _errors():
        from stateset_ray.config import corrected

        settings = corrected(_training_config(config, set_ or [], resume))
        _find_modules_beside(config)
        _quiet(settings)
        if dry_run:
            _dry_run(settings)
            return
        from stateset_ray.report import Progress

        with Progress() as progress:
            # Before torch and Ray are loaded: a missing environment is the commonest mistake.
            _check_environment(settings)
            if settings.train.max_staleness:
                from stateset_ray.train_async import train_async as run
            else:
                from stateset_ray.train import train as run

            run(settings, resume=resume, on_event=progress)


@app.command()
def evaluate(
    run: _What,
    set_: _Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Play the held-out tasks with a trained policy and print what it earns."""
    with _errors():
        _find_modules_beside(Path(run))
        from stateset_ray.evaluate import evaluate as play
        from stateset_ray.evaluate import trained_config
        from stateset_ray.report import show_evaluation

        settings = trained_config(run, set_ or [])
        _quiet(settings)
        console = Console(highlight=False)
        moving = console.status("playing") if console.is_terminal and not as_json else nullcontext()
        # Actors may print; with --json, standard output holds the result and nothing else.
        with redirect_stdout(sys.stderr) if as_json else nullcontext(), moving:
            result = play(settings)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            show_evaluation(result, console)


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run folder, a checkpoint, a TOML file or a model's name."),
    ] = None,
    set_: _Set = None,
    play: Annotated[
        bool, typer.Option("--play", help="Be the policy: answer an environment yourself.")
    ] = False,
    environment: Annotated[
        str | None, typer.Option(metavar="MODULE:CLASS", help="With --play: the environment to answer.")
    ] = None,
) -> None:
    """Talk to a policy, or (--play) be one."""
    with _errors():
        if environment is not None and not play:
            raise ConfigError("--environment goes with --play", mend="add --play")
        _find_modules_beside(Path(model or "."))
        console = Console(highlight=False)
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history in input()
        settings, system = (
            _play_config(model, environment, set_ or []) if play else _chat_config(model, set_ or [])
        )
        _quiet(settings)
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


@app.command()
def serve(
    source: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run folder, a checkpoint or a model's name.")
    ] = None,
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    host: Annotated[str, typer.Option(help="Which address; others than loopback need keys.")] = "127.0.0.1",
    keys: Annotated[Path | None, typer.Option(help="A file of API keys.")] = None,
    new_key: Annotated[str | None, typer.Option(metavar="NAME", help="Add a key to --keys, show it.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="With --new-key: it may change weights.")] = False,
    pin: Annotated[
        str | None, typer.Option(metavar="STEP", help="Hold RUN at a checkpoint; 'latest' lets it go on.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write a file for 'serve deploy'.")] = None,
    check: Annotated[Path | None, typer.Option(help="Check such a file, strictly.")] = None,
    set_: _Set = None,
) -> None:
    """Put a policy behind an endpoint that OpenAI's clients understand."""
    with _errors():
        from stateset_ray.serve import Errand, serve_command

        errand = Errand(source, port, host, keys, new_key, admin, pin, write, check, tuple(set_ or ()))
        serve_command(errand, typer.echo)


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Start a project of your own: an environment, its configuration and its test."""
    with _errors():
        from stateset_ray.init import init as write

        for path in write(folder):
            typer.echo(f"wrote {path}")
        typer.echo(f"\nnow try\n  cd {folder}\n  pytest\n  stateset-ray train config.toml")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check what this configuration needs.")
    ] = None,
    set_: _Set = None,
    ray: Annotated[bool, typer.Option("--ray", help="Also start (or join) Ray and leave it again.")] = False,
) -> None:
    """Check this machine and, with a configuration, whether it can run it; exit code 1 if not."""
    with _errors():
        settings = None
        if config is not None:
            settings = _training_config(config, set_ or [], resume=False)
            _find_modules_beside(config)
            _quiet(settings)
        from stateset_ray.doctor import examine, show

        findings = examine(settings, start_ray=ray)
        show(findings, Console(highlight=False))
        if any(finding.status == "fail" for finding in findings):
            raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """The program `stateset-ray`."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not every stream can be told
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # policies say anything
    app(prog_name="stateset-ray")


@contextmanager
def _errors() -> Iterator[None]:
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


def _training_config(path: Path, overrides: list[str], resume: bool) -> Config:
    """The configuration at a path; a run folder stands for the run in it."""
    from stateset_ray.config import load_config

    if not path.is_dir():
        return load_config(path, overrides)
    if not (path / "config.toml").is_file():
        raise ConfigError(
            "this folder holds no config.toml", given=str(path), mend="give a TOML file or a run's folder"
        )
    # It may have been moved since: where it lies now is where it goes on.
    here = path.absolute()
    place = [f"run.dir={json.dumps(str(here.parent))}", f"run.name={json.dumps(here.name)}"] if resume else []
    return load_config(path / "config.toml", [*place, *overrides])


def _chat_config(model: str | None, overrides: list[str]) -> tuple[Config, bool]:
    """What to talk to, and whether it was trained in the configured environment."""
    from stateset_ray.config import load_config

    if model is None:
        raise ConfigError(
            "chat needs someone to talk to",
            mend="give a run folder, a checkpoint or a model's name (smollm2), or --play an environment",
        )
    path = Path(model)
    trained = path.is_file() or (path / "manifest.json").is_file() or (path / "config.toml").is_file()
    if trained or (path / "checkpoints").is_dir():
        from stateset_ray.evaluate import trained_config

        return trained_config(model, overrides), True
    return load_config(None, [*_TALK, f"model.name={json.dumps(model)}", *overrides]), False


def _play_config(path: str | None, environment: str | None, overrides: list[str]) -> tuple[Config, bool]:
    from stateset_ray.config import load_config

    if (path is None) == (environment is None):
        raise ConfigError("--play needs a TOML file or --environment module:Class, one of the two")
    if environment is not None:
        setting = f"environment.path={json.dumps(environment)}"
        return load_config(None, ["rollout.max_turns=100", setting, *overrides]), False
    return _training_config(Path(str(path)), overrides, resume=False), False


def _find_modules_beside(path: Path) -> None:
    """Let environments be imported from the configuration's folder and from the current one.

    Actors are told of these folders, too (`actors.placement.import_paths`).
    """
    beside = path.absolute() if path.is_dir() else path.absolute().parent
    for folder in (str(beside), str(Path.cwd())):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)


def _quiet(config: Config) -> None:
    """No progress bars for a model that lies on the disk; a download keeps its own."""
    if config.model.name in _BUILT_IN or Path(config.model.name).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if not sys.stderr.isatty():  # in a log, a progress bar is a page of its own
            os.environ.setdefault("TQDM_DISABLE", "1")


def _check_environment(config: Config) -> Any:
    """Build the environment once, with its expert where warm start needs one."""
    from stateset_ray.environments.base import build_environment, check_expert

    environment = build_environment(config.environment.path, config.environment.options)
    if config.train.warm_start.steps:
        check_expert(environment)
    return environment


def _dry_run(config: Config) -> None:
    """Print the resolved configuration, and as comments what it would take: all of it is valid TOML."""
    _check_environment(config)
    from stateset_ray.models import check_fits, check_reference

    check_fits(config)
    check_reference(config)
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


if __name__ == "__main__":
    main()
