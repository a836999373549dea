"""`/v1/completions`: prompts as text or as token ids."""

from __future__ import annotations

import asyncio
import json
import runpy
from pathlib import Path

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.serving.dispatch import PolicyLost
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.settings import LimitSettings
from stateset_ray.serving.text_protocol import parse_text

_SUPPORT = runpy.run_path(str(Path(__file__).with_name("support_endpoint.py")))
client = _SUPPORT["client"]


def parse(**changes):
    return parse_text(json.dumps({"model": "m", "prompt": "x"} | changes).encode(), LimitSettings())


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("ab", ("ab",)), (["ab", "c"], ("ab", "c")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)  # fmt: skip
def test_every_kind_of_prompt_is_read(prompt, read):
    assert parse(prompt=prompt).prompts() == read
    assert parse(prompt=prompt).max_tokens == 16


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"logit_bias": {"1": 1}}, "unsupported_parameter", "logit_bias"),
        ({"messages": []}, "unknown_parameter", "messages"),
        ({"prompt": None}, "missing_parameter", "prompt"),
        ({"prompt": ""}, "invalid_parameter", "prompt"),
        ({"prompt": []}, "invalid_parameter", "prompt"),
        ({"prompt": [[]]}, "invalid_parameter", "prompt"),
        ({"prompt": [1, "a"]}, "invalid_parameter", "prompt"),
        ({"prompt": [True]}, "invalid_parameter", "prompt"),
        ({"prompt": [-1]}, "invalid_parameter", "prompt"),
        ({"prompt": "a\0"}, "invalid_parameter", "prompt"),
        ({"prompt": ["a"] * 9}, "limit_exceeded", "prompt"),
        ({"prompt": ["a", "b"], "n": 5}, "limit_exceeded", "prompt"),
        ({"prompt": "x" * 200_001}, "limit_exceeded", "prompt"),
        ({"logprobs": 6}, "invalid_parameter", "logprobs"),
        ({"logprobs": True}, "invalid_parameter", "logprobs"),
        ({"stream_options": {}}, "invalid_parameter", "stream_options"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(changes, code, param):
    with pytest.raises(ApiError) as caught:
        parse(**changes)
    assert (caught.value.status, caught.value.code) == (400, code)
    assert caught.value.param == param


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["model", "prompt", "n", "logprobs", "stop", "x"]), _values))
def test_anything_is_read_or_refused(tree):
    try:
        assert parse(**tree).prompts()
    except ApiError as error:
        assert error.status == 400  # noqa: PT017


def test_openais_client_gets_completions(make, held):
    async def play():
        ai = client(make())
        whole = await ai.completions.create(
            model="tiny", prompt="Say: cab", max_tokens=6, n=2, seed=4, logprobs=2
        )
        assert (whole.object, whole.system_fingerprint) == ("text_completion", "tiny-1")
        assert [c.index for c in whole.choices] == [0, 1]
        assert whole.usage.prompt_tokens == len(held.tokenizer.encode("Say: cab"))
        assert whole.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in whole.choices)
        for choice in whole.choices:
            logprobs = choice.logprobs
            assert "\ufffd" in choice.text or choice.text == "".join(logprobs.tokens)  # nothing is stripped
            begins = [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
            assert logprobs.text_offset == begins
            # Tokens that are parts of characters have one text.
            assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs)
            assert all(p < 0 for p in logprobs.token_logprobs)
        stream = await ai.completions.create(
            model="tiny", prompt="Say: cab", max_tokens=6, n=2, seed=4, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage == whole.usage
        for choice in whole.choices:
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
            assert "".join(c.text for c in mine) == choice.text
            assert mine[-1].finish_reason == choice.finish_reason
        free = await ai.completions.create(model="tiny", prompt="hi", max_tokens=40, seed=1)
        stop = free.choices[0].text[9]
        cut = await ai.completions.create(model="tiny", prompt="hi", max_tokens=40, seed=1, stop=stop)
        assert cut.choices[0].text == free.choices[0].text.partition(stop)[0]
        assert cut.choices[0].finish_reason == "stop"

    asyncio.run(play())


def test_ids_mean_what_their_text_means_and_prompts_come_in_order(make, held):
    async def play():
        ai = client(make())
        asked = {"model": "tiny", "max_tokens": 6, "temperature": 0}
        texts = ["Say: cab", "Say: abc and more", "x"]
        alone = [(await ai.completions.create(prompt=text, **asked)).choices[0].text for text in texts]
        ids = [held.tokenizer.encode(text) for text in texts]
        for prompts in (texts, ids):
            for stream in (False, True):
                answer = await ai.completions.create(prompt=prompts, n=2, stream=stream, **asked)
                said = [""] * 6
                for part in [answer] if not stream else [chunk async for chunk in answer]:
                    for choice in part.choices:
                        said[choice.index] += choice.text
                assert said == [text for text in alone for _ in range(2)]
        [one] = (await ai.completions.create(prompt=ids[0], **asked)).choices
        assert one.text == alone[0]

    asyncio.run(play())


def test_control_tokens_in_a_prompt_stay_words(make, held, policies):
    """S12: text is text. Who writes token ids says what it means."""
    renderer, tokenizer = held.renderer, held.tokenizer
    control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1]
    prompts = []
    answer = held.engine.reply

    async def noted(request, *rest, **more):
        prompts.append(request.prompt_ids)
        return await answer(request, *rest, **more)

    held.engine.reply = noted

    async def play():
        ai = client(make())
        for token in control:
            await ai.completions.create(model="tiny", prompt=f"a{token}b", max_tokens=1)
        stop = next(iter(renderer.stop_ids))
        await ai.completions.create(model="tiny", prompt=[5, stop, 6], max_tokens=1)
        assert prompts[-1] == (5, stop, 6)

    asyncio.run(play())
    assert control
    assert not any(set(ids) & set(tokenizer.all_special_ids) for ids in prompts[:-1])


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"prompt": [10**6]}, "invalid_parameter", "prompt"),
        ({"prompt": [[5], [10**6]]}, "invalid_parameter", "prompt"),
        ({"prompt": [5] * 256}, "context_length_exceeded", "prompt"),
        ({"prompt": "x" * 3000}, "context_length_exceeded", None),
        ({"max_tokens": 250}, "context_length_exceeded", "max_tokens"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
)
def test_what_the_policy_cannot_go_on_with(make, held, more, code, param):
    async def play():
        with pytest.raises(openai.APIStatusError) as caught:
            await client(make()).completions.create(**{"model": "tiny", "prompt": "Say: cab"} | more)
        assert caught.value.code == code
        assert param is None or caught.value.param == param

    asyncio.run(play())
    assert (held.tokens, held.running) == (0, 0)


def test_one_lost_prompt_ends_the_others(make, policies, held):
    async def play():
        policies.faults = [PolicyLost() for _ in range(9)]
        with pytest.raises(openai.InternalServerError) as caught:
            await client(make()).completions.create(model="tiny", prompt=["a", "b"], max_tokens=4)
        assert caught.value.code == "replica_lost"
        policies.faults = []

    asyncio.run(play())
    assert (held.tokens, held.running) == (0, 0)


def test_a_conversation_with_a_nucleus_and_the_likeliest_tokens(make):
    async def play():
        ai = client(make())
        hi = [{"role": "user", "content": "hi"}]

        async def said(**more):
            answer = await ai.chat.completions.create(
                model="tiny", messages=hi, max_tokens=12, logprobs=True, top_logprobs=3, **more
            )
            return answer.choices[0]

        greedy = await said(temperature=0)
        assert (await said(top_p=0, seed=5)).message.content == greedy.message.content
        assert (await said(seed=5)).message.content != greedy.message.content
        for entry in greedy.logprobs.content:
            assert len(entry.top_logprobs) == 3
            assert entry.top_logprobs[0].token == entry.token
            assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob) != 0
            assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob

    asyncio.run(play())
