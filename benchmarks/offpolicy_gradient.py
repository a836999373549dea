"""The gradient of a task so small that every reply can be listed, with samples of an older policy.

Letters: P prompts; V tokens of the vocabulary; B replies of a batch to each prompt. A reply is a stop token,
or any two tokens.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.lagged import Lagged, Weights
from benchmarks.plain import load_plain
from stateset_ray.config import Config
from stateset_ray.environments.base import build_environment
from stateset_ray.errors import RunError
from stateset_ray.grpo.loss import Tokens, policy_loss
from stateset_ray.models import Hardware, generation_stop_ids, load_tokenizer
from stateset_ray.objective import ObjectiveConfig
from stateset_ray.policies.renderer import Renderer
from stateset_ray.types import Message

Logprobs = tuple[torch.Tensor, torch.Tensor]

__all__ = ["SIDES", "Enumerated", "compared", "versions_of"]

SIDES: Mapping[str, Mapping[str, Any]] = {
    "plain": {"trust": "proximal"},
    "tis": {"trust": "proximal", "correction": "tis"},
    "uncut": {"trust": "proximal", "correction": "tis", "correction_high": 1e30},
    "mis": {"trust": "proximal", "correction": "mis"},
    "clip": {"trust": "sampler"},
}
"""Side -> what of the objective it sets."""

_TASKS = 64  # of which the prompts are taken


def versions_of(config: Config, steps: int) -> list[Weights]:
    """The weights of a run in turn, before each step and after the last."""
    with Lagged(config, 0) as run:
        found = []
        for step in range(steps):
            found.append(run.weights())
            run.step(step)
        return [*found, run.weights()]


class Enumerated:
    """All replies to all prompts of a one-turn task of two-token replies, and what they earn.

    Args:
        config: of the run; its environment's reward must follow from task and reply alone.
    """

    def __init__(self, config: Config) -> None:
        name, section = config.model.name, config.environment
        self._config = config
        self._renderer = Renderer(load_tokenizer(name), generation_stop_ids(name))
        self._model = load_plain(name, Hardware("cpu", torch.float32, 1))
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._size = int(self._model.config.vocab_size)
        first = torch.arange(self._size)
        self._stops = torch.isin(first, torch.tensor(sorted(self._renderer.stop_ids)))
        environment = build_environment(section.path, section.options)
        prompts: dict[tuple[int, ...], Any] = {}
        for index in range(_TASKS):
            task = environment.task("train", index)
            opening = asyncio.run(build_environment(section.path, section.options).reset(task, task.seed))
            prompts.setdefault(self._renderer.opening(list(opening.messages)), task)
        self._prompts = list(prompts)
        if len({len(prompt) for prompt in self._prompts}) != 1:
            raise RunError(
                "the prompts must have one length", given=sorted({len(prompt) for prompt in self._prompts}),
                mend="take an environment whose openings differ by letters of one token each",
            )  # fmt: skip
        texts = [self._renderer.text(ids) for ids in self._replies()]
        self.rewards = torch.stack([self._earned(task, texts) for task in prompts.values()])
        """float64 [P, V + V * V]: of each reply of one token, then of each of two; one that is none is 0."""

    def _replies(self) -> list[tuple[int, ...]]:
        ids = range(self._size)
        return [(a,) for a in ids] + [(a, b) for a in ids for b in ids]

    def _earned(self, task: Any, texts: Sequence[str]) -> torch.Tensor:
        section = self._config.environment

        async def all_of_them() -> list[float]:
            known: dict[str, float] = {}
            for text in texts:
                if text not in known:
                    environment = build_environment(section.path, section.options)
                    await environment.reset(task, task.seed)
                    known[text] = (await environment.step(Message("assistant", text))).reward
            return [known[text] for text in texts]

        return torch.tensor(asyncio.run(all_of_them()), dtype=torch.float64)

    def logprobs(self, weights: Weights) -> Logprobs:
        """Log-probabilities, with gradient, float64: [P, V] of the first token, [P, V, V] of the second."""
        self._model.load_state_dict(dict(weights), strict=False)
        prompts, size = len(self._prompts), self._size
        first, second = self._two_logprobs(
            torch.arange(prompts).repeat_interleave(size), torch.arange(size).repeat(prompts)
        )
        return first.view(prompts, size, size)[:, 0], second.view(prompts, size, size)

    def _two_logprobs(self, which: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, V] each: of the first token after prompts `which` [N], and of the second after `first`."""
        rows = torch.cat([torch.tensor(self._prompts)[which], first[:, None]], -1)
        logits = self._model(rows, use_cache=False, logits_to_keep=2).logits.double()
        return logits[:, 0].log_softmax(-1), logits[:, 1].log_softmax(-1)

    def joint(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """float64 [P, V + V * V] the probability of each reply."""
        alone = first.exp() * self._stops
        both = first.exp()[:, :, None] * second.exp() * ~self._stops[:, None]
        return torch.cat([alone, both.flatten(1)], -1)

    def expected(
        self, current: Logprobs, sampler: Logprobs, likely: torch.Tensor, objective: ObjectiveConfig
    ) -> torch.Tensor:
        """The expected gradient of our loss with the token mean, by all parameters end to end.

        Args:
            current: `logprobs` of the policy that learns, whose weights are loaded.
            sampler: `logprobs` of the one that sampled.
            likely: `joint` of the sampler.
        """
        prompts, size = likely.shape[0], self._size
        advantages = self.rewards - (likely * self.rewards).sum(-1, keepdim=True)
        single, pair = likely[:, :size].flatten(), likely[:, size:].flatten()
        found = [
            torch.cat([f.flatten(), f[:, :, None].expand(-1, -1, size).flatten(), s.flatten()])
            for f, s in (current, sampler)
        ]
        of_pairs = advantages[:, size:].flatten()
        places = prompts * size + torch.arange(pair.numel())
        return self._gradient(
            *found, torch.cat([advantages[:, :size].flatten(), of_pairs, of_pairs]),
            torch.cat([single, pair, pair]), torch.cat([torch.arange(prompts * size), places, places]),
            objective,
        )  # fmt: skip

    def sampled(self, sampler: Logprobs, drawn: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
        """The gradient of one batch, as `expected`, on the weights that are loaded.

        Args:
            drawn: int64 [P, B] of each prompt, places in [0, V + V * V); they are compared with each other.
        """
        prompts, size = len(self._prompts), self._size
        rewards = self.rewards.gather(-1, drawn)
        advantages = (rewards - rewards.mean(-1, keepdim=True)).flatten()
        which = torch.arange(prompts)[:, None].expand_as(drawn).flatten()
        places = drawn.flatten()
        paired = places >= size
        first = torch.where(paired, (places - size) // size, places)
        second = torch.where(paired, (places - size) % size, 0)
        one, two = self._two_logprobs(which, first)
        rows = torch.arange(len(which))
        current = [one[rows, first], two[rows, second][paired]]
        old = [sampler[0][which, first], sampler[1][which, first, second][paired]]
        credit, row = (torch.cat([of, of[paired]]) for of in (advantages, rows))
        return self._gradient(
            torch.cat(current), torch.cat(old), credit, torch.ones_like(credit), row, objective
        )

    def _gradient(
        self, current: torch.Tensor, sampler: torch.Tensor, credit: torch.Tensor, weight: torch.Tensor,
        rows: torch.Tensor, objective: ObjectiveConfig,
    ) -> torch.Tensor:  # fmt: skip
        kept = weight > 0
        tokens = Tokens(
            current[kept], sampler[kept], credit[kept], weight[kept], rows[kept], int(rows.max()) + 1
        )
        loss = policy_loss(tokens, objective, denominator=float(weight.sum())).loss
        grads = torch.autograd.grad(loss, self._parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in grads]).double()


def compared(
    task: Enumerated, new: Weights, old: Weights, batches: int, size: int, seed: int
) -> dict[str, dict[str, float]]:
    """Every side's gradient on samples of `old`, against that of `new` on its own samples.

    Returns:
        By side, and `fresh` for samples of `new` itself: `cosine`, `length` (of that gradient's) and `error`
        (length of the difference, of that gradient's) of the expected gradient; and of `batches` batches of
        `size` replies a prompt `cosine_of_batch`, `cosine_spread` (standard deviation) and `error_of_batch`
        (root of the mean square).
    """
    with torch.no_grad():
        sampler = task.logprobs(old)
    current = task.logprobs(new)  # last: gradients go through the weights that are loaded
    with torch.no_grad():
        likely = {"new": task.joint(*current), "old": task.joint(*sampler)}
    fresh = ObjectiveConfig.model_validate(SIDES["plain"])
    still = (current[0].detach(), current[1].detach())
    truth = task.expected(current, still, likely["new"], fresh)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        who: [torch.multinomial(of, size, replacement=True, generator=generator) for _ in range(batches)]
        for who, of in likely.items()
    }
    found = {}
    for side, parts in {"fresh": SIDES["plain"], **SIDES}.items():
        who, by = ("new", still) if side == "fresh" else ("old", sampler)
        objective = ObjectiveConfig.model_validate(parts)
        expected = truth if side == "fresh" else task.expected(current, by, likely[who], objective)
        found[side] = {
            "cosine": _cosine(expected, truth),
            "length": float(expected.norm() / truth.norm()),
            "error": float((expected - truth).norm() / truth.norm()),
            **_of_batches([task.sampled(by, d, objective) for d in drawn[who]], truth),
        }
    with torch.no_grad():
        apart = likely["old"] * (task.joint(*sampler) / likely["new"].clamp(min=1e-300)).log().nan_to_num(0)
        found["policies"] = {"kl": float(apart.sum(-1).mean())}
    return found


def _of_batches(sampled: Sequence[torch.Tensor], truth: torch.Tensor) -> dict[str, float]:
    cosines = [_cosine(one, truth) for one in sampled]
    off = [float((one - truth).square().sum() / truth.square().sum()) for one in sampled]
    return {
        "cosine_of_batch": statistics.fmean(cosines),
        "cosine_spread": statistics.stdev(cosines),
        "error_of_batch": statistics.fmean(off) ** 0.5,
    }


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))
