"""A small project of one's own: an environment, its configuration, a test and a page that explains them."""

from __future__ import annotations

from pathlib import Path

from stateset_ray.errors import RunError

__all__ = ["init"]

_ENVIRONMENT = '''\
"""Who the policy talks to. Change this file into your own task."""

import random

from stateset_ray import Environment, Message, Step

OPPOSITES = {"hot": "cold", "up": "down", "big": "small", "left": "right", "day": "night", "wet": "dry"}


class Opposites(Environment):
    """The user asks for the opposite of a few words, one after the other."""

    def __init__(self, turns: int = 2) -> None:  # options come from [environment.options] in config.toml
        self.turns = turns

    def reset(self, task, seed):
        # Everything random must come from task.seed or seed: then every run can be repeated.
        # (Held-out tasks ask for the same six words in another order: enough to see learning, not to
        # prove that it carries over. In a real task, let them be new.)
        self.words = random.Random(task.seed).sample(sorted(OPPOSITES), self.turns)
        return Step((self._ask(),))

    def step(self, message):
        want, got = self.expert(), message.content.strip()
        # Half a right answer should earn something, or a policy that never succeeds learns nothing;
        # and no junk should ever earn more than nothing. 1 for the right word, -1 for one all wrong.
        right = sum(a == b for a, b in zip(want, got))
        reward = (2 * right / max(len(want), len(got)) - 1) / self.turns
        self.words = self.words[1:]
        if not self.words:
            return Step(reward=reward, terminated=True)
        return Step((self._ask(),), reward=reward)

    def expert(self):
        # Optional: what a perfect policy would say now. Warm start learns from it, and the test uses it.
        return OPPOSITES[self.words[0]]

    def _ask(self):
        return Message("user", f"The opposite of {self.words[0]}?")
'''

_CONFIG = """\
# stateset-ray train config.toml
# Every setting and its default: stateset-ray train config.toml --dry-run

[run]
name = "opposites"

[model]
name = "tiny"          # random weights, built in seconds: shows that everything works, in about a minute
# name = "smollm2"     # a real small model (135 M parameters); needs no network, but an hour on a laptop
# name = "Qwen/Qwen2.5-0.5B-Instruct"   # any Hugging Face id, or a folder with a model
# With a real model: take out [train.warm_start] and both learning rates (they suit the tiny model only),
# and set rollout.max_turn_tokens = 16.

[environment]
path = "environment:Opposites"      # module:Class, found in this folder

[environment.options]
turns = 2

[rollout]
max_turns = 2
max_turn_tokens = 8                 # of one reply; the tiny model writes a letter per token
max_context = 128
on_cut_reply = "close"

[grpo]
group_size = 8                      # conversations of one task, compared with each other
advantage = "mean_std"

[learner]
learning_rate = 2e-3

[train]
steps = 20
tasks_per_step = 8

[train.warm_start]                  # first some steps of imitating expert()
steps = 55
dialogues = 16
learning_rate = 3e-3

[evaluate]
tasks = 32
"""

_TEST = '''\
"""pytest: is the environment sound? The expert must earn 1, and junk nothing. Takes a second."""

import random
import string

import pytest
from environment import Opposites

from stateset_ray import Message


def play(index, policy):
    """The total reward of one conversation."""
    environment = Opposites()
    environment.reset(environment.task("train", index), seed=0)
    total, ended = 0.0, False
    while not ended:
        step = environment.step(Message("assistant", policy(environment)))
        total, ended = total + step.reward, step.terminated
    return total


@pytest.mark.parametrize("index", range(20))
def test_the_expert_earns_one(index):
    assert play(index, lambda environment: environment.expert()) == pytest.approx(1.0)


@pytest.mark.parametrize("junk", ["", "?", "e" * 5, "I do not know.", "The opposite of hot?"])
def test_junk_earns_nothing(junk):
    assert max(play(index, lambda _: junk) for index in range(20)) <= 0


def test_random_letters_earn_nothing():
    rng = random.Random(0)
    rewards = [play(i, lambda _: "".join(rng.choices(string.ascii_lowercase, k=4))) for i in range(50)]
    assert sum(rewards) / len(rewards) <= 0


def test_the_same_task_is_the_same_conversation():
    first, second = Opposites(), Opposites()
    task = first.task("heldout", 3)
    assert first.reset(task, 1) == second.reset(task, 1)
'''

_README = """\
# An agent of my own

| file | what it holds |
|---|---|
| `environment.py` | who the policy talks to, and what a reply earns: the task |
| `config.toml` | which model learns, from how much, for how long |
| `test_environment.py` | that the task can be solved, and that junk earns nothing |

Three commands, in this folder:

    pytest                                         # is the environment sound?
    stateset-ray train config.toml                 # train; about a minute with the tiny model
    stateset-ray chat runs/opposites               # talk to what was learned

To feel the task yourself, be the policy: `stateset-ray chat --play config.toml`.
To see that this machine has what a run needs: `stateset-ray doctor config.toml`.
"""

_FILES = {
    "environment.py": _ENVIRONMENT,
    "config.toml": _CONFIG,
    "test_environment.py": _TEST,
    "README.md": _README,
}


def init(folder: Path) -> list[Path]:
    """Write a project that trains as it is into a new or empty folder; returns its files.

    Raises:
        RunError: the folder holds something already, or cannot be written.
    """
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(
                "there is something here already, and nothing is overwritten",
                given=str(folder),
                mend="give the name of a new folder",
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in _FILES.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"the project cannot be written: {error.strerror}",
            given=str(folder),
            mend="give a folder that you may write to",
        ) from error
    return [folder / name for name in _FILES]
