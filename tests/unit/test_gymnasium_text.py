"""Environments of gymnasium with text spaces: what they say and earn, how they end, what is refused."""

from __future__ import annotations

import asyncio
import string
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import pytest
from gymnasium.spaces import Discrete, Text

from stateset_ray.config import RolloutConfig, load_config
from stateset_ray.environments.base import Environment, build_environment, has_expert, load_environment
from stateset_ray.environments.gymnasium_text import GymnasiumText
from stateset_ray.errors import ConfigError
from stateset_ray.models import load_tokenizer
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.rollout import rollout
from stateset_ray.types import Message, StopReason, Trajectory

CLASS = "stateset_ray.environments.gymnasium_text:GymnasiumText"
ANY_TEXT = Text(min_length=0, max_length=200, charset=string.printable)


class Guess(gymnasium.Env):
    """Name the digit that was drawn; every wrong guess costs a little, and five are too many."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"]}
    observation_space = ANY_TEXT
    action_space = Text(max_length=1, charset=string.digits)
    threads: ClassVar[list[str]] = []
    closed: ClassVar[int] = 0

    def __init__(self, largest: int = 9, render_mode: str | None = None) -> None:
        self.largest, self.render_mode = largest, render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.digit, self.tries = int(self.np_random.integers(self.largest + 1)), 0
        return f"0 to {self.largest}?", {"tries": 0}

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        self.threads.append(threading.current_thread().name)
        self.tries += 1
        right = action == str(self.digit)
        facts = {"tries": self.np_random.integers(1, 2) * self.tries, "by": ("a", object())}
        said = "" if right else "more" if action < str(self.digit) else "less"
        return said, self.np_random.random() * 0 + (1 if right else -0.25), right, self.tries >= 5, facts

    def render(self) -> str:
        return "?" * self.tries

    def close(self) -> None:
        type(self).closed += 1


class Board(gymnasium.Env):
    observation_space = Discrete(16)
    action_space = Text(max_length=4)


class Buttons(gymnasium.Env):
    observation_space = ANY_TEXT
    action_space = Discrete(2)


class Configured(Guess):
    """Built as RLlib builds classes: from one mapping."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config["largest"])


@pytest.fixture(autouse=True)
def registered():
    """Known to gymnasium's registry, and importable as `guessing`."""
    sys.modules["guessing"] = sys.modules[__name__]
    gymnasium.register("Guess-v0", entry_point="guessing:Guess")
    gymnasium.register("Short-v0", entry_point="guessing:Guess", max_episode_steps=2)
    yield
    for name in ("Guess-v0", "Short-v0"):
        del gymnasium.registry[name]
    del sys.modules["guessing"]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(load_tokenizer("tiny"))


def play(environment: Environment, replies: list[str], renderer: Renderer, index: int = 0) -> Trajectory:
    said = iter(replies)
    policy = ScriptedPolicy(renderer, lambda _: next(said))
    limits = RolloutConfig(max_turns=9, max_turn_tokens=16, max_context=512)
    task = environment.task("train", index)
    return asyncio.run(rollout(environment, task, policy, renderer, limits, id=task.id, seed=index))


def digit(index: int) -> str:
    env = Guess()
    env.reset(seed=GymnasiumText("Guess-v0").task("train", index).seed % 2**31)
    return str(env.digit)


def test_a_conversation_is_an_episode(renderer: Renderer) -> None:
    """Observations are said, replies are actions, rewards are paid per turn, `terminated` completes it."""
    right = digit(0)
    wrong = "0" if right != "0" else "1"
    played = play(build_environment("gymnasium:Guess-v0", {}), [wrong, right], renderer)
    hint = "more" if wrong < right else "less"
    assert [(m.role, m.content) for m in played.messages] == [
        ("user", "0 to 9?"), ("assistant", wrong), ("user", hint), ("assistant", right),
    ]  # fmt: skip
    assert [turn.reward for turn in played.turns] == [-0.25, 1.0]
    assert [type(turn.reward) for turn in played.turns] == [float, float]
    assert played.stop_reason is StopReason.COMPLETED


def test_truncation_is_a_limit_of_the_environment(renderer: Renderer) -> None:
    """By the environment itself, and by the registry's max_episode_steps."""
    played = play(build_environment("gymnasium:Guess-v0", {}), ["x"] * 9, renderer)
    assert (played.stop_reason, len(played.turns)) == (StopReason.ENVIRONMENT_LIMIT, 5)
    assert played.messages[-1].role == "user"  # its last word is kept
    played = play(build_environment("gymnasium:Short-v0", {}), ["x"] * 9, renderer)
    assert (played.stop_reason, len(played.turns)) == (StopReason.ENVIRONMENT_LIMIT, 2)


def test_info_becomes_plain_facts_that_can_be_written_down(renderer: Renderer) -> None:
    played = play(build_environment("gymnasium:Guess-v0", {}), [digit(0)], renderer)
    assert played.info["tries"] == 1
    assert type(played.info["tries"]) is int  # numpy's it was
    assert played.info["by"][0] == "a"
    assert Trajectory.from_json(played.to_json()).info["tries"] == 1


def test_a_task_is_a_seed_and_heldout_tasks_are_others() -> None:
    environment = GymnasiumText("Guess-v0")
    seeds = {}
    for split in ("train", "heldout"):
        seeds[split] = [environment.task(split, index).seed % 2**31 for index in range(50)]
    assert {seed % 2 for seed in seeds["train"]} == {0}
    assert {seed % 2 for seed in seeds["heldout"]} == {1}

    def drawn(index: int, seed: int) -> int:
        one = GymnasiumText("Guess-v0")
        one.reset(one.task("train", index), seed)
        return one._env.unwrapped.digit

    tasks = [drawn(index, 0) for index in range(20)]
    assert tasks == [drawn(index, 7) for index in range(20)]  # a group's members start alike
    assert len(set(tasks)) > 4


def test_what_blocks_is_called_in_a_thread_and_everything_made_is_closed(renderer: Renderer) -> None:
    Guess.threads.clear()
    environment = build_environment("gymnasium:Guess-v0", {"largest": 3})  # options not seen before: checked
    before = Guess.closed
    play(environment, ["x"] * 5, renderer)
    assert Guess.threads
    assert threading.main_thread().name not in Guess.threads
    assert Guess.closed == before + 1
    environment.close()  # nothing is open any more
    assert Guess.closed == before + 1


def test_it_renders_as_its_options_say() -> None:
    environment = build_environment("gymnasium:Guess-v0", {"render_mode": "ansi"})
    assert environment.render() is None  # type: ignore[attr-defined]
    environment.reset(environment.task("train", 0), 0)
    environment.step(Message("assistant", "x"))  # type: ignore[unused-coroutine]
    assert environment.render() == "?"  # type: ignore[attr-defined]


def test_an_invalid_action_is_the_environments_business_unless_a_reward_is_named(renderer: Renderer) -> None:
    played = play(GymnasiumText("Guess-v0"), ["seven, I think"] * 9, renderer)
    assert played.stop_reason is StopReason.ENVIRONMENT_LIMIT
    played = play(GymnasiumText("Guess-v0", invalid_reward=-1), ["seven, I think"], renderer)
    assert (played.stop_reason, played.reward) == (StopReason.COMPLETED, -1.0)
    assert played.info == {"invalid_action": True}


def test_a_system_message_comes_first(renderer: Renderer) -> None:
    played = play(GymnasiumText("Guess-v0", system="Answer with a digit."), [digit(0)], renderer)
    assert [m.role for m in played.messages[:2]] == ["system", "user"]


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("gymnasium:Guess-v0", {"largest": 3}),
        ("gymnasium:guessing:Guess-v0", {"largest": 3}),
        ("gymnasium:guessing:Guess", {"largest": 3}),
        (CLASS, {"id": "Guess-v0", "kwargs": {"largest": 3}}),
        (CLASS, {"id": "guessing:Configured", "config": {"largest": 3}}),
    ],
)
def test_every_way_to_name_one(path: str, options: dict[str, Any]) -> None:
    settings = load_config(None, [f'environment.path="{path}"']).environment
    assert issubclass(load_environment(settings.path, options), GymnasiumText)
    environment = build_environment(settings.path, options)
    step = environment.reset(environment.task("train", 0), 0)
    assert step.messages[0].content == "0 to 3?"  # type: ignore[union-attr]
    assert not has_expert(environment)


def test_a_spec_names_what_this_process_has_not_registered() -> None:
    spec = gymnasium.spec("Short-v0").to_json()
    del gymnasium.registry["Short-v0"]
    environment = GymnasiumText("Short-v0", kwargs={"largest": 4}, spec=spec)
    step = environment.reset(environment.task("train", 0), 0)
    assert step.messages[0].content == "0 to 4?"
    ends = [environment.step(Message("assistant", "x")).truncated for _ in range(2)]
    assert ends == [False, True]
    gymnasium.register("Short-v0", entry_point="guessing:Guess")


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("gymnasium:Gues-v0", {}, "Guess"),  # gymnasium says what is near
        ("gymnasium:Guess-v0", {"larges": 3}, "larges"),
        ("gymnasium:nowhere:Guess-v0", {}, "nowhere"),
        ("gymnasium:guessing:Board", {}, "observation space of guessing:Board is not text"),
        ("gymnasium:guessing:Buttons", {}, "Discrete(2)"),
        ("gymnasium:FrozenLake-v1", {}, "wrap it"),
        (CLASS, {"id": "Guess-v0", "kwargs": {"largest": 1}, "config": {"largest": 1}}, "not as both"),
    ],
)
def test_what_cannot_be_played_is_refused_before_anything_starts(
    path: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_environment(path, options)
    assert said in str(caught.value)


@pytest.mark.parametrize("path", ["gymnasium:", "gymnasium:a b", "Guess-v0", "other:Guess-v0"])
def test_a_path_of_another_shape_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="path"):
        load_config(None, [f'environment.path="{path}"'])


def test_the_environment_is_found_from_a_configuration_alone(tmp_path: Path) -> None:
    text = '[environment]\npath = "gymnasium:Guess-v0"\noptions = { largest = 5 }\n'
    (tmp_path / "guess.toml").write_text(text, encoding="utf-8")
    section = load_config(tmp_path / "guess.toml").environment
    environment = build_environment(section.path, section.options)
    assert environment.reset(environment.task("train", 0), 0).messages[0].content == "0 to 5?"  # type: ignore[union-attr]
