"""The vLLM engine against the transformers engine and against a plain forward pass of the same model."""

import asyncio
import copy

import numpy as np
import pytest
import torch

from stateset_ray.errors import InfrastructureFault, ModelError
from stateset_ray.models import TreeRows, load_model, state_tensors
from stateset_ray.policies.base import ReplyRequest
from stateset_ray.policies.transformers_engine import TransformersEngine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

STOP, SLOTS, CONTEXT = 2, 4, 192  # as in conftest.py


def request(prompt, *, name="c", seed=0, tokens=8, temperature=1.0):
    return ReplyRequest(name, tuple(prompt), (), tokens, temperature, seed)


def prompts(count, length=40):
    rng = np.random.default_rng(0)
    return [rng.integers(3, 250, length + i).tolist() for i in range(count)]


def asked(runner, engine, *requests):
    async def all_of_them():
        return await asyncio.gather(*[engine.reply(one) for one in requests])

    return runner.run(all_of_them())


def scored(model, prompt, reply, temperature):
    """Log-probabilities of a reply by one plain forward pass."""
    ids = torch.tensor([[*prompt, *reply]])
    with torch.no_grad():
        logits = model(
            input_ids=ids, position_ids=torch.arange(ids.shape[1])[None],
            rows=TreeRows([(ids.shape[1], -1)]), use_cache=False,
        ).logits[0, len(prompt) - 1 : -1]  # fmt: skip
    return torch.log_softmax(logits.float() / temperature, -1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def assert_scored(model, prompt, reply, temperature=1.0):
    found = scored(model, prompt, list(reply.token_ids), temperature).numpy()
    np.testing.assert_allclose(found, reply.logprobs, atol=1e-4)


def test_greedy_replies_are_those_of_the_transformers_engine(runner, engine, model, hardware):
    given = [request(p, name=str(i), temperature=0.0, tokens=24) for i, p in enumerate(prompts(6))]
    found = asked(runner, engine, *given)

    async def plain():
        other = TransformersEngine(
            copy.deepcopy(model), {STOP}, slots=8, max_context=CONTEXT, hardware=hardware
        )
        return await asyncio.gather(*[other.reply(one) for one in given])

    assert [r.token_ids for r in found] == [r.token_ids for r in asyncio.run(plain())]
    assert len({r.token_ids for r in found}) > 1
    assert all(r.logprobs == (0.0,) * len(r.token_ids) for r in found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampled_distribution_over_turns(runner, engine, model, temperature):
    [prompt] = prompts(1)
    for turn in range(3):
        [reply] = asked(runner, engine, request(prompt, seed=turn, temperature=temperature))
        assert_scored(model, prompt, reply, temperature)
        prompt = [*prompt, *reply.token_ids, 60, 61, 62]


def test_the_seed_decides_the_reply(runner, engine):
    given = prompts(3)
    alone = asked(runner, engine, request(given[0], seed=7))[0]
    crowded = asked(runner, engine, *[request(p, name=str(i), seed=7 + i) for i, p in enumerate(given)])[0]
    assert alone.token_ids == crowded.token_ids
    assert asked(runner, engine, request(given[0], seed=8))[0].token_ids != alone.token_ids


def test_a_reply_ends_with_its_stop_token_or_at_its_limit(runner, engine, model):
    # Almost every token is as likely: 1 of 260 ends a reply.
    found = asked(
        runner, engine,
        *[request(p, name=str(p), seed=len(p), tokens=140, temperature=2.0) for p in prompts(24, 10)],
    )  # fmt: skip
    ends = {reply.finish for reply in found}
    assert ends == {"stop", "length"}
    for reply in found:
        assert (reply.finish == "stop") == (reply.token_ids[-1] == STOP)
        assert STOP not in reply.token_ids[:-1]
        assert reply.finish == "stop" or len(reply.token_ids) == 140


def test_history_is_not_prefilled_again(runner, engine):
    [prompt] = prompts(1, 64)
    engine.forget()
    before = copy.copy(engine.stats)
    [reply] = asked(runner, engine, request(prompt, tokens=40))
    first = engine.stats.prefill_tokens - before.prefill_tokens
    asked(runner, engine, request([*prompt, *reply.token_ids, 60, 61]))
    second = engine.stats.prefill_tokens - before.prefill_tokens - first
    assert first == 64
    # The whole blocks of 32 of the first turn are known; its last token was sampled, but never computed.
    assert second == (64 + len(reply.token_ids) + 2) - (64 + len(reply.token_ids) - 1) // 32 * 32
    assert engine.stats.decode_tokens > before.decode_tokens
    assert engine.stats.seconds > before.seconds


def test_what_is_forgotten_is_computed_again(runner, engine):
    [prompt] = prompts(1, 70)
    asked(runner, engine, request(prompt))
    known = engine.stats.prefill_tokens
    asked(runner, engine, request(prompt))
    assert engine.stats.prefill_tokens - known < 70
    engine.forget()
    known = engine.stats.prefill_tokens
    asked(runner, engine, request(prompt))
    assert engine.stats.prefill_tokens - known == 70


def test_new_weights_answer_with_their_version_and_without_what_older_ones_cached(
    runner, engine, model, other, folder, hardware
):
    [prompt] = prompts(1, 70)
    first = asked(runner, engine, request(prompt, seed=3))[0]
    assert_scored(model, prompt, first)
    changed = load_model(other, hardware)
    old = engine.version
    known = engine.stats.prefill_tokens
    runner.run(engine.load_weights(old + 1, state_tensors(changed)))
    second = asked(runner, engine, request(prompt, seed=3))[0]
    try:
        assert (first.policy_version, second.policy_version) == (old, old + 1)
        assert engine.stats.prefill_tokens - known == 70  # nothing of the old version's cache was taken
        assert second.token_ids != first.token_ids
        assert_scored(changed, prompt, second)  # as any engine that was built with them
    finally:
        runner.run(engine.load_weights(old + 2, state_tensors(model)))
    third = asked(runner, engine, request(prompt, seed=3))[0]
    assert third.token_ids == first.token_ids
    assert_scored(model, prompt, third)


def test_weights_wait_for_turns_that_run_and_hold_back_those_that_begin(
    runner, engine, model, other, hardware
):
    long, late = prompts(2, 20)
    changed = state_tensors(load_model(other, hardware))
    old = engine.version

    async def main():
        running = asyncio.create_task(engine.reply(request(long, name="a", tokens=150)))
        await asyncio.sleep(0)
        loading = asyncio.create_task(engine.load_weights(old + 1, changed))
        await asyncio.sleep(0)
        held = asyncio.create_task(engine.reply(request(late, name="b")))
        replies = await running, await held
        await loading
        await engine.load_weights(old + 2, state_tensors(model))
        return [reply.policy_version for reply in replies]

    assert runner.run(main()) == [old, old + 1]


def test_weights_of_another_model_change_nothing(runner, engine, model):
    wrong = dict(state_tensors(model)) | {"model.norm.weight": torch.zeros(3)}
    with pytest.raises(ModelError, match="do not belong") as caught:
        runner.run(engine.load_weights(99, wrong))
    assert caught.value.given == ["model.norm.weight"]
    [reply] = asked(runner, engine, request(prompts(1)[0]))
    assert reply.policy_version == engine.version != 99


def test_a_cancelled_turn_is_aborted_and_leaves_the_others(runner, engine, model):
    given = prompts(SLOTS + 1, 20)

    async def main():
        doomed = [
            asyncio.create_task(engine.reply(request(p, name=f"d{i}", tokens=150)))
            for i, p in enumerate(given[:SLOTS])
        ]
        async with asyncio.timeout(60):
            while engine._llm.get_num_unfinished_requests() < SLOTS:
                await asyncio.sleep(0)
        for task in doomed:
            task.cancel()
        ended = await asyncio.gather(*doomed, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended)
        assert engine._llm.get_num_unfinished_requests() == 0
        # Weights can be loaded at once: no turn is counted as running.
        async with asyncio.timeout(60):
            await engine.load_weights(engine.version + 1, state_tensors(model))
        return await engine.reply(request(given[-1]))

    assert_scored(model, given[-1], runner.run(main()))


def test_a_prompt_beyond_the_context_is_refused(runner, engine):
    with pytest.raises(InfrastructureFault, match="exceed the engine's context"):
        asked(runner, engine, request(range(3, 203), tokens=8))


def test_a_request_that_vllm_refuses_fails_alone(runner, engine, model):
    [prompt] = prompts(1)
    with pytest.raises(InfrastructureFault, match="temperature"):
        asked(runner, engine, request(prompt, temperature=3.0))
    assert_scored(model, prompt, asked(runner, engine, request(prompt))[0])
