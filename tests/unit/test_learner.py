"""The learner against a plain PyTorch loop: one rank and two, ZeRO 1 to 3, however the batch is cut."""

import json
import math
import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stateset_ray.config import load_config
from stateset_ray.learner.learner import learning_rate
from stateset_ray.models import local_folder

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("learner_worker.py")
STEPS, batch, config, masked = map(runpy.run_path(str(WORKER)).get, ("STEPS", "batch", "config", "masked"))
Weights = dict[str, np.ndarray[Any, Any]]


class Played:
    """What the processes of one group wrote."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world = folder, world
        self.ranks = [json.loads((folder / f"results-{world}-{r}.json").read_text()) for r in range(world)]

    def weights(self, name: str) -> Weights:
        return dict(np.load(self.folder / f"{self.world} {name}.npz"))

    def __getitem__(self, name: str) -> Any:
        return self.ranks[0][name]


def _play(folder: Path, world: int) -> Played:
    local_folder("tiny")  # built once, before the ranks ask for it together
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    ranks = []
    for rank in range(world):
        log = (folder / f"log-{world}-{rank}").open("w+")
        command = [sys.executable, str(WORKER), str(folder), str(rank), str(world)]
        ranks.append((subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), log))
    try:
        for process, _ in ranks:
            process.wait(timeout=240)
    finally:
        for process, log in ranks:
            process.kill()
            process.wait()
            log.seek(0)
            text = log.read()
            log.close()
            assert process.returncode == 0, text[-4000:]
    return Played(folder, world)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return _play(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return _play(tmp_path_factory.mktemp("two"), 2)


@cache
def _reference(loss: str = "policy", kl: float = 0.0) -> tuple[Weights, list[dict[str, float]]]:
    """Row by row with transformers' own attention, torch's AdamW and clipping: no code of the library's."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    samples, settings = batch(), config()
    model = AutoModelForCausalLM.from_pretrained(local_folder("tiny"), dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(local_folder("tiny"), dtype=torch.float32)
    betas = settings.learner.betas
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=betas, weight_decay=0.01)
    temperature = 1.3 if loss == "policy" else 1.0

    def logprobs_of(which: Any, ids: torch.Tensor) -> torch.Tensor:
        every = torch.log_softmax(which(ids[None]).logits[0, :-1].double() / temperature, -1)
        return every.gather(-1, ids[1:, None])[:, 0]

    metrics = []
    for _ in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids).long()
            mask = torch.from_numpy(sample.loss_mask)[1:]
            l = logprobs_of(model, ids)  # noqa: E741
            ratio = (l - torch.from_numpy(sample.logprobs)[1:]).exp()
            a = torch.from_numpy(sample.advantages)[1:]
            per_token = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a) if loss == "policy" else -l
            if kl:
                with torch.no_grad():
                    ref = logprobs_of(frozen, ids)
                per_token = per_token + kl * ((ref - l).exp() - (ref - l) - 1)
            total = total + (per_token * mask).sum() / masked(samples)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        metrics.append({"loss": total.item(), "grad_norm": norm.item()})
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, metrics


def _distance(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def _assert_like_the_reference(played: Played, name: str, loss: str = "policy", kl: float = 0.0) -> None:
    weights, wanted = _reference(loss, kl)
    for got in (rank[name] for rank in played.ranks):
        for ours, theirs in zip(got, wanted, strict=True):
            # AdamW does not see the scale of a gradient: the norm does.
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
            assert ours["grad_norm"] > 0.5  # so that clipping acts
    assert _distance(played.weights(name), weights) < 1e-5


@pytest.mark.parametrize("cut", ["planned", "1x8", "2x4", "3 unequal", "with padding"])
@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_sums_all_micro_batches(one: Played, stage: int, cut: str) -> None:
    _assert_like_the_reference(one, f"zero {stage} {cut}")


@pytest.mark.parametrize("cut", ["planned", "1 against 7", "all against none"])
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_equal_one_however_unequal_their_shares(two: Played, stage: int, cut: str) -> None:
    _assert_like_the_reference(two, f"zero {stage} {cut}")


def test_zero_2_sums_all_micro_batches_on_one_rank_and_two(one: Played, two: Played) -> None:
    _assert_like_the_reference(one, "zero 2 planned")
    _assert_like_the_reference(two, "zero 2 planned")


def test_the_plan_of_these_tests_has_three_micro_batches_or_more(one: Played) -> None:
    from stateset_ray.learner.batch import Item, plan

    assert len(plan([Item(len(sample)) for sample in batch()], 1, 48)[0]) >= 3


def test_supervised_loss_goes_the_same_way(one: Played) -> None:
    _assert_like_the_reference(one, "supervised", loss="supervised")
    assert one["supervised"][0]["learning_rate"] == 1e-3


def test_kl_to_the_frozen_reference(one: Played) -> None:
    _assert_like_the_reference(one, "reference", kl=0.5)
    assert one["reference"][0]["kl_reference"] == pytest.approx(0, abs=1e-9)
    assert one["reference"][1]["kl_reference"] > 1e-6


def test_gradient_checkpointing_changes_nothing(one: Played) -> None:
    _assert_like_the_reference(one, "checkpointing")


def test_metrics_count_all_ranks_and_every_masked_token_pad_included(one: Played, two: Played) -> None:
    samples = batch()
    assert {int(s.token_ids[-1]) for s in samples} >= {0, 2}
    for metrics in (one["zero 1 with padding"][0], two["zero 1 all against none"][0]):
        assert metrics["tokens"] == sum(map(len, samples))
        assert metrics["masked_tokens"] == masked(samples)
        assert metrics["applied"] == 1.0
        assert metrics["seconds"] > 0
        assert metrics["peak_memory_bytes"] > 1e8
        assert 0 < metrics["clip_fraction_low"] < 1
        assert 0 < metrics["clip_fraction_high"] < 1
    same = {k: v for k, v in two.ranks[0]["zero 1 planned"][0].items() if k != "seconds"}
    assert same == {k: v for k, v in two.ranks[1]["zero 1 planned"][0].items() if k != "seconds"}
    assert same["ratio_max"] == pytest.approx(one["zero 1 1x8"][0]["ratio_max"], rel=1e-5)
    assert same["kl_mismatch"] == pytest.approx(one["zero 1 1x8"][0]["kl_mismatch"], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_infinite_loss_stops_every_rank_before_the_step(one: Played, two: Played, stage: int) -> None:
    for played in (one, two):
        for rank in played.ranks:
            assert rank[f"infinite loss {stage}"].startswith("LearnerError: the loss of step 0 is not finite")
        assert _distance(played.weights(f"before {stage}"), played.weights(f"after {stage}")) == 0


def test_a_gradient_that_is_not_finite_is_not_applied(one: Played, two: Played) -> None:
    for played in (one, two):
        for rank in played.ranks:
            assert rank["infinite gradient"].startswith("LearnerError: a gradient of step 0 is not finite")
        assert _distance(played.weights("before 1"), played.weights("after gradient")) == 0


def test_an_update_without_samples_is_refused(one: Played) -> None:
    assert one["nothing"].startswith("LearnerError: there is nothing to learn from")


def test_resume_is_exact_on_one_rank(one: Played) -> None:
    straight, loaded = one.weights("resume 1 straight"), one.weights("resume 1 loaded")
    assert all(np.array_equal(straight[name], loaded[name]) for name in straight)
    for before, after in zip(one["resume 1 straight"], one["resume 1 loaded"], strict=True):
        for key in before.keys() - {"seconds", "peak_memory_bytes"}:
            assert before[key] == after[key], key
    drawn, again = one["resume 1 draws"]
    assert drawn == again
    # The optimizer's moments matter: weights alone lead elsewhere.
    assert _distance(straight, one.weights("resume 1 weights only")) > 1e-5


def test_resume_is_exact_on_two_ranks_under_zero_3(two: Played) -> None:
    assert _distance(two.weights("resume 3 straight"), two.weights("resume 3 loaded")) == 0
    assert _distance(two.weights("resume 3 straight"), two.weights("resume 3 weights only")) > 1e-5
    for rank in two.ranks:
        assert rank["resume 3 draws"][0] == rank["resume 3 draws"][1]
    assert two.ranks[0]["resume 3 draws"] != two.ranks[1]["resume 3 draws"]


def test_bug_34_perturbed_hyper_parameters_are_live_after_restore(one: Played) -> None:
    """Read inside the optimizer, after a step: an optimizer's state brings its old ones along."""
    reported, live = one["perturbed"]
    assert reported == 5e-4
    assert live == [5e-4, 0.5, 0.6, 0.25]


def test_checkpoints_that_cannot_be_continued_are_refused(one: Played) -> None:
    assert "no complete engine state" in one["resume 1 missing"]
    assert "build a new learner" in one["resume 1 load into a used one"]
    fits, missing = one["resume 1 checked by a used one"]  # what new ones could load
    assert (fits, "no complete engine state" in missing) == ("no error", True)
    assert "0 of 1 ranks" in one["missing share"]


@pytest.mark.parametrize("where", ["one 1", "two 3"])
def test_a_saved_model_is_an_ordinary_hugging_face_model(one: Played, two: Played, where: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    played, stage = (one, 1) if where == "one 1" else (two, 3)
    folder = played.folder / f"checkpoint-{played.world}-{stage}" / "model"
    assert list(folder.glob("*.safetensors"))
    assert "stateset" not in (folder / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "x"}])
    ours = {name: p.detach().numpy() for name, p in model.named_parameters()}
    weights, _ = _reference()
    settings = config("learner.schedule=linear", "train.steps=10")
    assert learning_rate(settings, 0) == 1e-3  # step 1 is slower than the reference's: near, not equal
    assert 0 < _distance(ours, weights) < 3e-4


def test_exported_names_are_those_of_the_model(one: Played) -> None:
    for stage in (1, 3):
        got, wanted = one[f"names {stage}"]
        assert got == wanted
        assert "lm_head.weight" not in got or "model.embed_tokens.weight" not in got


def test_learning_rate_follows_from_the_step_number() -> None:
    linear = load_config(
        None,
        [
            "learner.learning_rate=1.0", "learner.schedule=linear", "learner.warmup_steps=2",
            "train.steps=6",
        ],
    )  # fmt: skip
    assert [learning_rate(linear, step) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = linear.with_overrides(["learner.schedule=cosine"])
    assert learning_rate(cosine, 3) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    constant = linear.with_overrides(["learner.schedule=constant", "train.warm_start.learning_rate=0.25"])
    assert [learning_rate(constant, step) for step in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate(constant, 0, "supervised") == 0.25
