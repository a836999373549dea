"""On a GPU: the fused kernel, engines and learner that take turns on one device, bfloat16."""

import asyncio
import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from stateset_ray.actors.run import Run
from stateset_ray.config import load_config
from stateset_ray.learner.flex_rows import FlexRows
from stateset_ray.metrics import JsonLines
from stateset_ray.models import Hardware, TreeRows, load_model, state_tensors
from stateset_ray.policies.base import ReplyRequest
from stateset_ray.policies.transformers_engine import TransformersEngine
from stateset_ray.train import train, train_step

pytestmark = pytest.mark.timeout(500)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_the_fused_kernel_has_the_gradient_of_separate_stretches(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for segments in (
        [(256, -1), (130, 0), (128, 0), (5, -1)],
        [(40, -1), (7, 0), (300, -1), (1, 2), (90, 2)],
    ):
        total = sum(length for length, _ in segments)
        inputs = [
            torch.randn(1, n, total, 64, device="cuda", requires_grad=True)
            for n in (heads[0], heads[1], heads[1])
        ]
        weight = torch.randn(1, total, heads[0], 64, device="cuda")
        outputs, gradients = [], []
        for rows in (TreeRows(segments, "cuda"), FlexRows(segments, "cuda")):
            outputs.append(rows.attend(0, *inputs, 0.125))
            gradients.append(torch.autograd.grad((outputs[-1] * weight).sum(), inputs))
        # The kernel multiplies in TF32 at most; a token too many or too few would be off by far more.
        torch.testing.assert_close(outputs[1], outputs[0], rtol=5e-3, atol=5e-3)
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-2)


def test_an_engine_that_sleeps_gives_the_devices_memory_back() -> None:
    hardware = Hardware("cuda", torch.bfloat16, 1)
    model = load_model("smollm2", hardware)
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in state_tensors(model).items()}

    async def main() -> tuple[int, int, list[tuple[int, ...]]]:
        engine = TransformersEngine(model, (), slots=64, max_context=1024, hardware=hardware)
        replies = []
        for version in (1, 2):
            await engine.load_weights(version, copy.deepcopy(weights))
            reply = await engine.reply(ReplyRequest("c", tuple(range(5, 45)), (), 12, 0.0, 0))
            replies.append(reply.token_ids)
            awake = torch.cuda.memory_reserved()
            await engine.sleep()
        return awake, torch.cuda.memory_reserved(), replies

    awake, asleep, replies = asyncio.run(main())
    assert replies[0] == replies[1]
    assert asleep < awake / 10


@pytest.mark.parametrize("sleep", [False, True])
def test_a_run_on_one_device(tmp_path: Path, sleep: bool) -> None:
    config = load_config(None, [
        f"run.dir={tmp_path}", "model.name=smollm2", "environment.path=benchmarks.chance:Chance",
        "rollout.max_turns=2", "rollout.max_turn_tokens=16", "rollout.on_cut_reply=close",
        f"rollout.sleep={str(sleep).lower()}", "grpo.group_size=4", "train.steps=2",
        "train.tasks_per_step=2", "evaluate.tasks=0", "cluster.worker_gpus=0.5", "cluster.learner_gpus=0.5",
    ])  # fmt: skip
    slept = []

    def step(run: Run, number: int) -> Mapping[str, float]:
        update = train_step(run, number)
        slept.append(run.pool.stats()[0]["sleeps"])
        return update

    train(config, take_step=step)
    records = JsonLines(config.run.folder / "metrics.jsonl").read()
    assert slept == ([1, 2] if sleep else [0, 0])
    assert all(abs(record["kl_mismatch"]) < 0.05 for record in records)  # both sides in bfloat16
