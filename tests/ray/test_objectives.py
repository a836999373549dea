"""Objectives and learners beyond the default, end to end: what they leave, and that resuming stays exact."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from playground import small
from safetensors.torch import load_file

from stateset_ray import checkpoint
from stateset_ray.actors.run import open_run
from stateset_ray.config import Config
from stateset_ray.errors import ConfigError
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train, train_step

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

EVERY = ("train.checkpoint_every=1", "train.keep_checkpoints=9")


def records(config: Config) -> list[dict[str, Any]]:
    return JsonLines(config.run.folder / "metrics.jsonl").read()


def model_file(config: Config, step: int) -> Path:
    return config.run.folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors"


def test_everything_at_once_resumes_bit_for_bit(tmp_path: Path) -> None:
    """KL in the reward with a steered coefficient, a reference that moves, minibatches, refills, entropy."""
    everything = (
        *EVERY, "grpo.preset=reinforce_pp", "grpo.advantage=reinforce_pp_baseline",
        "grpo.kl_coef=0.3", "grpo.kl_target=0.001",
        "grpo.reference_every=1", "grpo.entropy_coef=0.01", "grpo.trust=proximal", "grpo.correction=tis",
        "grpo.refills=1", "grpo.credit=return_to_go", "grpo.gamma=0.9", "train.updates_per_step=2",
    )  # fmt: skip
    straight = small(tmp_path / "straight", *everything, "train.steps=4")
    train(straight)
    halves = small(tmp_path / "halves", *everything, "train.steps=2")
    train(halves)
    halves = halves.with_overrides(["train.steps=4"])
    train(halves, resume=True)
    for mine, theirs in zip(records(halves), records(straight), strict=True):
        for key in (
            "policy_version",
            "reward_mean",
            "loss",
            "grad_norm",
            "kl_coef",
            "entropy",
            "trajectories",
        ):
            assert mine[key] == theirs[key], (key, mine["step"])
    assert model_file(halves, 4).read_bytes() == model_file(straight, 4).read_bytes()
    last = records(straight)[-1]
    assert last["policy_version"] == 8  # two optimizer steps in each of four steps
    assert last["update"]["applied"] == 2
    assert last["update"]["kl_reference"] > 0
    assert len({record["kl_coef"] for record in records(straight)}) == 4
    assert 0 < last["entropy"] < math.log(300)


def test_groups_of_equal_rewards_are_replaced_within_the_cap(tmp_path: Path) -> None:
    """DAPO's dynamic sampling: tasks 0, 2, 4... are dull, so each round of two finds one that teaches."""
    config = small(tmp_path, 'environment.path="playground:EveryOther"', "grpo.refills=1", *EVERY)
    with open_run(config) as run:
        train_step(run, 0)
        train_step(run, 1)
    first, second = records(config)
    # 0 and 1, then 2 in place of 0: nothing better was found before the cap.
    assert (first["groups"], first["equal_reward_groups"]) == (3, 2)
    assert first["trajectories"]["dispatched"] == 12
    assert (first["trajectories"]["trained"], first["trajectories"]["filtered"]) == (4, 8)
    # 3 and 4, then 5 in place of 4: a whole step of groups that teach.
    assert (second["groups"], second["equal_reward_groups"]) == (3, 1)
    assert (second["trajectories"]["trained"], second["trajectories"]["filtered"]) == (8, 4)
    # A run that is resumed here draws the task after those that the first step drew.
    found = checkpoint.latest(config.run.folder / "checkpoints")
    assert found
    assert (found.step, found.meta["next_task"]) == (1, 3)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """The optimizer's state is divided anew; the curve is that of one rank throughout."""
    straight = small(tmp_path / "straight", *EVERY, "train.steps=3")
    train(straight)
    config = small(tmp_path / "changed", *EVERY)
    train(config)
    before = model_file(config, 2).read_bytes()
    wider = config.with_overrides(["train.steps=3", "learner.ranks=2"])
    summary = train(wider, resume=True)
    assert summary["policy_version"] == 3
    assert model_file(config, 2).read_bytes() == before
    mine, theirs = records(wider)[-1], records(straight)[-1]
    assert mine["reward_mean"] == theirs["reward_mean"]
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    ours, wanted = load_file(model_file(wider, 3)), load_file(model_file(straight, 3))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", ["learner.zero_stage=2", 'learner.engine="torch"'])
def test_another_engine_or_stage_is_refused_on_resume_and_nothing_is_lost(
    tmp_path: Path, setting: str
) -> None:
    config = small(tmp_path, *EVERY, "train.steps=1")
    train(config)
    before = {p: p.read_bytes() for p in config.run.folder.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        train(config.with_overrides([setting, "train.steps=2"]), resume=True)
    assert {p: p.read_bytes() for p in config.run.folder.rglob("*") if p.is_file()} == before


def test_adapters_train_publish_merged_and_save_a_whole_model(tmp_path: Path) -> None:
    """LoRA with the model under the adapters as the reference; the checkpoint needs no PEFT."""
    pytest.importorskip("peft", reason="the extra `lora`")
    from transformers import AutoModelForCausalLM

    config = small(
        tmp_path, *EVERY, "learner.lora.rank=4", "learner.learning_rate=1e-2", "grpo.kl_coef=0.01",
        "train.steps=3",
    )  # fmt: skip
    train(config)
    for record in records(config):
        assert abs(record["kl_mismatch"]) < 1e-4  # what was published is what the learner has
        assert record["grad_norm"] > 0
    assert records(config)[0]["update"]["kl_reference"] == pytest.approx(0, abs=1e-7)
    assert records(config)[2]["update"]["kl_reference"] > 1e-7
    folder = model_file(config, 3).parent
    names = set(load_file(folder / "model.safetensors"))
    assert not any("lora" in name for name in names)
    assert AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_the_plain_engine_trains_like_deepspeed(tmp_path: Path) -> None:
    configs = [
        small(tmp_path / name, *EVERY, setting)
        for name, setting in (("torch", 'learner.engine="torch"'), ("zero", "learner.zero_stage=2"))
    ]
    for config in configs:
        train(config)
    plain, zero = (records(config)[-1] for config in configs)
    assert plain["reward_mean"] == zero["reward_mean"]
    assert plain["grad_norm"] == pytest.approx(zero["grad_norm"], rel=1e-4)
    ours, theirs = (load_file(model_file(config, 2)) for config in configs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)
