"""Autoscaling, text, memory, the table of metrics: each alone."""

from __future__ import annotations

import pickle
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.models import load_tokenizer
from stateset_ray.policies.renderer import Renderer
from stateset_ray.serving.answers import Answer
from stateset_ray.serving.autoscaling import METRIC, TokensPerReplica, replicas_wanted
from stateset_ray.serving.events import Began, Ended, Piece, TokenLogprob, in_parts
from stateset_ray.serving.memory import ConversationMemory
from stateset_ray.serving.meters import METRICS
from stateset_ray.serving.text_stream import TextStream
from stateset_ray.types import Message

BOUNDS = {"target": 100.0, "low": 1, "high": 8}


@pytest.mark.parametrize(
    ("tokens", "running", "queued", "replicas", "wanted"),
    [
        ({}, 0, 0, 1, 1),
        ({"a": 0}, 0, 0, 1, 1),
        ({"a": 100}, 10, 0, 1, 1),
        ({"a": 101}, 10, 0, 1, 2),
        ({"a": 300, "b": 300}, 10, 0, 2, 6),
        ({"a": 9000}, 10, 0, 1, 8),
        ({"a": 50}, 1, 4, 1, 3),  # what waits is worth what runs
        ({"a": 50}, 10, 4, 1, 1),  # each of it, and not all of a replica's
        ({"a": 90, "b": 90}, 9, 10, 2, 4),
        ({"a": 50, "b": 0}, 0, 4, 2, 3),  # Serve's count is behind
        ({"a": 0}, 0, 4, 1, 4),  # or a target each, if nothing runs
        ({"a": 10_000}, 5, 2, 1, 8),
        ({"a": 10}, 1, 0, 2, 2),  # the other is only starting
        ({"a": 10, "b": 10}, 2, 0, 2, 1),
        ({}, 0, 3, 0, 3),  # from zero
    ],
)  # fmt: skip
def test_replicas_for_a_load(tokens, running, queued, replicas, wanted):
    assert replicas_wanted(tokens, running, queued, replicas=replicas, **BOUNDS) == wanted


@given(
    st.dictionaries(st.text(), st.floats(0, 1e6), max_size=8), st.integers(0, 1000), st.integers(0, 1000),
    st.integers(0, 8), st.floats(1, 1e5),
)  # fmt: skip
def test_replicas_stay_in_their_bounds_and_grow_with_the_load(tokens, running, queued, replicas, target):
    def wanted(tokens, queued):
        return replicas_wanted(tokens, running, queued, replicas=replicas, target=target, low=2, high=6)

    assert 2 <= wanted(tokens, queued) <= 6
    assert wanted(tokens, queued + 1) >= wanted(tokens, queued)
    assert wanted({k: v * 2 for k, v in tokens.items()}, queued) >= wanted(tokens, queued)


def test_the_policy_reads_what_serve_gives():
    context = SimpleNamespace(
        aggregated_metrics={METRIC: {"a": 250.0, "b": 0.0, "dead": 9000.0}}, running_replicas=["a", "b"],
        total_running_requests=10.0, total_queued_requests=0, current_num_replicas=2,
        capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=9,
    )  # fmt: skip
    assert TokensPerReplica(target=100)(context) == (3, {})
    context.total_queued_requests = 4
    assert TokensPerReplica(target=100)(context) == (4, {})
    context.total_queued_requests = 0
    context.aggregated_metrics = None
    assert TokensPerReplica(target=100)(context) == (2, {})


def pieces(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            return found, stream
    return [*found, stream.finish()], stream


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_make_the_whole(renderer, data):
    """Whatever the ids are: half characters, control tokens, spaces at both ends."""
    size = len(renderer._tokenizer)
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=24))
    found, _ = pieces(renderer._tokenizer, ids)
    assert "".join(found) == renderer.text(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_nothing_of_a_stop_string_is_shown(renderer, text, stops):
    ids = renderer._tokenizer.encode(text, add_special_tokens=False)
    found, stream = pieces(renderer._tokenizer, ids, stops)
    whole = renderer._tokenizer.decode(ids, skip_special_tokens=True)
    # The stop string that is complete first ends the reply; of those that end together, the longest does.
    seen = (whole[:end] for end in range(1, len(whole) + 1))
    first = next((text for text in seen if any(stop in text for stop in stops)), "")
    cut = min((first.find(stop) for stop in stops if stop in first), default=None)
    assert "".join(found) == whole[:cut].strip()
    assert stream.stopped == (cut is not None)


def test_no_part_of_an_answer_is_longer_than_a_message():
    top = tuple((f" likely{i}", -1.5) for i in range(20))
    tokens = tuple(TokenLogprob(f" word{i}", -0.5, top) for i in range(1900))
    texts = ("word " * 1900, "\U0001f600" * 300_000, "", "short")
    events = [Began("v", 3)]
    for choice, text in enumerate(texts):
        events += [Piece(choice, text, tokens), Ended(choice, "stop", 1900)]
    parts = list(in_parts(events))
    assert max(len(pickle.dumps(part)) for part in parts) < 2 << 20
    whole, cut = (Answer("a", "m", 0, len(texts), logprobs=True) for _ in range(2))
    whole.take(events)
    for part in parts:
        assert part
        cut.take(part)
    assert cut.completion() == whole.completion()
    assert len(list(in_parts([Piece(0, "x"), Ended(0, "stop", 1)] * 99))) == 1  # what is short stays together


def test_what_is_certain_is_shown_at_once(renderer):
    ids = renderer._tokenizer.encode("ab cd", add_special_tokens=False)
    assert pieces(renderer._tokenizer, ids)[0] == ["a", "b", "", " c", "d", ""]
    assert pieces(renderer._tokenizer, ids, ["bx"])[0] == ["a", "", "b", " c", "d", ""]


def test_a_known_conversation_goes_on_with_its_ids(renderer):
    said = (Message("user", "hi"), Message("assistant", "ab"))
    follow = (*said, Message("user", "more"))
    prompt = renderer.opening(said[:1])
    ids = (*prompt, *renderer.reply("ab"))
    memory = ConversationMemory(2)
    assert memory.prompt(renderer, "t", follow) == renderer.opening(follow)
    odd = (*ids[:-2], 7, ids[-1])  # ids that no encoder would choose for these words
    memory.remember("t", said, odd, stopped=True)
    assert memory.prompt(renderer, "t", follow) == (*odd, *renderer.suffix(follow[2:]))
    assert memory.prompt(renderer, "other", follow) == renderer.opening(follow)  # another tenant
    assert memory.prompt(renderer, "t", follow[:1]) == prompt
    for text in ("x", "y"):
        memory.remember("t", (Message("user", text),), ids, stopped=True)
    assert memory.prompt(renderer, "t", follow) == renderer.opening(follow)  # forgotten


def test_what_is_many_tokens_is_not_remembered():
    """Of 16,000 characters it may be 50,000 tokens, of which a thousand would fill a machine."""
    renderer = Renderer(load_tokenizer("tiny"))
    said = [Message("user", "\u4e2d" * 4000)]  # whose bytes are a token each
    before = renderer._opening.cache_info().currsize, renderer._suffix.cache_info().currsize
    for ids in (renderer.opening(said), renderer.suffix(said)):
        assert len(ids) > 8000
    assert renderer.opening(said) == renderer._render(said, prompt=True)
    assert (renderer._opening.cache_info().currsize, renderer._suffix.cache_info().currsize) == before


def test_the_table_of_metrics_is_sound():
    names = [metric.name for metric in METRICS.values()]
    assert len(set(names)) == len(names)
    for metric in METRICS.values():
        assert re.fullmatch(r"stateset_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert not {"route", "deployment", "replica", "application"} & set(metric.labels)  # Serve's own
