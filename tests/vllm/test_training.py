"""Training with vLLM engines: what is learned from is what was sampled, and no process stays behind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stateset_ray.config import load_config
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(500)]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    import ray

    folder = tempfile.mkdtemp(
        prefix="ssr", dir="/tmp"
    )  # short: the sockets in it must stay below 108 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            _temp_dir=folder,
        )  # fmt: skip
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("engines", [0, 1])
def test_a_run_learns_from_what_vllm_sampled(folder: str, tmp_path: Path, engines: int) -> None:
    config = load_config(
        None,
        [
            f'run.dir="{tmp_path}"', f'model.name="{folder}"', "model.threads=1",
            'rollout.engine_kind="vllm"', f"rollout.engines={engines}", "rollout.concurrency=8",
            "rollout.max_turns=2", "rollout.max_turn_tokens=6", "rollout.max_context=128",
            'rollout.on_cut_reply="close"', 'learner.engine="torch"', "learner.learning_rate=1e-2",
            "grpo.group_size=4", "train.steps=2", "train.tasks_per_step=2", "evaluate.tasks=0",
        ],
    )  # fmt: skip
    before = _engine_cores()
    summary = train(config)
    assert summary["policy_version"] == 2
    first, second = JsonLines(config.run.folder / "metrics.jsonl").read()
    for record in (first, second):
        assert record["trajectories"]["trained"] == record["trajectories"]["dispatched"] == 8
        # The learner's log-probabilities of the sampled tokens against vLLM's, with the weights of now: had
        # the second step been sampled with those of the first, this would be some hundred times as much.
        assert abs(record["kl_mismatch"]) < 1e-4
    assert second["policy_version"] == 2
    left = [p for p in psutil.process_iter() if p.pid in _engine_cores() - before]
    assert not psutil.wait_procs(left, timeout=30)[1]


def _engine_cores() -> set[int]:
    """vLLM's own processes, by the name that they give themselves."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and "EngineCore" in " ".join(process.info["cmdline"] or ()):
            found.add(process.pid)
    return found
