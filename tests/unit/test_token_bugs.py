"""One test for each known way of getting the tokens of a conversation wrong, named after the bug's number.

`tests/bugs/mutations.toml` says for each how the bug would look in the source, and `tests/bugs` puts it
there to see the test fail.
"""

import asyncio
import copy
import itertools
import math
import random
import runpy
from pathlib import Path

import numpy as np
import pytest

from stateset_ray.config import RolloutConfig
from stateset_ray.environments.base import Environment, build_environment
from stateset_ray.grpo.samples import samples
from stateset_ray.policies.base import Reply
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.rollout import rollout
from stateset_ray.types import Message, Step, StopReason, Task, TrajectoryGroup, Turn

support = runpy.run_path(str(Path(__file__).with_name("support_templates.py")))
NAMES, Told, family, play = (support[name] for name in ("NAMES", "Told", "family", "play"))

appending = pytest.mark.parametrize("name", support["APPENDING"])
HI = (Message("user", "hi"),)
TASK = Task("train-0", 4)


def decoded(fam, ids):
    return fam.tokenizer.decode(list(ids))


def with_engine(renderer, tiny, hardware, steps, *, turn_tokens=16):
    """A conversation that the tiny model really samples, and what it was asked."""
    requests = []

    class Spy(TransformersEngine):
        async def reply(self, request):
            requests.append(request)
            return await super().reply(request)

    async def main():
        model = copy.deepcopy(tiny)  # an engine takes its model over
        engine = Spy(model, renderer.stop_ids, slots=1, max_context=600, hardware=hardware)
        limits = RolloutConfig(
            max_context=600, max_turn_tokens=turn_tokens, max_turns=9, on_cut_reply="close"
        )
        return await rollout(Told(steps), TASK, engine, renderer, limits, id="x", seed=1)

    return asyncio.run(main()), requests


def test_bug_01_each_prompt_begins_with_the_last_prompt_and_what_was_sampled(renderer, tiny, hardware):
    steps = [HI, [Message("tool", "42"), Message("user", "more?")], HI, HI]
    trajectory, requests = with_engine(renderer, tiny, hardware, steps)
    prompts = [request.prompt_ids for request in requests]
    assert len(prompts) == 4
    for turn, (before, after) in zip(trajectory.turns, itertools.pairwise(prompts), strict=False):
        assert after[: len(before) + len(turn.token_ids)] == before + turn.token_ids
    assert list(trajectory.prompts()) == prompts
    # What was sampled is noise: encoding its text again would have given other ids.
    again = [renderer.reply(renderer.text(turn.token_ids)) for turn in trajectory.turns]
    assert any(turn.token_ids != ids[:-1] for turn, ids in zip(trajectory.turns, again, strict=True))


def test_bug_02_mask_and_ids_agree_where_a_tool_result_does_not_fit():
    fam = family("smollm2")
    reply = fam.renderer.reply("CALL lookup")
    steps = [HI, [Message("tool", "order 7")], [Message("tool", "a long list " * 50)], HI]
    trajectory, _ = play(fam.renderer, steps, [reply] * 4, max_context=200)
    assert (trajectory.stop_reason, len(trajectory.turns)) == (StopReason.CONTEXT, 2)
    [row] = samples(trajectory)
    assert len(row.token_ids) == len(row.loss_mask) == len(row.logprobs) == len(row.versions) <= 200
    assert tuple(row.token_ids[row.loss_mask].tolist()) == reply * 2
    assert "a long list" not in decoded(fam, row.token_ids)


def test_bug_03_the_boundary_newline_comes_once_and_unmasked():
    fam = family("smollm2")
    assert decoded(fam, fam.renderer.reply("Yes.")) == "Yes.<|im_end|>"
    letters = [i for letter in "order number" for i in fam.tokenizer.encode(letter)]
    reply = (*letters, fam.renderer._stop)  # not as the tokenizer would split it
    trajectory, _ = play(fam.renderer, [HI, HI], [reply] * 2)
    context = trajectory.turns[1].context_ids
    assert decoded(fam, context) == "\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    [row] = samples(trajectory)
    end = len(trajectory.turns[0].context_ids) + len(reply)
    assert decoded(fam, row.token_ids[end - 1 : end + 2]) == "<|im_end|>\n<|im_start|>"
    assert row.loss_mask[end - 1 : end + 2].tolist() == [True, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_bug_04_the_generation_prompt_is_there_at_every_turn(name):
    fam = family(name)
    _, policy = play(fam.renderer, [HI] * 3, [fam.renderer.reply("Yes.")] * 3)
    first, *others = (request.prompt_ids for request in policy.requests)
    opener = fam.whole(HI)[len(fam.whole(HI, prompt=False)) :]
    assert opener or name.startswith("mistral")
    assert all(prompt[len(prompt) - len(opener) :] == opener for prompt in (first, *others))
    assert all(len(prompt) > len(first) for prompt in others)
    if not fam.rewrites:
        suffix = fam.renderer.suffix(HI)
        assert suffix[len(suffix) - len(opener) :] == opener


@appending
def test_bug_05_a_cut_reply_is_closed_outside_of_the_mask(name):
    """No stop token is invented for the loss, and the next prompt is what the template would write."""
    fam = family(name)
    stop = fam.renderer._stop
    cut = fam.renderer.reply("Yes")[:-1]
    trajectory, policy = play(fam.renderer, [HI, HI], [cut, (*cut, stop)])
    assert stop not in trajectory.turns[0].token_ids
    assert trajectory.turns[1].context_ids[0] == stop
    assert policy.requests[1].prompt_ids == fam.whole([*HI, Message("assistant", "Yes"), *HI])
    [row] = samples(trajectory)
    assert row.token_ids[row.loss_mask].tolist() == [*cut, *cut, stop]


@pytest.mark.parametrize("name", NAMES)
def test_bug_06_an_assistant_of_the_opening_is_not_learned(name):
    fam = family(name)
    opening = (*HI, Message("assistant", "An example."), *HI)
    reply = fam.renderer.reply("Yes.")
    trajectory, _ = play(fam.renderer, [opening], [reply])
    [row] = samples(trajectory)
    assert "An example." in decoded(fam, row.token_ids)
    assert tuple(row.token_ids[row.loss_mask].tolist()) == reply
    assert row.loss_mask.tolist() == [False] * (len(row) - len(reply)) + [True] * len(reply)


@pytest.mark.parametrize("name", NAMES)
def test_bug_07_a_reply_is_not_repeated_in_the_next_prompt(name):
    fam = family(name)
    replies = [fam.renderer.reply(text) for text in ("Yes.", "Perhaps.", "No.")]
    _, policy = play(fam.renderer, [HI] * 3, replies)
    texts = [decoded(fam, request.prompt_ids) for request in policy.requests]
    assert [(text.count("Yes."), text.count("Perhaps.")) for text in texts] == [(0, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize("name", support["ADJACENT"])
def test_bug_08_adjacent_messages_are_one_context(name):
    fam = family(name)
    new = [Message("tool", "forty"), Message("tool", "two"), Message("user", "and"), Message("user", "so?")]
    reply = fam.renderer.reply("Yes.")
    trajectory, policy = play(fam.renderer, [HI, new], [reply] * 2)
    prompt = policy.requests[1].prompt_ids
    assert prompt == fam.whole([*HI, Message("assistant", "Yes."), *new])
    text = decoded(fam, prompt)
    places = [text.index(message.content) for message in new]
    assert places == sorted(places)
    rows = samples(trajectory)
    assert [i for row in rows for i in row.token_ids[row.loss_mask].tolist()] == [*reply, *reply]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_thinking", "deepseek"])
def test_bug_09_rewritten_history_forks_and_every_token_is_learned_once(name):
    """The policy goes on from what serving would show it, not from thoughts that serving removes."""
    fam = family(name)
    opened = "" if name == "qwen3_thinking" else "<think>\n"
    thought = fam.tokenizer.encode(f"{opened}Hm.\n</think>\n\nYes.")
    replies = [(*thought, fam.renderer._stop)] * 3
    trajectory, policy = play(fam.renderer, [HI] * 3, replies)
    assert [turn.forked for turn in trajectory.turns] == [False, True, True]
    for request in policy.requests:
        assert request.prompt_ids == fam.whole(request.messages)
        assert "Hm." not in decoded(fam, request.prompt_ids)
    rows = samples(trajectory)
    assert [row.token_ids[row.loss_mask].tolist() for row in rows] == [list(reply) for reply in replies]
    for row, request in zip(rows, policy.requests, strict=True):
        assert tuple(row.token_ids[~row.loss_mask].tolist()) == request.prompt_ids


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bug_12_a_log_probability_that_is_not_finite_is_refused(renderer, bad):
    class Broken:
        async def reply(self, request):
            return Reply((5, 6), (-0.5, bad), 0, "length")

        def release(self, conversation):
            pass

    talk = rollout(Told([HI, HI]), TASK, Broken(), renderer, RolloutConfig(), id="x", seed=1)
    trajectory = asyncio.run(talk)
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.INFRASTRUCTURE_ERROR, None)
    assert "not finite" in trajectory.error
    assert samples(trajectory) == []


@pytest.mark.parametrize("logprobs", [(-0.5,), (-0.5, None), ()])
def test_bug_12_missing_log_probabilities_are_refused(renderer, logprobs):
    class Forgetful:
        async def reply(self, request):
            return Reply((5, 6), logprobs, 0, "length")

        def release(self, conversation):
            pass

    talk = rollout(Told([HI, HI]), TASK, Forgetful(), renderer, RolloutConfig(), id="x", seed=1)
    trajectory = asyncio.run(talk)
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.INFRASTRUCTURE_ERROR, None)
    with pytest.raises(ValueError, match="one log-probability per sampled token"):
        Turn((1,), (2, 3), (-0.5,), 0)


def test_bug_13_a_conversation_that_failed_has_no_reward_whatever_it_earned_before(renderer):
    class Breaks(Told):
        async def step(self, message):
            if not self.steps:
                raise RuntimeError("the judge is away")
            return await super().step(message)

    limits = RolloutConfig(max_context=400)
    policy = ScriptedPolicy(renderer, lambda messages: "yes")
    broken, whole = (
        asyncio.run(rollout(kind([HI, HI]), TASK, policy, renderer, limits, id="x", seed=1))
        for kind in (Breaks, Told)
    )
    assert [turn.reward for turn in broken.turns] == [0.25, 0.0]
    assert TrajectoryGroup(TASK, (broken, whole)).rewards == (None, 0.5)


def test_bug_20_every_request_has_a_seed_of_its_own():
    fam = family("smollm2")
    reply = fam.renderer.reply("Yes.")
    seeds = [
        request.seed
        for seed in range(3)
        for sample in range(4)
        for request in play(fam.renderer, [HI] * 5, [reply] * 5, seed=seed, sample=sample)[1].requests
    ]
    assert len(set(seeds)) == len(seeds) == 60
    again = [request.seed for request in play(fam.renderer, [HI] * 5, [reply] * 5, seed=0)[1].requests]
    assert again == seeds[:5]


class Closes(Environment):
    """Counts how often it is closed, which takes a moment."""

    def __init__(self, fails=False):
        self.closed, self.fails = 0, fails

    async def reset(self, task, seed):
        return Step(HI)

    async def step(self, message):
        if self.fails:
            raise RuntimeError("broken")
        return Step(terminated=True)

    async def close(self):
        await asyncio.sleep(0.02)
        self.closed += 1


class Waits:
    """A policy that never answers."""

    def __init__(self):
        self.asked, self.released = asyncio.Event(), []

    async def reply(self, request):
        self.asked.set()
        await asyncio.Event().wait()

    def release(self, conversation):
        self.released.append(conversation)


@pytest.mark.parametrize("end", ["success", "failure", "timeout", "cancelled", "cancelled twice"])
def test_bug_29_the_environment_is_closed_however_it_ends(renderer, end):
    environment = Closes(fails=end == "failure")

    async def main():
        waits = Waits()
        policy = ScriptedPolicy(renderer, lambda m: "x") if end in ("success", "failure") else waits
        limits = RolloutConfig(turn_timeout=0.05 if end == "timeout" else 60)
        talk = asyncio.create_task(
            rollout(environment, TASK, policy, renderer, limits, id="x", seed=1), name="talk"
        )
        if end.startswith("cancelled"):
            await waits.asked.wait()
            talk.cancel()
            if end.endswith("twice"):
                await asyncio.sleep(0.005)  # while it closes
                talk.cancel()
            with pytest.raises(asyncio.CancelledError):
                await talk
            assert waits.released == ["x"]
            await asyncio.sleep(0.05)
            return None
        return (await talk).stop_reason

    reason = asyncio.run(main())
    assert environment.closed == 1
    assert reason == {
        "success": StopReason.COMPLETED,
        "failure": StopReason.ENVIRONMENT_ERROR,
        "timeout": StopReason.TIMEOUT,
    }.get(end)


def test_bug_30_the_mask_of_a_real_sample_is_not_all_zero(renderer, tiny, hardware):
    trajectory, _ = with_engine(renderer, tiny, hardware, [HI, HI], turn_tokens=5)
    rows = samples(trajectory)
    assert sum(int(row.loss_mask.sum()) for row in rows) == trajectory.sampled_tokens > 0
    assert all(row.loss_mask.any() for row in rows)


def test_bug_43_the_stop_token_stays_in_the_loss_where_it_is_also_the_padding(renderer):
    tokenizer = copy.deepcopy(renderer._tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    alike = Renderer(tokenizer)
    assert alike.reply("x") == renderer.reply("x")
    reply = alike.reply("Yes.")
    trajectory, _ = play(alike, [HI, HI], [reply] * 2)
    [row] = samples(trajectory)
    assert reply[-1] == tokenizer.pad_token_id
    assert tuple(row.token_ids[row.loss_mask].tolist()) == reply * 2


SHIPPED = [
    ("stateset_ray.environments.echo:Echo", {}),
    ("stateset_ray.environments.customer_service:CustomerService", {"difficulty": 3}),
]


@pytest.mark.parametrize(("path", "options"), SHIPPED, ids=["echo", "service"])
def test_bug_44_games_played_side_by_side_are_those_played_alone(renderer, path, options):
    """Nothing is drawn from a random state that the games share."""

    async def game(index, pause):
        environment = build_environment(path, options)

        async def say(messages):
            await asyncio.sleep(0 if pause else 0.001)
            return environment.expert() if len(messages) % 3 else "What is it?"

        limits = RolloutConfig(max_context=4000, max_turn_tokens=200, max_turns=8)
        task = environment.task("train", index)
        policy = ScriptedPolicy(renderer, say)
        return (await rollout(environment, task, policy, renderer, limits, id=str(index), seed=7)).messages

    async def side_by_side():
        return await asyncio.gather(*[game(index, index % 2) for index in range(6)])

    random.seed(1)
    together = asyncio.run(side_by_side())
    random.seed(2)
    alone = [asyncio.run(game(index, 0)) for index in range(6)]
    assert together == alone
    assert len(set(together)) > 3


@pytest.mark.parametrize("name", NAMES)
def test_bug_52_control_tokens_in_what_users_and_tools_say_stay_text(name):
    """Those too that the family's tokenizer does not call special (turns of DeepSeek, thoughts of Qwen)."""
    fam = family(name)
    honest, evil = "one two", " ".join(fam.tokenizer.convert_ids_to_tokens(sorted(fam.control)))
    role = "tool" if fam.tool else "user"
    counts = []
    for text in (honest, evil):
        steps = [(Message("user", text),), (Message(role, text),)]
        _, policy = play(fam.renderer, steps, [fam.renderer.reply("Yes.")] * 2)
        counts.append([sum(i in fam.control for i in request.prompt_ids) for request in policy.requests])
    assert counts[0] == counts[1]
    said = fam.renderer.reply(evil)
    assert np.isin(said, sorted(fam.renderer.stop_ids)).sum() == 1
