"""The transformers engine: true log-probabilities, caches, versions, seeds, cancellation, failure."""

import asyncio
import copy

import numpy as np
import pytest
import torch

from stateset_ray.errors import InfrastructureFault, ModelError
from stateset_ray.models import TreeRows, load_model, state_tensors
from stateset_ray.policies.base import ReplyRequest
from stateset_ray.policies.transformers_engine import TransformersEngine

STOP = 2


def make(model, hardware, slots=4, context=96):
    # The engine takes its model over; these tests compare it with the plain one.
    own = copy.deepcopy(model)
    return TransformersEngine(own, {STOP}, slots=slots, max_context=context, hardware=hardware)


def request(prompt, *, name="c", seed=0, tokens=8, temperature=1.0):
    return ReplyRequest(name, tuple(prompt), (), tokens, temperature, seed)


def scored(model, prompt, reply, temperature):
    """Log-probabilities of a reply by one plain forward pass."""
    ids = torch.tensor([[*prompt, *reply]])
    with torch.no_grad():
        logits = model(
            input_ids=ids, position_ids=torch.arange(ids.shape[1])[None],
            rows=TreeRows([(ids.shape[1], -1)]), use_cache=False,
        ).logits[0, len(prompt) - 1 : -1]  # fmt: skip
    rows = torch.log_softmax(logits.float() / temperature, -1)
    return rows.gather(1, torch.tensor(reply)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bug_10_logprobs_are_those_of_the_sampled_distribution_over_turns(tiny, hardware, temperature):
    rng = np.random.default_rng(0)

    async def talk(engine, index):
        prompt = rng.integers(3, 250, 20 + index).tolist()
        worst = 0.0
        for turn in range(4):
            reply = await engine.reply(
                request(prompt, name=f"c{index}", seed=index * 10 + turn, temperature=temperature)
            )
            expected = scored(tiny, prompt, list(reply.token_ids), temperature)
            worst = max(worst, float(np.abs(expected - np.array(reply.logprobs)).max()))
            prompt = [*prompt, *reply.token_ids, *rng.integers(3, 250, 3).tolist()]
        return worst

    async def main():
        engine = make(tiny, hardware)
        return await asyncio.gather(*[talk(engine, i) for i in range(4)])

    assert max(asyncio.run(main())) < 1e-4


def test_history_is_not_prefilled_again_and_a_shared_opening_once(tiny, hardware):
    async def main():
        engine = make(tiny, hardware)
        opening = list(range(10, 50))
        replies = await asyncio.gather(
            *[engine.reply(request(opening, name=f"c{i}", seed=i)) for i in range(4)]
        )
        first = engine.stats.prefill_tokens
        again = [*opening, *replies[0].token_ids, 60, 61]
        await engine.reply(request(again, name="c0", seed=9))
        return first, engine.stats.prefill_tokens - first

    shared, second = asyncio.run(main())
    assert shared == 40 + 3  # the opening once, and for each other conversation its last token
    assert second == 1 + 2  # the last sampled token, which had no entry yet, and the suffix


def test_the_seed_decides_the_reply_whatever_else_is_in_the_batch(tiny, hardware):
    async def alone():
        return await make(tiny, hardware).reply(request(range(5, 25), seed=7))

    async def crowded():
        engine = make(tiny, hardware)
        others = [engine.reply(request(range(30 + i, 60), name=f"o{i}", seed=i)) for i in range(3)]
        return (await asyncio.gather(engine.reply(request(range(5, 25), seed=7)), *others))[0]

    one, two = asyncio.run(alone()), asyncio.run(crowded())
    assert one.token_ids == two.token_ids
    other = asyncio.run(_one(tiny, hardware, seed=8))
    assert other.token_ids != one.token_ids


async def _one(model, hardware, seed):
    return await make(model, hardware).reply(request(range(5, 25), seed=seed))


def test_sampling_follows_the_distribution(tiny, hardware):
    prompt = list(range(5, 25))
    with torch.no_grad():
        ids = torch.tensor([prompt])
        logits = tiny(
            input_ids=ids, position_ids=torch.arange(20)[None], rows=TreeRows([(20, -1)]), use_cache=False
        )
    probabilities = torch.softmax(logits.logits[0, -1] / 0.5, -1).double().numpy()

    async def main():
        engine = make(tiny, hardware, slots=100)
        asked = [
            engine.reply(request(prompt, name=f"c{i}", seed=i, tokens=1, temperature=0.5))
            for i in range(3000)
        ]
        return [r.token_ids[0] for r in await asyncio.gather(*asked)]

    drawn = np.bincount(asyncio.run(main()), minlength=len(probabilities))
    expected = probabilities * 3000
    statistic = ((drawn - expected) ** 2 / expected).sum()
    cells = len(probabilities) - 1
    assert abs(statistic - cells) < 5 * np.sqrt(2 * cells)


def test_greedy_is_the_argmax_and_certain(tiny, hardware):
    async def main():
        return await make(tiny, hardware).reply(request(range(5, 25), temperature=0.0, tokens=3))

    reply = asyncio.run(main())
    ids = torch.tensor([[*range(5, 25)]])
    with torch.no_grad():
        logits = tiny(
            input_ids=ids, position_ids=torch.arange(20)[None], rows=TreeRows([(20, -1)]), use_cache=False
        )
    assert reply.token_ids[0] == int(logits.logits[0, -1].argmax())
    assert set(reply.logprobs) == {0.0}


def test_bug_21_new_weights_come_between_turns_and_forget_every_cache(hardware):
    model = load_model("tiny", hardware)
    changed = {
        name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in state_tensors(model).items()
    }

    async def main():
        engine = make(model, hardware)
        prompt = list(range(5, 45))
        running = asyncio.create_task(engine.reply(request(prompt, tokens=20)))
        await asyncio.sleep(0)
        loading = asyncio.create_task(engine.load_weights(7, changed))
        await asyncio.sleep(0)
        late = asyncio.create_task(engine.reply(request(prompt, name="d", tokens=4)))
        before = await running
        await loading
        return prompt, before, await late

    prompt, before, after = asyncio.run(main())
    assert (before.policy_version, after.policy_version) == (0, 7)
    model.load_state_dict(changed, strict=False)
    # A stale entry anywhere would show as a difference here.
    assert np.abs(scored(model, prompt, list(after.token_ids), 1.0) - np.array(after.logprobs)).max() < 1e-4


def test_an_engine_that_sleeps_holds_nothing_and_wakes_with_new_weights(tiny, hardware):
    model = copy.deepcopy(tiny)
    weights = {name: tensor.clone() for name, tensor in state_tensors(model).items()}

    async def main():
        engine = TransformersEngine(model, {STOP}, slots=4, max_context=96, hardware=hardware)
        await engine.load_weights(1, weights)
        first = await engine.reply(request(range(5, 45), tokens=12))
        running = asyncio.create_task(engine.reply(request(range(5, 45), name="r", tokens=12)))
        await asyncio.sleep(0)
        await engine.sleep()
        assert (await running).token_ids == first.token_ids  # it was let to end
        await engine.sleep()  # again: nothing happens
        held = sum(t.numel() for t in state_tensors(model).values()) + engine._cache.entries.numel()
        early = asyncio.create_task(engine.reply(request(range(5, 45), name="e", tokens=12)))
        with pytest.raises(ModelError):
            await engine.load_weights(2, {"lm_head.weight": torch.zeros(2, 2)})
        for _ in range(20):
            await asyncio.sleep(0)
        asked_early = early.done()
        await engine.load_weights(2, weights)
        return first, held, asked_early, await early

    first, held, asked_early, again = asyncio.run(main())
    assert held == 0
    assert not asked_early
    assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)
    assert again.policy_version == 2


def test_weights_of_another_model_change_nothing(tiny, hardware):
    async def main():
        engine = make(tiny, hardware)
        with pytest.raises(ModelError, match="do not belong"):
            await engine.load_weights(3, {"lm_head.weight": torch.zeros(2, 2)})
        return engine.version, await engine.reply(request(range(5, 9)))

    version, reply = asyncio.run(main())
    assert version == 0
    assert reply.token_ids


def test_a_cancelled_turn_leaves_the_others_and_frees_its_slot(tiny, hardware):
    async def main():
        engine = make(tiny, hardware, slots=2)
        doomed = asyncio.create_task(engine.reply(request(range(5, 25), name="a", tokens=60)))
        kept = asyncio.create_task(engine.reply(request(range(30, 50), name="b", tokens=30)))
        await asyncio.sleep(0.01)
        doomed.cancel()
        await kept
        engine.release("a")
        return await asyncio.gather(*[engine.reply(request(range(5, 9), name=n)) for n in "cde"])

    assert len(asyncio.run(main())) == 3


def test_more_conversations_than_slots_still_all_answer(tiny, hardware):
    async def main():
        engine = make(tiny, hardware, slots=2)
        first = await asyncio.gather(
            *[engine.reply(request(range(5, 25), name=f"c{i}", seed=i)) for i in range(7)]
        )
        prompts = [[*range(5, 25), *r.token_ids, 60] for r in first]
        return prompts, await asyncio.gather(
            *[engine.reply(request(p, name=f"c{i}", seed=i)) for i, p in enumerate(prompts)]
        )

    prompts, second = asyncio.run(main())
    for prompt, reply in zip(prompts, second, strict=True):
        assert (
            np.abs(scored(tiny, prompt, list(reply.token_ids), 1.0) - np.array(reply.logprobs)).max() < 1e-4
        )


def test_a_broken_model_fails_its_conversations_with_a_reason_and_the_engine_lives(hardware):
    model = load_model("tiny", hardware)
    good = {name: tensor.clone() for name, tensor in state_tensors(model).items()}

    async def main():
        engine = make(model, hardware)
        bad = {name: torch.full_like(tensor, float("nan")) for name, tensor in good.items()}
        await engine.load_weights(1, bad)
        with pytest.raises(InfrastructureFault, match="finite"):
            await engine.reply(request(range(5, 9)))
        await engine.load_weights(2, good)
        return await engine.reply(request(range(5, 9)))

    assert asyncio.run(main()).policy_version == 2


def test_a_prompt_beyond_the_context_is_refused(tiny, hardware):
    async def main():
        await make(tiny, hardware, context=16).reply(request(range(5, 20), tokens=8))

    with pytest.raises(InfrastructureFault, match="exceed the engine's context"):
        asyncio.run(main())


def test_two_turns_of_one_conversation_do_not_write_into_one_slot(tiny, hardware):
    """A caller that died, and its retry elsewhere, ask for the same conversation at the same time."""

    async def main():
        engine = make(tiny, hardware)
        prompt = list(range(5, 25))
        orphan = asyncio.create_task(engine.reply(request(prompt, tokens=20)))
        await asyncio.sleep(0.01)
        again = await engine.reply(request(prompt, tokens=20))
        return prompt, again, await orphan

    prompt, again, orphan = asyncio.run(main())
    assert again.token_ids == orphan.token_ids
    for reply in (again, orphan):
        found = scored(tiny, prompt, list(reply.token_ids), 1.0)
        assert np.abs(found - np.array(reply.logprobs)).max() < 1e-4


def test_a_slot_that_is_released_under_a_running_turn_is_not_given_away(tiny, hardware):
    async def main():
        engine = make(tiny, hardware, slots=1)
        prompt = list(range(5, 25))
        running = asyncio.create_task(engine.reply(request(prompt, name="a", tokens=20)))
        await asyncio.sleep(0.01)
        engine.release("a")
        other = await engine.reply(request(range(40, 60), name="b", tokens=8))
        return prompt, await running, other

    prompt, running, other = asyncio.run(main())
    for asked, reply in ((prompt, running), (list(range(40, 60)), other)):
        found = scored(tiny, asked, list(reply.token_ids), 1.0)
        assert np.abs(found - np.array(reply.logprobs)).max() < 1e-4
