"""What a person sees: whole lines in a log, colours on a terminal, and never a byte that a model chose."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stateset_ray.report import Progress, clean, conversation, duration, line, show_evaluation

JUNK = "\x1b[2J[bold]x"
STEP: Mapping[str, Any] = {
    "event": "step", "step": 2, "steps": 10, "reward_mean": 0.631, "reward_std": 0.214,
    "rollout_tokens_per_second": 310.4, "learner_tokens_per_second": 139.6, "worker_restarts": 0,
    "seconds": {"rollout": 8.0, "learner": 4.0}, "seconds_left": 84.0, "errors": [],
    "trajectories": {"dispatched": 32, "trained": 32, "filtered": 0, "dropped": {}},
}  # fmt: skip
FINISHED: Mapping[str, Any] = {
    "event": "finished", "name": "demo", "model": "tiny", "steps": 10, "tasks": 64, "seconds": 83.7,
    "heldout_untrained": -0.9, "heldout_before": 0.1, "heldout_after": 0.45, "peak_rss_gib": 1.56,
    "checkpoint": "runs/demo/checkpoints/step-00000010",
    "conversations": {
        "untrained": [{"role": "user", "content": "Say: cab"}, {"role": "assistant", "content": JUNK}],
        "before": [{"role": "user", "content": "Say: cab"}, {"role": "assistant", "content": "caa"}],
        "after": [{"role": "user", "content": "Say: cab"}, {"role": "assistant", "content": "cab"}],
    },
}  # fmt: skip


def screen(*, terminal: bool = False, width: int = 80) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    kind = {"force_terminal": True, "color_system": "standard"} if terminal else {}
    return Console(file=out, width=width, highlight=False, **kind), out  # type: ignore[arg-type]


def shown(*events: Mapping[str, Any], **kind: Any) -> str:
    console, out = screen(**kind)
    with Progress(console) as progress:
        for event in events:
            progress(event)
    return out.getvalue()


def test_a_step_is_one_line() -> None:
    assert shown(STEP) == (
        "step  3/10  reward 0.63 ± 0.21  rollout 310 tok/s  learner 140 tok/s  12.0 s  left 1:24\n"
    )


def test_a_narrow_log_does_not_break_lines() -> None:
    assert shown(STEP, width=20).count("\n") == 1


def test_what_went_missing_is_said() -> None:
    trajectories = {
        "dispatched": 32,
        "trained": 21,
        "filtered": 8,
        "dropped": {"timeout": 2, "reward_error": 1},
    }
    text = shown(
        {**STEP, "trajectories": trajectories, "errors": ["it [red]broke\nbadly"], "worker_restarts": 1}
    )
    assert "  filtered 8  workers restarted 1  dropped 3 (timeout, reward_error)\n" in text
    assert text.endswith("  it [red]broke\n")


def test_the_time_left_looks_at_the_last_steps() -> None:
    slow = {**STEP, "step": 0, "seconds": {"rollout": 100.0}}
    steps = [{**STEP, "step": n, "seconds": {"rollout": 1.0}} for n in range(1, 7)]
    assert shown(slow, *steps).splitlines()[-1].endswith("left 0:03")
    assert "left 0:00" in shown({**STEP, "step": 9})


def test_a_long_warm_start_is_thinned_and_its_end_is_shown() -> None:
    warm = [
        {"event": "warm_start", "step": n, "steps": 24, "loss": 5.0 - n / 10, "seconds": 0.5}
        for n in range(24)
    ]
    evaluation = {
        "event": "evaluation", "name": "before", "seconds": 1.0, "reward": 0.25, "tasks": 8, "failed": 2,
        "stop_reasons": {},
    }  # fmt: skip
    lines = shown(*warm, evaluation).splitlines()
    assert [text.split("  ")[0] for text in lines[:-1]] == [f"warm start {n}/24" for n in (1, 10, 20, 24)]
    assert lines[-1] == "held-out reward before GRPO: 0.250  (8 tasks, 1.0 s)  failed 2"


def test_a_log_holds_no_escape_sequences() -> None:
    opened = {"event": "opened", "folder": "runs/[demo]", "model": "tiny", "resume": False}
    text = shown(opened, STEP, {"event": "unheard of"}, FINISHED)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "runs/[demo]" in text


def test_the_end_shows_gains_a_conversation_and_what_to_try() -> None:
    opened = {"event": "opened", "folder": "runs/demo", "model": "tiny", "resume": False}
    text = shown(opened, FINISHED)
    rows = [row.split() for row in text.splitlines()]
    assert ["untrained", "-0.900"] in rows
    assert ["before", "GRPO", "0.100", "+1.000"] in rows
    assert ["after", "GRPO", "0.450", "+0.350"] in rows
    assert "64 tasks" in text
    assert text.index("assistant: ·[2J[bold]x") < text.index("assistant: cab")
    assert "caa" not in text  # the first and the last are compared
    for fact in ("step-00000010", "1:24 for 10 steps", "1.56 GiB"):
        assert fact in text
    for command in ("chat runs/demo", "evaluate runs/demo", "init my_agent"):
        assert f"  stateset-ray {command}\n" in text


def test_a_wide_terminal_shows_both_conversations_side_by_side() -> None:
    wide = shown(FINISHED, terminal=True, width=120)
    (row,) = [row for row in wide.splitlines() if "[bold]x" in row]
    assert "cab" in row
    assert "\x1b[2J" not in wide
    narrow = shown(FINISHED, terminal=True, width=80)
    (row,) = [row for row in narrow.splitlines() if "[bold]x" in row]
    assert "cab" not in row


def test_a_run_without_evaluation_ends_well() -> None:
    bare = {k: v for k, v in FINISHED.items() if not k.startswith(("heldout", "conversations"))}
    assert "evaluate.tasks is 0" in shown(bare)


def test_a_checkpoint_is_named_as_one_would_type_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    below, elsewhere = tmp_path / "runs/demo/checkpoints/step-00000005", "/srv/runs/step-00000005"
    events = [{"event": "checkpoint", "path": str(path), "seconds": 1.0} for path in (below, elsewhere)]
    assert shown(*events).splitlines() == [
        "checkpoint runs/demo/checkpoints/step-00000005  (1.0 s)",
        "checkpoint /srv/runs/step-00000005  (1.0 s)",
    ]


def test_an_interrupted_run_says_how_to_go_on() -> None:
    text = shown(
        {"event": "opened", "folder": "runs/demo", "model": "tiny", "resume": True},
        {"event": "resumed", "step": 4, "checkpoint": "runs/demo/checkpoints/step-00000004"},
        {"event": "stopping", "signal": "SIGINT"},
        {"event": "interrupted", "step": 5, "checkpoint": "runs/demo/checkpoints/step-00000005"},
    )
    assert "resumed after step 4" in text
    assert "SIGINT" in text
    assert text.endswith("go on with: stateset-ray train runs/demo --resume\n")


def test_another_number_of_ranks_is_told() -> None:
    resumed = {"event": "resumed", "step": 4, "checkpoint": "step-4", "ranks_then": 1, "ranks": 2}
    assert "state of 1 learner ranks was divided anew among 2" in shown(resumed)
    assert "divided" not in shown({**resumed, "ranks": 1})


def test_a_warning_names_the_problem_and_the_mend_and_is_not_repeated_at_every_step() -> None:
    warning = {
        "event": "warning", "step": 0, "name": "equal_rewards", "text": "all groups have equal rewards",
        "mend": "make the task easier", "fatal": False,
    }  # fmt: skip
    text = shown(*[{**warning, "step": step} for step in range(11)])
    assert text.count("equal_rewards: all groups have equal rewards") == 2
    assert "(seen in 11 steps)" in text
    assert "to mend: make the task easier" in text


def test_a_lost_learner_is_told_with_its_return() -> None:
    text = shown(
        {"event": "learner_lost", "step": 4, "error": "a learner rank failed during an update"},
        {"event": "learner_rebuilt", "step": 3, "seconds": 11.5},
    )
    assert "in step 5: a learner rank failed" in text
    assert "back after 11.5 s, at step 3" in text


def test_the_objective_is_printed_at_the_start() -> None:
    opened = {"event": "opened", "folder": "runs/demo", "model": "tiny", "resume": False}
    assert "objective  dapo: advantage mean_std" in shown({**opened, "objective": "dapo: advantage mean_std"})


def test_an_evaluation() -> None:
    console, out = screen()
    show_evaluation(
        {
            "reward": 0.5, "tasks": 4, "failed": 1, "stop_reasons": {"completed": 3, "timeout": 1},
            "conversation": [{"role": "user", "content": "hi"}],
        },
        console,
    )  # fmt: skip
    for words in ("0.500", "4 (1 failed)", "3 completed, 1 timeout", "user: hi"):
        assert words in out.getvalue()


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain\nlines", "plain\nlines"),
        ("\x1b]0;title\x07", "·]0;title·"),
        ("a\rb\tc\x00", "a·b c·"),
        ("\u202egnp.exe \u200b\x9b31m", "·gnp.exe ··31m"),
        ("\ufffd\ufffd", "··"),
        ("ünï \U0001f600", "ünï \U0001f600"),
        ("x" * 700, "x" * 600 + "… (100 more characters)"),
    ],
)
def test_clean(text: str, safe: str) -> None:
    assert clean(text) == safe


def test_markup_stays_text_and_further_lines_are_indented() -> None:
    assert line("user", "[red]a[/]\nb").plain == "user: [red]a[/]\n      b"
    assert line("assistant", "").plain == "assistant: (nothing)"
    assert (
        conversation([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]).plain
        == "user: a\ntool: b"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
