"""Rows whose replies are given: how likely the policy thinks them, token by token.

The tokens of a given reply are those that a scripted policy would have given (`Renderer.reply`), its stop
token included, and the conversation grows turn by turn as in a rollout. The log-probabilities come from the
module that the learner learns through, at `rollout.temperature`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from stateset_ray.actors.batch.results import Ended, check_characters, error
from stateset_ray.actors.held_engine import renderer_of
from stateset_ray.config import Config, LoraConfig
from stateset_ray.dataset.rows import Id, Row
from stateset_ray.errors import TemplateError
from stateset_ray.grpo.samples import samples
from stateset_ray.learner.batch import Item, pack, plan
from stateset_ray.learner.policy_model import PolicyModel
from stateset_ray.models import choose_hardware, load_model
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Message, Sample, StopReason, Task, Trajectory, Turn

__all__ = ["Scorer", "given_turns"]

_Logprobs = npt.NDArray[np.float64]


class Scorer:
    """Scores the replies of conversations; implements `Answers`.

    Args:
        config: of the run.
        peers: scorers that share this machine's cores.

    Raises:
        StatesetError: the model or the hardware is not as configured.
    """

    def __init__(self, config: Config, peers: int) -> None:
        self._config = config
        self._renderer = renderer_of(config)
        hardware = choose_hardware(config.model, len(ray.get_gpu_ids()), peers)
        hardware.apply()
        # Nothing is trained, and adapters are merged in what is loaded.
        plain = {"lora": LoraConfig(), "freeze": (), "gradient_checkpointing": False}
        learner = config.learner.model_copy(update=plain)
        self._policy = PolicyModel(load_model(config.model.name, hardware), learner).requires_grad_(False)

    def answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """See `Answers.answer`."""
        done: dict[Id, dict[str, Any]] = {}
        given: dict[Id, list[Sample]] = {}
        for row in rows:
            try:
                given[row.id] = self._samples(row.messages)
            except Ended as end:
                done[row.id] = error(row.id, end.kind, end.message)
        for id, replies in zip(given, self._logprobs(list(given.values())), strict=True):
            done[id] = {"id": id} | _summed(replies)
        return [done[row.id] for row in rows]

    def _samples(self, messages: Sequence[Message]) -> list[Sample]:
        """A conversation as the learner would see it: several samples where its template rewrites history."""
        most = self._config.rollout.max_context
        check_characters(self._renderer, messages, most)
        try:
            turns = given_turns(self._renderer, messages)
        except TemplateError as fault:
            raise Ended("template", fault.problem) from None
        found = samples(Trajectory("", Task("", 0), 0, (), turns, StopReason.COMPLETED))
        longest = max(len(sample) for sample in found)
        if longest > most:
            raise Ended("too_long", f"{longest} tokens are more than rollout.max_context = {most}")
        return found

    def _logprobs(self, given: Sequence[Sequence[Sample]]) -> list[list[_Logprobs]]:
        """[conversation][reply] -> [tokens]"""
        rows = [sample for of_one in given for sample in of_one]
        budget = self._config.learner.micro_batch_tokens
        [passes] = plan([Item(len(sample)) for sample in rows], ranks=1, budget=budget)
        by_row: dict[int, list[_Logprobs]] = {}
        for indices in passes:
            packed = pack([rows[index] for index in indices])
            scores, _ = self._policy.score(self._policy, packed, self._config.rollout.temperature, False)
            found = scores.double().cpu().numpy()
            for place, index in enumerate(indices):
                mine, turns = found[packed.rows == place], rows[index].turns[rows[index].loss_mask]
                by_row[index] = [mine[turns == turn] for turn in np.unique(turns)]
        replies = iter([by_row[index] for index in range(len(rows))])
        return [[reply for _ in of_one for reply in next(replies)] for of_one in given]


def given_turns(renderer: Renderer, messages: Sequence[Message]) -> tuple[Turn, ...]:
    """The replies of a conversation as turns, as a rollout with a scripted policy would have made them.

    Raises:
        TemplateError: the chat template refuses it.
    """
    turns: list[Turn] = []
    ids: tuple[int, ...] = ()
    answered = 0  # messages up to the last reply
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        said = messages[:index]
        context, forked = renderer.opening(said), False
        if turns:
            context, forked = renderer.next_prompt(ids, said, index - answered, stopped=True)
        reply = renderer.reply(message.content)
        ids = (*(() if forked else ids), *context, *reply)
        turns.append(Turn(context, reply, (0.0,) * len(reply), 0, forked=forked))
        answered = index + 1
    return tuple(turns)


def _summed(replies: Sequence[_Logprobs]) -> dict[str, Any]:
    tokens, total = sum(map(len, replies)), float(sum(reply.sum() for reply in replies))
    each = [{"tokens": len(r), "logprob": float(r.sum()), "mean": float(r.mean())} for r in replies]
    return {"replies": each, "tokens": tokens, "logprob": total, "mean": total / tokens}
