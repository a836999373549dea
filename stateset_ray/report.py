"""What a person sees of a run: a line per step, and at the end what it came to.

On a terminal a status line moves at the bottom; in a log there are whole lines and nothing else. What a
model said is untrusted: it is shown as plain text, without markup and without control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

__all__ = ["Progress", "clean", "conversation", "duration", "line", "show_evaluation"]

_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
_STRANGE = "\N{MIDDLE DOT}"  # stands for what cannot be shown, bytes that are no text included
_LONGEST = 600  # characters of one message that are shown
_SIDE_BY_SIDE = 100  # columns from which two conversations stand beside each other
_WARM_EVERY = 10  # a long warm start gets a line every so many steps
_WARN_EVERY = 10  # the same warning is repeated every so many steps
_SMOOTH = 5  # steps over which the time left is estimated
_STAGES = {
    "untrained": "untrained", "before": "before GRPO", "after": "after GRPO",
}  # fmt: skip


def clean(text: str, longest: int = _LONGEST) -> str:
    """Text of unknown origin, made safe for a terminal: no control characters, and not endless.

    Example:
        >>> clean("red \\x1b[31m")
        'red ·[31m'
    """
    safe = "".join(c if _shows(c) else _STRANGE for c in text.replace("\t", " "))
    return safe if len(safe) <= longest else f"{safe[:longest]}… ({len(safe) - longest} more characters)"


def _shows(character: str) -> bool:
    return character == "\n" or (character.isprintable() and character != "\N{REPLACEMENT CHARACTER}")


def line(role: str, content: str) -> Text:
    """One message as a coloured line; markup in it stays text."""
    label = clean(role, 20)
    indented = clean(content).replace("\n", "\n" + " " * (len(label) + 2))
    return Text.assemble((f"{label}: ", f"bold {_COLOURS.get(role, 'white')}"), indented or "(nothing)")


def conversation(messages: Iterable[Mapping[str, str]]) -> Text:
    """A whole conversation, a message per line."""
    return Text("\n").join(line(message["role"], message["content"]) for message in messages)


def duration(seconds: float) -> str:
    """A span of time as a clock shows it.

    Example:
        >>> duration(80), duration(3725)
        ('1:20', '1:02:05')
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Prints the events of a run; give it to `train` as `on_event` and use it in a `with` block.

    Args:
        console: where to print; standard output by default.

    Example: `with Progress() as progress: train(config, on_event=progress)`
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._status: Status | None = None
        self._folder = ""
        self._warm: Text | None = None
        self._seconds: list[float] = []
        self._warned: dict[str, int] = {}

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._status = self._console.status("checking")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self._status is not None:
            self._status.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event; kinds that are not known are passed over."""
        kind = event["event"]
        if kind != "warm_start":
            self._flush()
        show = getattr(self, f"_on_{kind}", None)
        if show is not None:
            show(event)

    def _say(self, *parts: str | tuple[str, str] | Text) -> None:
        # Soft: a log keeps a step on one line, whatever width is assumed for it.
        self._console.print(Text.assemble(*parts), soft_wrap=True)

    def _now(self, doing: str) -> None:
        if self._status is not None:
            self._status.update(Text(doing))

    def _flush(self) -> None:
        if self._warm is not None:
            self._say(self._warm)
            self._warm = None

    def _on_opened(self, event: Mapping[str, Any]) -> None:
        self._folder = str(event["folder"])
        self._say(("run  ", "bold"), clean(self._folder), ("   model  ", "bold"), clean(str(event["model"])))
        if "objective" in event:
            self._say(("objective  ", "bold"), str(event["objective"]))
        self._now("starting: Ray, rollout workers, learners, first evaluation")

    def _on_resumed(self, event: Mapping[str, Any]) -> None:
        where = event["checkpoint"]
        self._say(
            f"resumed after step {event['step']} from {_from_here(where)}"
            if where
            else "no checkpoint yet: from the start"
        )
        if event.get("ranks_then", 0) != event.get("ranks", 0):
            self._say(
                f"the optimizer's state of {event['ranks_then']} learner ranks was divided anew among "
                f"{event['ranks']}; the checkpoint is as it was"
            )

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        failed = f"  failed {event['failed']}" if event["failed"] else ""
        self._say(
            f"held-out reward {_stage(event['name'])}: ", (f"{event['reward']:.3f}", "bold"),
            f"  ({event['tasks']} tasks, {event['seconds']:.1f} s)", (failed, "red"),
        )  # fmt: skip
        self._now("saving" if event["name"] == "after" else "training")

    def _on_warm_start(self, event: Mapping[str, Any]) -> None:
        done = event["step"] + 1
        text = Text(f"warm start {done}/{event['steps']}  loss {event['loss']:.3f}  {event['seconds']:.1f} s")
        self._warm = text  # the last one is printed when something else happens
        if done == 1 or done % _WARM_EVERY == 0:
            self._flush()
        self._now(text.plain)

    def _on_step(self, event: Mapping[str, Any]) -> None:
        took = sum(event["seconds"].values())
        self._seconds = [*self._seconds, took][-_SMOOTH:]
        left = (event["steps"] - event["step"] - 1) * fmean(self._seconds)
        counts = event["trajectories"]
        dropped = sum(counts["dropped"].values())
        extras = [f"filtered {counts['filtered']}"] if counts["filtered"] else []
        extras += [f"workers restarted {event['worker_restarts']}"] if event.get("worker_restarts") else []
        width = len(str(event["steps"]))
        self._say(
            (f"step {event['step'] + 1:>{width}}/{event['steps']}", "bold"),
            f"  reward {event['reward_mean']:.2f} ± {event['reward_std']:.2f}"
            f"  rollout {event['rollout_tokens_per_second']:.0f} tok/s"
            f"  learner {event['learner_tokens_per_second']:.0f} tok/s"
            f"  {took:.1f} s  left {duration(left)}",
            "".join(f"  {extra}" for extra in extras),
            (f"  dropped {dropped} ({', '.join(map(str, counts['dropped']))})" if dropped else "", "red"),
        )  # fmt: skip
        for error in event["errors"][:1]:
            self._say(("  ", ""), (clean(str(error).partition("\n")[0], 200), "red"))
        self._now(f"step {event['step'] + 2}/{event['steps']}" if left else "saving")

    def _on_warning(self, event: Mapping[str, Any]) -> None:
        seen = self._warned.get(event["name"], 0)
        self._warned[event["name"]] = seen + 1
        if seen % _WARN_EVERY:
            return
        again = f" (seen in {seen + 1} steps)" if seen else ""
        self._say(("warning ", "bold yellow"), (f"{event['name']}: {clean(event['text'])}{again}", "yellow"))
        self._say(f"  to mend: {event['mend']}")

    def _on_learner_lost(self, event: Mapping[str, Any]) -> None:
        problem = clean(str(event["error"]).partition("\n")[0], 200)
        self._say((f"in step {event['step'] + 1}: {problem}", "red"))
        self._now("building the learner ranks anew")

    def _on_learner_rebuilt(self, event: Mapping[str, Any]) -> None:
        self._say(f"learner ranks are back after {event['seconds']:.1f} s, at step {event['step']}")

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        self._say(f"checkpoint {_from_here(event['path'])}  ({event['seconds']:.1f} s)")

    def _on_mirrored(self, event: Mapping[str, Any]) -> None:
        self._say(f"mirrored {event['name']} to {clean(event['address'])}  ({event['seconds']:.1f} s)")

    def _on_stopping(self, event: Mapping[str, Any]) -> None:
        with suppress(RuntimeError):  # a signal may come in the middle of another print
            self._say(
                (f"{event['signal']}: saves at the next safe point and ends; again to end at once", "yellow")
            )

    def _on_interrupted(self, event: Mapping[str, Any]) -> None:
        saved = event["checkpoint"]
        self._say(
            (f"stopped after {event['step']} steps; ", "yellow"),
            f"saved {_from_here(saved)}" if saved else "nothing to save",
        )
        self._say(f"go on with: stateset-ray train {self._folder} --resume")
        self._now("closing")

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        if self._status is not None:
            self._status.stop()
        parts: list[RenderableType] = [_rewards(event)]
        parts += _before_after(event.get("conversations", {}), self._console)
        parts += [Text(), _facts(event), Text(), Text("now try", style="bold")]
        for command in (f"chat {self._folder}", f"evaluate {self._folder}", "init my_agent"):
            parts.append(Text(f"  stateset-ray {command}", overflow="fold"))
        if self._console.is_terminal:
            title = Text(f"{clean(str(event['name']))}: finished")
            self._console.print(Panel(Group(*parts), title=title, border_style="green"))
        else:
            for part in (Text(f"\n{clean(str(event['name']))}: finished\n"), *parts):
                self._console.print(part)


def show_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print what `evaluate` returned."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result["stop_reasons"].items()))
    console.print(Text.assemble("held-out reward  ", (f"{result['reward']:.3f}", "bold")))
    console.print(Text(f"tasks            {result['tasks']} ({result['failed']} failed)"))
    console.print(Text(f"ended            {reasons}\n"))
    console.print(Text("one conversation", style="bold"))
    console.print(conversation(result["conversation"]))


def _stage(name: str) -> str:
    return _STAGES.get(name, name.replace("_", " "))


def _rewards(event: Mapping[str, Any]) -> RenderableType:
    """The held-out rewards in the order in which they came, each with its gain over the one before."""
    found = {name: event[f"heldout_{name}"] for name in _STAGES if event.get(f"heldout_{name}") is not None}
    if not found:
        return Text("no held-out evaluation: evaluate.tasks is 0")
    table = Table.grid(padding=(0, 2))
    previous: float | None = None
    for name, reward in found.items():
        gain = (
            Text()
            if previous is None
            else Text(f"{reward - previous:+.3f}", "green" if reward > previous else "red")
        )
        table.add_row(_stage(name), Text(f"{reward:.3f}", "bold"), gain)
        previous = reward
    return Group(Text(f"held-out reward, {event['tasks']} tasks", style="bold"), table)


def _before_after(
    spoken: Mapping[str, Sequence[Mapping[str, str]]], console: Console
) -> list[RenderableType]:
    """The same held-out task, played first and last."""
    names = [name for name in _STAGES if name in spoken]
    if not names:
        return []
    shown = list(dict.fromkeys((names[0], names[-1])))
    texts = [
        Group(Text(f"one conversation, {_stage(name)}", style="bold"), conversation(spoken[name]))
        for name in shown
    ]
    if console.is_terminal and console.width >= _SIDE_BY_SIDE:
        table = Table.grid(padding=(0, 3), expand=True)
        for _ in texts:
            table.add_column(ratio=1)
        table.add_row(*texts)
        return [Text(), table]
    return [part for text in texts for part in (Text(), text)]


def _from_here(path: Any) -> str:
    """A path as it would be typed here."""
    with suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)


def _facts(event: Mapping[str, Any]) -> RenderableType:
    facts = {
        "checkpoint": _from_here(event["checkpoint"]),
        "took": f"{duration(event['seconds'])} for {event['steps']} steps",
        "peak memory": f"{event['peak_rss_gib']:.2f} GiB",
    }
    return Text("\n").join(Text(f"{name:<12} {value}", overflow="fold") for name, value in facts.items())
