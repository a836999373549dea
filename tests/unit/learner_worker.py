"""One rank of the learner tests: plays every scenario in a process of its own and writes down what came.

A process group and DeepSpeed's globals would leak into the tests beside it; and starting a process costs
seconds, so that one pair of processes plays everything.

    python learner_worker.py FOLDER RANK WORLD
"""

import json
import random
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stateset_ray.config import Config, load_config
from stateset_ray.errors import StatesetError
from stateset_ray.learner.batch import Item, MiniBatch, plan
from stateset_ray.learner.learner import Learner
from stateset_ray.models import Hardware, load_model, state_tensors
from stateset_ray.policies.weights import decode
from stateset_ray.types import Sample

Meetings = runpy.run_path(str(Path(__file__).with_name("support_ranks.py")))["Meetings"]

CPU = Hardware("cpu", torch.float32, 1)
STEPS = 2


def config(*overrides: str) -> Config:
    # The clip must act, and rates must be large enough for an error in any of them to show.
    return load_config(
        None,
        [
            "model.name=tiny", "learner.learning_rate=1e-3", "learner.max_grad_norm=0.5",
            "rollout.temperature=1.3", "learner.weight_decay=0.01", *overrides,
        ],
    )  # fmt: skip


def batch() -> list[Sample]:
    """Eight samples of unequal length in two runs of sampled tokens; two end in pad (0) and stop (2)."""
    rng = np.random.default_rng(0)
    rows = []
    for n in (12, 40, 17, 33, 25, 8, 21, 29):
        ids = rng.integers(3, 259, n).astype(np.int32)
        mask = np.zeros(n, dtype=bool)
        mask[n // 4 : n // 2] = mask[2 * n // 3 :] = True
        ids[-1] = (0, 2, ids[-1])[len(rows) % 3]
        logprobs = np.where(mask, -5.5 + 0.3 * rng.normal(size=n), 0).astype(np.float32)
        advantages = np.where(mask, rng.normal(), 0).astype(np.float32)
        none = np.where(mask, 0, -1).astype(np.int32)
        rows.append(Sample(ids, mask, logprobs, advantages, none, none))
    return rows


def minibatch(rows: list[list[Sample]], denominator: float) -> MiniBatch:
    """Micro-batches that share nothing."""
    return MiniBatch(rows, [range(len(samples)) for samples in rows], denominator)


def masked(samples: list[Sample]) -> int:
    return sum(int(sample.loss_mask.sum()) for sample in samples)


class Rank:
    """What the scenarios share: this rank's place, and where results go."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.meetings = Meetings(folder, "learner", rank, world)
        self.results: dict[str, Any] = {}

    def learner(self, settings: Config, model_folder: str | None = None) -> Learner:
        return Learner(settings, self.rank, self.world, self.meetings.master(), CPU, model_folder)

    def train(
        self, learner: Learner, steps: range, loss: str = "policy", cut: Any = None
    ) -> list[dict[str, float]]:
        samples = batch()
        mine = (cut or self.cuts()["planned"])[self.rank]
        rows = [[samples[i] for i in indices] for indices in mine]
        part = minibatch(rows, masked(samples))
        return [learner.update([part], step, loss) for step in steps]  # type: ignore[arg-type]

    def cuts(self) -> dict[str, list[list[list[int]]]]:
        """`[rank][micro_batch]` -> samples, in several ways that must not matter."""
        planned = plan([Item(len(sample)) for sample in batch()], self.world, 48)
        if self.world == 1:
            return {
                "planned": planned,
                "1x8": [[list(range(8))]],
                "2x4": [[[0, 1, 2, 3], [4, 5, 6, 7]]],
                "3 unequal": [[[3], [0, 1, 2, 4, 5, 6], [7]]],
                "with padding": [[[0, 1], [], [2, 3, 4, 5, 6, 7]]],
            }
        return {
            "planned": planned,
            "1 against 7": [[[5]], [[0, 1, 2, 3, 4, 6, 7]]],
            "all against none": [[list(range(4)), list(range(4, 8))], [[], []]],
        }

    def keep(self, name: str, learner: Learner, metrics: list[dict[str, float]]) -> None:
        weights = learner.export_weights()
        if self.rank == 0:
            np.savez(self.folder / f"{self.world} {name}.npz", **weights)
        else:
            assert weights == {}
        self.results[name] = metrics

    def finish(self) -> None:
        path = self.folder / f"results-{self.world}-{self.rank}.json"
        path.write_text(json.dumps(self.results))


def error_of(action: Any) -> str:
    try:
        action()
    except StatesetError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def splits(place: Rank) -> None:
    for stage in (1, 2, 3):
        cuts = place.cuts() if stage != 2 else {"planned": place.cuts()["planned"]}
        for name, cut in cuts.items():
            learner = place.learner(config(f"learner.zero_stage={stage}"))
            place.keep(f"zero {stage} {name}", learner, place.train(learner, range(STEPS), cut=cut))
            learner.close()


def variants(place: Rank) -> None:
    for name, loss, overrides in (
        ("supervised", "supervised", ["train.warm_start.learning_rate=1e-3"]),
        ("reference", "policy", ["grpo.kl_coef=0.5"]),
        ("checkpointing", "policy", ["learner.gradient_checkpointing=true"]),
    ):
        learner = place.learner(config(*overrides))
        place.keep(name, learner, place.train(learner, range(STEPS), loss))
        learner.close()


def resume(place: Rank, stage: int) -> None:
    settings = config(f"learner.zero_stage={stage}", "learner.schedule=linear", "train.steps=10")
    saved = place.folder / f"checkpoint-{place.world}-{stage}"
    name = f"resume {stage}"
    learner = place.learner(settings)
    place.train(learner, range(2))
    learner.save_model(saved / "model")
    learner.save_state(saved / "state")
    place.keep(f"{name} straight", learner, place.train(learner, range(2, 4)))
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    place.results[f"{name} load into a used one"] = error_of(lambda: learner.load_state(saved / "state"))
    place.results[f"{name} checked by a used one"] = [
        error_of(partial(learner.check_state, folder))
        for folder in (saved / "state", place.folder / "nowhere")
    ]
    learner.close()

    learner = place.learner(settings, str(saved / "model"))
    place.results[f"{name} missing"] = error_of(lambda: learner.load_state(place.folder / "nowhere"))
    learner.load_state(saved / "state")
    place.keep(f"{name} loaded", learner, place.train(learner, range(2, 4)))
    again = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    place.results[f"{name} draws"] = [drawn, again]
    learner.close()

    learner = place.learner(settings, str(saved / "model"))
    place.keep(f"{name} weights only", learner, place.train(learner, range(2, 4)))
    learner.close()


def perturbed(place: Rank) -> None:
    """As a search over hyper-parameters does it: the state of one trial under the settings of another."""
    settings = config("learner.learning_rate=5e-4", "learner.betas=[0.5,0.6]", "learner.weight_decay=0.25")
    learner = place.learner(settings, str(place.folder / "checkpoint-1-1" / "model"))
    learner.load_state(place.folder / "checkpoint-1-1" / "state")
    [metrics] = place.train(learner, range(2, 3))
    [group] = learner._engine._engine.optimizer.param_groups  # type: ignore[attr-defined]
    live = [group["lr"], *group["betas"], group["weight_decay"]]
    place.results["perturbed"] = [metrics["learning_rate"], live]
    learner.close()


def damaged_checkpoints(place: Rank) -> None:
    state = place.folder / "checkpoint-1-1" / "state" / "engine"
    learner = place.learner(config())
    [share] = state.glob("*_optim_states.pt")
    share.unlink()
    place.results["missing share"] = error_of(lambda: learner.load_state(state.parent))
    learner.close()


def not_finite(place: Rank) -> None:
    """One rank meets a ratio that overflows; every rank must stop, and no weight may move."""
    for stage in (1, 3):
        learner = place.learner(config(f"learner.zero_stage={stage}"))
        place.keep(f"before {stage}", learner, [])
        rows = batch()[:2] if place.rank == 0 else batch()[2:]
        if place.rank == 0:
            first = rows[0]
            negative = np.where(first.loss_mask, -1, 0).astype(np.float32)
            far = np.where(first.loss_mask, -1e4, 0).astype(np.float32)
            rows[0] = replace(first, logprobs=far, advantages=negative)
        name = f"infinite loss {stage}"
        place.results[name] = error_of(
            lambda: learner.update([minibatch([rows], masked(batch()))], 0)  # noqa: B023
        )
        place.keep(f"after {stage}", learner, [])
        learner.close()

    learner = place.learner(config())
    place.results["nothing"] = error_of(lambda: learner.update([], 0))
    modules = dict(learner._engine._engine.module.named_modules())
    [layer] = [module for name, module in modules.items() if name.endswith("layers.0.mlp.up_proj")]

    def spoil(_: Any, __: Any, output: torch.Tensor) -> None:
        if place.rank == 0:
            output.register_hook(lambda gradient: gradient * float("nan"))

    layer.register_forward_hook(spoil)
    place.results["infinite gradient"] = error_of(lambda: place.train(learner, range(1)))
    place.keep("after gradient", learner, [])
    learner.close()


def names(place: Rank) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in state_tensors(load_model("tiny", CPU)).items()}
    for stage in (1, 3):
        learner = place.learner(config(f"learner.zero_stage={stage}"))
        got = {name: list(decode(array).shape) for name, array in learner.export_weights().items()}
        place.results[f"names {stage}"] = [got, wanted]
        learner.close()


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    place = Rank(folder, rank, world)
    splits(place)
    not_finite(place)
    if world == 1:
        variants(place)
        names(place)
        resume(place, 1)
        perturbed(place)
        damaged_checkpoints(place)
    else:
        resume(place, 3)
    place.finish()


if __name__ == "__main__":
    main()
