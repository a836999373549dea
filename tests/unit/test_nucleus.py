"""What serving asks of sampling beyond training: the nucleus and the likeliest tokens."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest
import torch

from stateset_ray.policies.base import ReplyRequest
from stateset_ray.policies.nucleus import likeliest, nucleus
from stateset_ray.policies.transformers_engine import TransformersEngine

PROMPT = tuple(range(5, 25))


def test_the_fewest_likeliest_tokens_that_hold_the_mass_are_left():
    p = torch.tensor([[0.1, 0.4, 0.3, 0.2]] * 5)
    cut = nucleus(p, [1.0, 0.4, 0.41, 0.0, 0.95])
    assert [[i for i, v in enumerate(row) if v] for row in cut.tolist()] == [
        [0, 1, 2, 3], [1], [1, 2], [1], [0, 1, 2, 3],
    ]  # fmt: skip
    assert torch.equal(p[cut > 0], cut[cut > 0])  # what is left is not changed
    assert nucleus(p, [1.0] * 5) is p


def test_equal_probabilities_are_cut_by_their_place():
    assert nucleus(torch.full((1, 4), 0.25), [0.5]).tolist() == [[0.25, 0.25, 0.0, 0.0]]


def test_likeliest():
    found = likeliest(torch.tensor([0.5, 0.0, 0.25, 0.25]), 4)
    assert [token for token, _ in found] == [0, 2, 3, 1]
    assert [p for _, p in found] == pytest.approx([math.log(0.5), math.log(0.25), math.log(0.25), -9999.0])
    assert likeliest(torch.tensor([1.0]), 0) == ()
    assert len(likeliest(torch.tensor([0.5, 0.5]), 20)) == 2


@pytest.fixture
def sampled(tiny_copy, hardware):
    """Replies of one token, each with what was told of it."""

    def ask(count, **more):
        engine = TransformersEngine(tiny_copy, (), slots=8, max_context=64, hardware=hardware)

        async def play():
            told = []
            for seed in range(count):
                request = ReplyRequest(f"c{seed}", PROMPT, (), 1, more.get("temperature", 1.0), seed)
                knobs = {k: v for k, v in more.items() if k != "temperature"}
                reply = await engine.reply(request, told.append, **knobs)
                engine.release(f"c{seed}")
                told[-1] = (told[-1], reply)
            await engine.close()
            return told

        return asyncio.run(play())

    return ask


@pytest.fixture
def tiny_copy(hardware):
    from stateset_ray.models import load_model

    return load_model("tiny", hardware)


def test_the_engine_samples_inside_of_the_nucleus_only(sampled):
    [(first, _)] = sampled(1, top=20)
    assert first.logprob == dict(first.top).get(first.token, first.logprob)
    likely = [token for token, _ in first.top]
    masses = [math.exp(logprob) for _, logprob in first.top]
    top_p = sum(masses[:3]) - masses[2] / 2  # the third is the one with which the mass is reached
    drawn = sampled(200, top_p=top_p, top=3)
    counts = Counter(one.token for one, _ in drawn)
    assert set(counts) == set(likely[:3])
    kept = sum(masses[:3])
    for token, mass in zip(likely[:3], masses[:3], strict=True):
        assert counts[token] / 200 == pytest.approx(mass / kept, abs=4 * math.sqrt(0.25 / 200))
    for one, reply in drawn[:5]:
        # Clients are told the policy's own probability; the reply has that of what was sampled from.
        mass = masses[likely.index(one.token)]
        assert one.logprob == pytest.approx(math.log(mass), abs=1e-4)
        assert reply.logprobs[0] == pytest.approx(math.log(mass / kept), abs=1e-4)


def test_greedy_replies_are_told_with_the_policys_probability(sampled):
    [(one, reply)] = sampled(1, temperature=0.0, top=2)
    assert reply.logprobs == (0.0,)
    assert (one.token, one.logprob) == pytest.approx(one.top[0])
    assert one.logprob < 0


def test_a_nucleus_of_everything_changes_nothing(sampled):
    assert [r.token_ids for _, r in sampled(20, top_p=1.0)] == [r.token_ids for _, r in sampled(20)]
