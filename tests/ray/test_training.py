"""Training end to end: what a run leaves, that it repeats to the bit, and that its shape does not matter."""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from playground import small
from safetensors.torch import load_file

from stateset_ray import checkpoint
from stateset_ray.actors.run import Run
from stateset_ray.config import Config
from stateset_ray.errors import RunError
from stateset_ray.metrics import JsonLines
from stateset_ray.models import local_folder
from stateset_ray.train import train, train_step
from stateset_ray.types import StopReason, Trajectory

# A run starts two processes that load torch, transformers and DeepSpeed: 15 s on two busy cores.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ALL = ("train.steps=4", "train.checkpoint_every=1", "train.keep_checkpoints=9")
"""A checkpoint after each of four steps."""


class Result:
    """A finished run: its summary, and what lies in its folder."""

    def __init__(self, config: Config, **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.summary = train(config, on_event=lambda e: self.events.append(dict(e)), **options)
        self.folder = Path(self.events[0]["folder"])
        self.metrics = JsonLines(self.folder / "metrics.jsonl").read()

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        return load_file(self.checkpoint(step) / "model.safetensors")

    def conversations(self, step: int) -> list[Trajectory]:
        lines = JsonLines(self.folder / "trajectories.jsonl").read()
        return [Trajectory.from_json(json.dumps(x["trajectory"])) for x in lines if x["step"] == step]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Four steps, one worker, one rank."""
    return Result(small(tmp_path_factory.mktemp("plain"), *ALL, "evaluate.tasks=4", "train.evaluate_every=2"))


# --- what a run leaves


def test_every_step_is_written_down(plain: Result) -> None:
    assert [record["step"] for record in plain.metrics] == [0, 1, 2, 3]
    assert [record["policy_version"] for record in plain.metrics] == [1, 2, 3, 4]
    for record in plain.metrics:
        assert -1 <= record["reward_mean"] <= 1
        assert record["reward_std"] > 0
        assert math.isfinite(record["loss"])
        assert record["grad_norm"] > 0
        assert record["learning_rate"] == 1e-3
        assert abs(record["kl_mismatch"]) < 1e-4  # on-policy: sampler and trainer agree
        assert abs(record["update"]["ratio_max"] - 1) < 1e-3
        assert 2 <= record["tokens_per_trajectory"]["mean"] <= 8
        assert record["turns_per_trajectory"] == {"mean": 2.0, "std": 0.0}
        assert record["stop_reasons"] == {"completed": 8}
        assert record["errors"] == []
        assert record["rollout_tokens_per_second"] > 0
        assert record["learner_tokens_per_second"] > 0
        assert record["seconds"].keys() == {"rollout", "credit", "learner", "publish"}
        assert all(seconds > 0 for seconds in record["seconds"].values())
        assert record["worker_restarts"] == 0
        counts = record["trajectories"]
        assert counts["dispatched"] == 8 == counts["trained"] + counts["filtered"]
        assert counts["dropped"] == counts["aborted"] == {}
        masked = record["update"]["masked_tokens"]
        assert masked == pytest.approx(record["tokens_per_trajectory"]["mean"] * 8) or counts["filtered"]


def test_the_summary_says_what_was_done(plain: Result) -> None:
    assert json.loads((plain.folder / "summary.json").read_text()) == plain.summary
    assert plain.summary["steps"] == plain.summary["policy_version"] == 4
    assert plain.summary["checkpoint"] == str(plain.checkpoint(4))
    assert plain.summary["versions"]["torch"] == torch.__version__
    for name in ("before", "step_2", "after"):
        assert -1 <= plain.summary[f"heldout_{name}"] <= 1
        assert plain.summary["conversations"][name][0]["content"].startswith("Say: ")
    kinds = [event["event"] for event in plain.events]
    assert kinds.count("step") == kinds.count("checkpoint") == 4
    assert kinds[0] == "opened"
    assert kinds[-1] == "finished"


def test_the_config_that_lies_there_runs_again(plain: Result) -> None:
    from stateset_ray.config import load_config

    again = load_config(plain.folder / "config.toml")
    assert again.run.folder == plain.folder
    assert again.train.steps == 4


def test_a_checkpoint_is_a_plain_model_and_the_one_that_sampled(plain: Result) -> None:
    """Step 2 was played with the weights of checkpoint 2: plain transformers must find its log-probs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(plain.checkpoint(2), dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(plain.checkpoint(2)).chat_template
    conversations = plain.conversations(2)
    assert len(conversations) == 2
    for conversation in conversations:
        assert conversation.stop_reason is StopReason.COMPLETED
        assert conversation.reward == sum(turn.reward for turn in conversation.turns)
        for prompt, turn in zip(conversation.prompts(), conversation.turns, strict=True):
            assert turn.policy_version == 2
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *turn.token_ids]])).logits[0]
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            found = logprobs.gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(found, torch.tensor(turn.logprobs), atol=1e-4, rtol=0)


def test_the_weights_move_at_every_step(plain: Result) -> None:
    states = [load_file(Path(local_folder("tiny")) / "model.safetensors")]
    states += [plain.weights(step) for step in (1, 2, 3, 4)]
    for before, after in pairwise(states):
        assert before.keys() == after.keys()
        assert not any(torch.equal(before[name], after[name]) for name in before)


# --- exactness


def test_bug_31_33_two_steps_and_two_more_equal_four(plain: Result, tmp_path: Path) -> None:
    """Bit for bit. The second half is played and learned by new processes."""
    first = Result(small(tmp_path, *ALL, "train.steps=2"))
    second = Result(small(tmp_path, *ALL, "train.steps=4"), resume=True)
    assert (second.folder, len(first.metrics)) == (first.folder, 2)
    assert [r["step"] for r in second.metrics] == [0, 1, 2, 3]
    for mine, theirs in zip(second.metrics, plain.metrics, strict=True):
        for key in ("policy_version", "reward_mean", "reward_std", "loss", "grad_norm", "trajectories"):
            assert mine[key] == theirs[key], (key, mine["step"])
    for step in (2, 4):
        mine, theirs = second.checkpoint(step), plain.checkpoint(step)
        name = "model.safetensors"
        assert (mine / name).read_bytes() == (theirs / name).read_bytes(), f"step {step}"
    assert second.summary["steps"] == second.summary["policy_version"] == 4


@pytest.mark.parametrize("shape", ["learner.ranks=2", "rollout.workers=2"])
def test_the_shape_of_the_run_changes_nothing(plain: Result, tmp_path: Path, shape: str) -> None:
    """One update by two ranks, or from what two workers played, is the update of one."""
    other = Result(small(tmp_path, *ALL, "train.steps=1", shape))
    mine, theirs = other.metrics[0], plain.metrics[0]
    for key in ("reward_mean", "reward_std", "trajectories", "stop_reasons", "tokens_per_trajectory"):
        assert mine[key] == theirs[key], key
    # Adam's first step hides a gradient that is wrong by a factor; its norm does not.
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    # What is shared depends on who computes it; what is learned from does not.
    assert mine["update"]["tokens_unshared"] == theirs["update"]["tokens_unshared"]
    start = load_file(Path(local_folder("tiny")) / "model.safetensors")
    for name, tensor in other.weights(1).items():
        expected = plain.weights(1)[name]
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_engines_that_sleep_while_the_learner_computes_change_nothing(plain: Result, tmp_path: Path) -> None:
    """Bit for bit; evaluations wake them as well."""
    slept: list[float] = []

    def step(run: Run, number: int) -> Mapping[str, float]:
        update = train_step(run, number)
        slept.append(run.pool.stats()[0]["sleeps"])
        return update

    settings = ("train.steps=2", "rollout.sleep=true", "evaluate.tasks=4", "train.evaluate_every=1")
    other = Result(small(tmp_path, *ALL, *settings), take_step=step)
    assert slept == [1, 2]
    for number in (1, 2):
        name = "model.safetensors"
        mine, theirs = other.checkpoint(number), plain.checkpoint(number)
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()


# --- what is not learned from


def test_equal_rewards_teach_nothing_and_end_the_run(tmp_path: Path) -> None:
    config = small(tmp_path, 'environment.path="playground:Constant"', "train.steps=50")
    with pytest.raises(RunError, match="10 steps in a row gave no gradient") as caught:
        train(config)
    assert caught.value.given["equal_reward_share"] == 1.0
    assert "warm-start" in caught.value.mend
    records = JsonLines(config.run.folder / "metrics.jsonl").read()
    assert len(records) == 10
    for record in records:
        counts = record["trajectories"]
        assert (counts["filtered"], counts["trained"], counts["dispatched"]) == (8, 0, 8)
        assert (record["policy_version"], record["reward_std"], record["loss"]) == (0, 0.0, None)


def test_a_warm_start_comes_first_and_shuffled_rewards_train(tmp_path: Path) -> None:
    config = small(
        tmp_path, "train.warm_start.steps=2", "train.warm_start.learning_rate=1e-2",
        "evaluate.tasks=4", "grpo.shuffle_rewards=true", "train.steps=2", "train.keep_checkpoints=9",
    )  # fmt: skip
    result = Result(config)
    # Two supervised steps and two of GRPO, all through one learner.
    assert result.summary["policy_version"] == 4
    assert result.summary["warm_started"] == 2
    assert [r["policy_version"] for r in result.metrics] == [3, 4]
    losses = [event["loss"] for event in result.events if event["event"] == "warm_start"]
    assert losses[0] > losses[1] > 0
    named = [event["name"] for event in result.events if event["event"] == "evaluation"]
    assert named == ["untrained", "before", "after"]
    assert result.summary["heldout_before"] != result.summary["heldout_untrained"]
    for record in result.metrics:
        assert record["trajectories"]["trained"] == 8
        assert abs(record["kl_mismatch"]) < 1e-4
    # The warm start is a checkpoint of its own, so that a run that ends early need not repeat it.
    found = checkpoint.verify(result.checkpoint(0))
    assert found.meta["version"] == 2
    assert found.meta["results"]["warm_started"] == 2
    # Tasks that were warm-started on are not trained on again.
    first = result.conversations(0)[0].task
    assert first.id == f"train-{2 * config.train.warm_start.dialogues}"
