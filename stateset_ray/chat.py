"""Talking at a terminal: a person with a policy, or a person in the place of the policy.

Both take how to ask and how to show as functions, so that a test can be the person. No Ray: the engine
runs in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from stateset_ray.config import Config, RolloutConfig
from stateset_ray.environments.base import Environment, build_environment, call
from stateset_ray.errors import EnvironmentFault
from stateset_ray.models import (
    check_fits,
    choose_hardware,
    generation_stop_ids,
    load_model,
    load_tokenizer,
)
from stateset_ray.policies.base import Reply, ReplyRequest
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.rollout import rollout
from stateset_ray.types import Message, Split, Step, Task, Trajectory, derive_seed

__all__ = ["Ask", "Note", "Show", "chat", "instructions", "play"]

Ask = Callable[[str], str]
"""Shows a prompt and returns what the person wrote; raises EOFError when there is no more."""
Show = Callable[[Message], None]
"""Shows a message; it may hold anything, so it must be made safe for the terminal."""
Note = Callable[[str], None]
"""Shows a remark of the program."""

_HELP = "/reset starts again, /quit (or end of input) leaves"
_ROOM = 1_000_000  # tokens and seconds that no person reaches


def chat(config: Config, ask: Ask, show: Show, note: Note, *, system: Sequence[Message] = ()) -> None:
    """Talk with `model.name` until the person leaves; returns then.

    The limits of a reply and of the conversation are those of `[rollout]`, as are the temperature and
    the seed of `[run]`: the same words get the same replies.

    Args:
        system: what the conversation begins with, for instance the instructions of `instructions`.

    Raises:
        StatesetError: the model is missing or cannot chat.
    """
    check_fits(config)
    name, limits = config.model.name, config.rollout
    hardware = choose_hardware(config.model, gpus=1)
    hardware.apply()
    renderer = Renderer(load_tokenizer(name), frozenset(generation_stop_ids(name)))
    engine = TransformersEngine(
        load_model(name, hardware),
        renderer.stop_ids,
        slots=1,
        max_context=limits.max_context,
        hardware=hardware,
    )
    note(f"{name} on {hardware.device}, temperature {limits.temperature:g}; {_HELP}")
    talk = _Talk(renderer, limits, config.run.seed, system)
    for message in system:
        show(message)
    # The engine's own task lives on this loop between replies; input is read outside of it, so that
    # Ctrl-C at the prompt is felt at once.
    with asyncio.Runner() as runner:
        try:
            while (said := _read(ask, "user")) is not None:
                if said == "/reset":
                    talk.reset()
                    note("a new conversation")
                elif said.startswith("/"):
                    note(_HELP)
                elif said:
                    runner.run(_answer(engine, talk, said, show, note))
        finally:
            runner.run(engine.close())


class _Talk:
    """The state of one conversation: its messages and its token ids, which are never re-tokenized."""

    def __init__(
        self, renderer: Renderer, limits: RolloutConfig, seed: int, system: Sequence[Message]
    ) -> None:
        self._renderer = renderer
        self._limits = limits
        self._seed = seed
        self._system = tuple(system)
        self._number = -1
        self.reset()

    def reset(self) -> None:
        self._number += 1
        self._turn = 0
        self._messages = list(self._system)
        self._ids: tuple[int, ...] = ()
        self._stopped = True

    def request(self, said: str) -> ReplyRequest | None:
        """What to ask of the engine, or None where the conversation is full."""
        messages = [*self._messages, Message("user", said)]
        if self._turn:
            context, fork = self._renderer.next_prompt(self._ids, messages, 1, stopped=self._stopped)
            prompt = context if fork else (*self._ids, *context)
        else:
            prompt = self._renderer.opening(messages)
        room = self._limits.max_context - len(prompt)
        if room < 1:
            return None
        self._messages = messages
        return ReplyRequest(
            f"chat-{self._number}", prompt, tuple(messages), min(room, self._limits.max_turn_tokens),
            self._limits.temperature, derive_seed(self._seed, "chat", self._number, self._turn),
        )  # fmt: skip

    def replied(self, request: ReplyRequest, reply: Reply) -> Message:
        message = Message("assistant", self._renderer.text(reply.token_ids))
        self._messages.append(message)
        self._ids = (*request.prompt_ids, *reply.token_ids)
        self._stopped = reply.finish == "stop"
        self._turn += 1
        return message


async def _answer(engine: TransformersEngine, talk: _Talk, said: str, show: Show, note: Note) -> None:
    request = talk.request(said)
    if request is None:
        note("the conversation fills rollout.max_context: /reset starts a new one")
        return
    reply = await engine.reply(request)
    show(talk.replied(request, reply))
    if reply.finish == "length":
        note(f"(cut after {len(reply.token_ids)} tokens: rollout.max_turn_tokens)")


def instructions(config: Config) -> tuple[Message, ...]:
    """The system messages that the configured environment opens with: what the policy was trained under.

    Raises:
        ConfigError: the environment cannot be imported or built.
        EnvironmentFault: its reset failed.
    """
    environment = build_environment(config.environment.path, config.environment.options)

    async def opening() -> tuple[Message, ...]:
        try:
            task = environment.task("train", 0)
            step: Step = await call(environment.reset, task, derive_seed(config.run.seed, "chat"))
            return tuple(message for message in step.messages if message.role == "system")
        except Exception as error:
            name = type(environment).__name__
            raise EnvironmentFault(f"{name}.reset raised {type(error).__name__}: {error}") from error
        finally:
            await call(environment.close)

    return asyncio.run(opening())


def play(
    config: Config, ask: Ask, show: Show, note: Note, *, split: Split = "train", index: int = 0
) -> Trajectory | None:
    """Let a person be the policy of the configured environment, for one conversation.

    A person's replies are not cut and not hurried; `rollout.max_turns` counts as in training.

    Args:
        split: which tasks to take.
        index: which of them.

    Returns:
        The conversation with its rewards, or None if the person left.

    Raises:
        ConfigError: the environment cannot be imported or built.
    """
    inner = build_environment(config.environment.path, config.environment.options)
    # The tiny model's tokenizer writes any text; a person needs no other.
    renderer = Renderer(load_tokenizer("tiny"))
    limits = config.rollout.model_copy(
        update={
            "turn_timeout": float(_ROOM), "conversation_timeout": float(_ROOM),
            "max_turn_tokens": _ROOM, "max_sampled_tokens": _ROOM, "max_context": _ROOM,
        }
    )  # fmt: skip
    task = inner.task(split, index)
    note(f"you are the policy in {task.id}; /quit (or end of input) leaves")

    def script(_: Sequence[Message]) -> str:
        said = _read(ask, "assistant")
        if said is None:
            raise EOFError
        return said

    seed = derive_seed(config.run.seed, "play", task.id)
    game = rollout(
        _Shown(inner, show, note), task, ScriptedPolicy(renderer, script), renderer, limits,
        id=f"play/{task.id}", seed=seed,
    )  # fmt: skip
    # Not asyncio.run: it would hold Ctrl-C back until the person has pressed Enter.
    loop = asyncio.new_event_loop()
    try:
        played = loop.run_until_complete(game)
    except EOFError:
        note("left: no reward")
        return None
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    if played.error:
        note(played.error)
    total = "none" if played.reward is None else f"{played.reward:+.3f}"
    note(f"ended: {played.stop_reason.value}; total reward {total} in {len(played.turns)} replies")
    return played


class _Shown(Environment):
    """An environment that shows what it says and pays."""

    def __init__(self, inner: Environment, show: Show, note: Note) -> None:
        self._inner = inner
        self._show = show
        self._note = note

    async def reset(self, task: Task, seed: int) -> Step:
        step: Step = await call(self._inner.reset, task, seed)
        self._say(step)
        return step

    async def step(self, message: Message) -> Step:
        step: Step = await call(self._inner.step, message)
        if isinstance(step, Step):
            self._note(f"reward {step.reward:+.3f}")
        self._say(step)
        return step

    async def close(self) -> None:
        await call(self._inner.close)

    def _say(self, step: Any) -> None:
        # What is no Step is shown as nothing here: the rollout has the words for it.
        for message in step.messages if isinstance(step, Step) else ():
            self._show(message)


def _read(ask: Ask, role: str) -> str | None:
    """What the person says, or None to leave."""
    try:
        said = ask(f"{role}: ").strip()
    except EOFError:
        return None
    return None if said == "/quit" else said
