"""Talking at a terminal, with a list of lines in the place of the person."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from stateset_ray.chat import _Talk, chat, instructions, play
from stateset_ray.config import Config
from stateset_ray.errors import ConfigError, EnvironmentFault, ModelError
from stateset_ray.models import load_tokenizer
from stateset_ray.policies.base import Reply
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Message, StopReason

WITNESS = """
from stateset_ray import Environment, Message, Step
closed = []
class Witness(Environment):
    def reset(self, task, seed):
        self.left = 2
        return Step((Message("system", "Be kind."), Message("user", "Hello?")))
    async def step(self, message):
        if message.content == "crash": raise OSError("the shop burned down")
        self.left -= 1
        right = 0.5 * (message.content == "kind words")
        return Step(() if self.left == 0 else (Message("user", "More!"),), right, terminated=self.left == 0)
    def close(self): closed.append(True)
"""


class Person:
    """Says its lines, then leaves; keeps what it was shown."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.saw: list[Message] = []
        self.notes: list[str] = []

    def ask(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    @property
    def heard(self) -> list[str]:
        return [message.content for message in self.saw if message.role == "assistant"]


def config(*overrides: str) -> Config:
    base = ("model.name=tiny", "model.threads=1", "rollout.max_turn_tokens=8", "rollout.max_context=256")
    return Config().with_overrides([*base, *overrides])


def talk(settings: Config, *lines: str, system: Iterable[Message] = ()) -> Person:
    person = Person(*lines)
    chat(settings, person.ask, person.saw.append, person.notes.append, system=tuple(system))
    return person


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Makes the environment `witness:Witness` importable; what it notes when it is closed."""
    (tmp_path / "witness.py").write_text(WITNESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "witness", raising=False)
    closed: list[bool] = __import__("witness").closed
    return closed


def test_every_line_gets_a_reply_until_the_person_leaves() -> None:
    person = talk(config(), "hi", "", "and you?", "/quit", "never said")
    assert len(person.heard) == 2
    assert person.lines == ["never said"]


def test_the_same_words_get_the_same_replies_and_a_reset_forgets() -> None:
    greedy = config("rollout.temperature=0.01")
    first = talk(greedy, "hi", "there")
    assert talk(greedy, "hi", "there").heard == first.heard
    again = talk(greedy, "hi", "/reset", "hi", "there")
    assert again.heard[1:] == first.heard  # cold, so the seed of another conversation hardly matters
    assert "a new conversation" in again.notes
    warm = config("rollout.temperature=5")
    assert talk(warm, "hi").heard != talk(warm.with_overrides(["run.seed=1"]), "hi").heard


def test_a_full_conversation_says_so_and_can_be_reset() -> None:
    person = talk(config("rollout.max_context=64"), "x" * 20, "y" * 40, "/reset", "short")
    assert len(person.heard) == 2
    assert sum("rollout.max_context" in note for note in person.notes) == 1


def test_the_instructions_come_first_and_an_unknown_command_is_answered() -> None:
    person = talk(config(), "/help", system=[Message("system", "Be kind.")])
    assert person.saw == [Message("system", "Be kind.")]
    assert sum("/reset" in note for note in person.notes) == 2


@pytest.mark.parametrize("stopped", [True, False])
def test_a_later_prompt_continues_the_tokens_that_were_sampled(stopped: bool) -> None:
    renderer = Renderer(load_tokenizer("tiny"))
    conversation = _Talk(renderer, config().rollout, 0, [Message("system", "s")])
    first = conversation.request("one")
    assert first is not None
    assert first.prompt_ids == renderer.opening([Message("system", "s"), Message("user", "one")])
    ids = renderer.reply("two")
    ids = ids if stopped else ids[:-1]
    conversation.replied(first, Reply(ids, (0.0,) * len(ids), 0, "stop" if stopped else "length"))
    second = conversation.request("three")
    assert second is not None
    whole = [*first.messages, Message("assistant", "two"), Message("user", "three")]
    assert second.prompt_ids == renderer.opening(whole)
    assert second.conversation == first.conversation  # the engine finds its cache by this name


def test_a_missing_model() -> None:
    with pytest.raises(ModelError):
        talk(config("model.name=./gone"), "hi")


def test_instructions_are_the_environments_system_messages(witness: list[bool]) -> None:
    settings = config("environment.path=witness:Witness")
    assert instructions(settings) == (Message("system", "Be kind."),)
    assert witness == [True]
    assert instructions(config()) == ()


def test_instructions_of_an_environment_that_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks.py").write_text(WITNESS.replace("self.left = 2", "raise OSError('no shop')"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentFault, match="no shop"):
        instructions(config("environment.path=breaks:Witness"))


def test_a_person_earns_what_its_replies_are_worth(witness: list[bool]) -> None:
    person = Person("kind words", "rude " * 200)
    settings = config("environment.path=witness:Witness")
    played = play(settings, person.ask, person.saw.append, person.notes.append)
    assert played is not None
    assert (played.reward, played.stop_reason) == (0.5, StopReason.COMPLETED)
    assert played.messages[-1].content == ("rude " * 200).strip()  # no limit cut it
    assert [m.content for m in person.saw] == ["Be kind.", "Hello?", "More!"]
    assert person.notes[1:] == [
        "reward +0.500", "reward +0.000", "ended: completed; total reward +0.500 in 2 replies",
    ]  # fmt: skip
    assert witness == [True]


def test_a_person_may_leave(witness: list[bool]) -> None:
    for lines in ((), ("kind words", "/quit")):
        person = Person(*lines)
        settings = config("environment.path=witness:Witness")
        assert play(settings, person.ask, person.saw.append, person.notes.append) is None
        assert person.notes[-1] == "left: no reward"
    assert witness == [True, True]


def test_an_environment_that_breaks_is_named(witness: list[bool]) -> None:
    person = Person("crash")
    settings = config("environment.path=witness:Witness")
    played = play(settings, person.ask, person.saw.append, person.notes.append)
    assert played is not None
    assert played.reward is None
    assert any("the shop burned down" in note for note in person.notes)
    assert "total reward none" in person.notes[-1]
    assert witness == [True]


def test_turns_are_limited_as_in_training(witness: list[bool]) -> None:
    person = Person("kind words", "kind words")
    settings = config("environment.path=witness:Witness", "rollout.max_turns=1")
    played = play(settings, person.ask, person.saw.append, person.notes.append)
    assert played is not None
    assert played.stop_reason is StopReason.MAX_TURNS


def test_no_such_environment() -> None:
    with pytest.raises(ConfigError):
        play(config("environment.path=no.where:X"), Person().ask, print, print)
