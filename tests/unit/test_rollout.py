"""The inner loop: limits, stop reasons, failures as data, cleanup, what is written down."""

import asyncio
import copy
import time

import numpy as np
import pytest

from stateset_ray.config import RolloutConfig
from stateset_ray.environments.base import Environment
from stateset_ray.environments.boundary import ask
from stateset_ray.errors import InfrastructureFault
from stateset_ray.policies.base import Reply
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.rollout import rollout
from stateset_ray.types import Message, Step, StopReason, Task

TASK = Task("train-0", 4)


class Chat(Environment):
    """Asks on and on; each reply earns its length in tenths. Subclasses misbehave."""

    def __init__(self):
        self.closed = 0
        self.heard = []

    async def reset(self, task, seed):
        return Step((Message("system", "be brief"), Message("user", "hi")))

    async def step(self, message):
        self.heard.append(message.content)
        return Step(
            (Message("tool", "42"), Message("user", "more?")), reward=0.5, terminated=len(self.heard) == 3
        )

    def close(self):
        self.closed += 1


def play(environment, policy, renderer, **limits):
    limits = RolloutConfig(**{"max_context": 400, "max_turn_tokens": 40, "max_turns": 5, **limits})
    return asyncio.run(rollout(environment, TASK, policy, renderer, limits, id="r/0/train-0/0/0", seed=1))


def test_a_whole_conversation(renderer):
    environment = Chat()
    trajectory = play(environment, ScriptedPolicy(renderer, lambda m: f"reply {len(m)}", version=3), renderer)
    assert trajectory.stop_reason is StopReason.COMPLETED
    assert trajectory.reward == 1.5
    assert environment.heard == ["reply 2", "reply 5", "reply 8"]
    assert [m.role for m in trajectory.messages[:5]] == ["system", "user", "assistant", "tool", "user"]
    assert {turn.policy_version for turn in trajectory.turns} == {3}
    assert environment.closed == 1


@pytest.mark.parametrize(
    ("limits", "reason", "turns"),
    [
        ({"max_turns": 2}, StopReason.MAX_TURNS, 2),
        ({"max_turn_tokens": 3}, StopReason.TURN_TOKENS, 1),
        ({"max_turn_tokens": 3, "on_cut_reply": "close"}, StopReason.COMPLETED, 3),
        ({"max_sampled_tokens": 10}, StopReason.SAMPLED_TOKENS, 2),
        ({"max_context": 75}, StopReason.CONTEXT, 1),
    ],
)
def test_every_limit_has_its_name(renderer, limits, reason, turns):
    trajectory = play(Chat(), ScriptedPolicy(renderer, lambda m: "abcde"), renderer, **limits)
    assert (trajectory.stop_reason, len(trajectory.turns)) == (reason, turns)
    assert trajectory.reward == 0.5 * turns
    assert reason.truncated == (reason is not StopReason.COMPLETED)
    total = sum(len(t.context_ids) + len(t.token_ids) for t in trajectory.turns)
    assert total <= limits.get("max_context", 400)
    assert trajectory.sampled_tokens <= limits.get("max_sampled_tokens", 400)


def test_an_environment_may_truncate(renderer):
    class Impatient(Chat):
        async def step(self, message):
            return Step(reward=-0.5, truncated=True)

    trajectory = play(Impatient(), ScriptedPolicy(renderer, lambda m: "x"), renderer)
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.ENVIRONMENT_LIMIT, -0.5)


class Raises(Chat):
    async def step(self, message):
        raise KeyError("order")


class RaisesInThread(Chat):
    def step(self, message):
        raise TimeoutError("the database is away")


class Hangs(Chat):
    async def step(self, message):
        await asyncio.Event().wait()


class BlocksAThread(Chat):
    def step(self, message):
        time.sleep(1.0)
        return Step()


class Garbage(Chat):
    async def step(self, message):
        return "ok"


class SpeaksForThePolicy(Chat):
    async def step(self, message):
        return Step((Message("assistant", "no"),))


class Silent(Chat):
    async def reset(self, task, seed):
        return Step()


class PaysForNothing(Chat):
    async def reset(self, task, seed):
        return Step((Message("user", "hi"),), reward=1.0)


class NotANumber(Chat):
    async def step(self, message):
        return Step(reward=float("nan"))


class NoNumber(Chat):
    async def step(self, message):
        return Step(reward="much")


class HalfACharacter(Chat):
    async def step(self, message):
        return Step((Message("user", "\ud83d"),))


class NotText(Chat):
    async def step(self, message):
        return Step((Message("user", 5),))


def returns(**fields):
    """An environment whose steps have such fields."""

    class Odd(Chat):
        async def step(self, message):
            return Step(**fields)

    return Odd


@pytest.mark.parametrize(
    ("kind", "reason", "says"),
    [
        (returns(messages=None), StopReason.ENVIRONMENT_ERROR, "whose messages are Message objects"),
        (returns(messages=("hi",)), StopReason.ENVIRONMENT_ERROR, "whose messages are Message objects"),
        (returns(info=None), StopReason.ENVIRONMENT_ERROR, "whose info is a mapping"),
        (returns(rewards=None), StopReason.ENVIRONMENT_ERROR, "whose rewards are numbers by name"),
        (returns(rewards={3: 1.0}), StopReason.ENVIRONMENT_ERROR, "whose rewards are numbers by name"),
        (returns(rewards={"a": None}), StopReason.REWARD_ERROR, "not a finite number"),
        (returns(reward=10**400), StopReason.REWARD_ERROR, "not a finite number"),
        (returns(reward=np.float32("inf")), StopReason.REWARD_ERROR, "not a finite number"),
        (HalfACharacter, StopReason.ENVIRONMENT_ERROR, "half of a surrogate pair"),
        (NotText, StopReason.ENVIRONMENT_ERROR, "is no text"),
        (Raises, StopReason.ENVIRONMENT_ERROR, "Raises.step raised KeyError: 'order'"),
        (RaisesInThread, StopReason.ENVIRONMENT_ERROR, "the database is away"),
        (Hangs, StopReason.ENVIRONMENT_ERROR, "Hangs.step took longer than rollout.environment_timeout"),
        (BlocksAThread, StopReason.ENVIRONMENT_ERROR, "took longer"),
        (Garbage, StopReason.ENVIRONMENT_ERROR, "must return a Step"),
        (SpeaksForThePolicy, StopReason.ENVIRONMENT_ERROR, "only the policy speaks as assistant"),
        (Silent, StopReason.ENVIRONMENT_ERROR, "left nothing for the policy"),
        (PaysForNothing, StopReason.REWARD_ERROR, "reset earns nothing"),
        (NotANumber, StopReason.REWARD_ERROR, "not a finite number"),
        (NoNumber, StopReason.REWARD_ERROR, "not a finite number"),
    ],
)
def test_a_bad_environment_is_data_and_never_a_reward(renderer, kind, reason, says):
    environment = kind()
    trajectory = play(environment, ScriptedPolicy(renderer, lambda m: "x"), renderer, environment_timeout=0.2)
    assert trajectory.stop_reason is reason
    assert trajectory.reward is None
    assert says in trajectory.error
    assert environment.closed == 1


def test_numbers_of_numpy_are_rewards():
    odd = returns(reward=np.float32(0.5), rewards={"a": np.int64(2), "b": 1.0}, terminated=True)
    step = asyncio.run(ask(odd(), "step", 1.0, Message("assistant", "x")))
    assert (step.reward, step.rewards) == (0.5, {"a": 2.0, "b": 1.0})
    assert {type(value) for value in (step.reward, *step.rewards.values())} == {float}


class Scripts:
    """A policy that returns what it is told to."""

    def __init__(self, act):
        self.act = act
        self.released = []

    async def reply(self, request):
        return await self.act()

    def release(self, conversation):
        self.released.append(conversation)


async def broken():
    raise InfrastructureFault("the engine is gone")


async def nothing():
    return Reply((), (), 0, "stop")


async def forever():
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("act", "reason", "says"),
    [
        (broken, StopReason.INFRASTRUCTURE_ERROR, "the engine is gone"),
        (nothing, StopReason.INFRASTRUCTURE_ERROR, "no tokens"),
        (forever, StopReason.TIMEOUT, "rollout.turn_timeout"),
    ],
)
def test_bug_35_a_failing_policy_is_no_reward_and_not_the_environments_fault(renderer, act, reason, says):
    policy, environment = Scripts(act), Chat()
    trajectory = play(environment, policy, renderer, turn_timeout=0.2)
    assert (trajectory.stop_reason, trajectory.reward) == (reason, None)
    assert says in trajectory.error
    assert (policy.released, environment.closed) == (["r/0/train-0/0/0"], 1)


def test_bug_36_a_straggler_ends_at_the_time_limit_of_its_conversation(renderer):
    trajectory = play(Chat(), Scripts(forever), renderer, turn_timeout=3.0, conversation_timeout=0.3)
    assert trajectory.stop_reason is StopReason.TIMEOUT
    assert "the conversation took longer than 0.3 s" in trajectory.error


def test_a_failing_close_does_not_hide_the_end(renderer):
    class Sticky(Chat):
        def close(self):
            super().close()
            raise OSError("still open")

    trajectory = play(Sticky(), ScriptedPolicy(renderer, lambda m: "x"), renderer)
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.COMPLETED, 1.5)
    assert "still open" in trajectory.error


def test_bug_28_one_failing_conversation_does_not_stop_the_others(renderer, tiny, hardware):
    async def main():
        engine = TransformersEngine(
            copy.deepcopy(tiny), renderer.stop_ids, slots=3, max_context=400, hardware=hardware
        )
        limits = RolloutConfig(
            max_context=400, max_turn_tokens=8, on_cut_reply="close", environment_timeout=0.3
        )
        kinds = [Chat, Raises, Hangs, Chat]
        return await asyncio.gather(
            *[rollout(k(), TASK, engine, renderer, limits, id=str(i), seed=i) for i, k in enumerate(kinds)]
        )

    reasons = [t.stop_reason.value for t in asyncio.run(main())]
    assert reasons == ["completed", "environment_error", "environment_error", "completed"]


def test_bug_20_members_of_a_group_start_alike_and_differ_in_their_replies(renderer, tiny, hardware):
    async def main():
        engine = TransformersEngine(
            copy.deepcopy(tiny), renderer.stop_ids, slots=4, max_context=400, hardware=hardware
        )
        limits = RolloutConfig(max_context=400, max_turn_tokens=12, on_cut_reply="close")
        return await asyncio.gather(
            *[rollout(Chat(), TASK, engine, renderer, limits, id=str(i), seed=5, sample=i) for i in range(4)]
        )

    played = asyncio.run(main())
    assert len({t.turns[0].context_ids for t in played}) == 1
    assert len({t.turns[0].token_ids for t in played}) == 4
    assert np.isfinite([p for t in played for turn in t.turns for p in turn.logprobs]).all()
