"""The benchmark of what a conversation costs, in small: it plays what it says, and says what it promises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import overhead, overhead_open

pytestmark = pytest.mark.timeout(120)


def test_a_process_plays_every_side_and_compares_it_with_the_bare_one() -> None:
    found = overhead.process(groups=4, repeats=1)
    sides = found["sides"]
    assert list(sides) == ["repeated", "new", "bare"]
    assert found["conversations"] == 32
    assert found["sampled_tokens_per_conversation"] == overhead.TURNS * 4  # three letters and a stop token
    assert sides["bare"]["of_bare"] == 1.0
    # Whatever the machine does meanwhile: texts that were never seen cost more than those that were.
    assert sides["new"]["per_processor_second"] < sides["repeated"]["per_processor_second"]
    assert sides["repeated"]["per_processor_second"] < sides["bare"]["per_processor_second"]


def test_the_profile_counts_what_every_conversation_does() -> None:
    rows = {row["function"].partition(" ")[2]: row for row in overhead.profile(groups=4, rows=60)}
    assert rows["_play"]["calls_per_conversation"] == 1
    assert rows["ask"]["calls_per_conversation"] == 1 + overhead.TURNS
    assert 0 < rows["ask"]["own"] < rows["ask"]["with_callees"] <= 1


def test_open_conversations_are_measured_while_their_environment_waits() -> None:
    [few] = overhead_open.measure([20], wait=0.02, seconds=0.3)
    assert few["conversations_per_second"] > 0
    assert few["lag_ms"]["probes"] > 5
    assert few["lag_ms"]["p50"] <= few["lag_ms"]["p99"] <= few["lag_ms"]["max"]
    # Messages, ids, a task, a timer: thousands of bytes, and not millions.
    assert 2_000 < few["bytes_per_conversation"] < 100_000
