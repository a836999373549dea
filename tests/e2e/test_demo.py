"""The demo in small: the real chat model, the real environment, real actors, one step of each kind."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from stateset_ray.config import load_config
from stateset_ray.metrics import JsonLines
from stateset_ray.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "customer_service.toml"
SMALL = [
    "train.steps=1", "train.tasks_per_step=1", "train.warm_start.steps=1", "train.warm_start.dialogues=2",
    "evaluate.tasks=2",
]  # fmt: skip


def test_the_demo_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(EXAMPLE, [f'run.dir="{tmp_path}"', *SMALL])
    summary = train(config)
    assert {"heldout_untrained", "heldout_before", "heldout_after"} <= summary.keys()
    [record] = JsonLines(config.run.folder / "metrics.jsonl").read()
    assert record["trajectories"]["dispatched"] == 8
    if record["loss"] is not None:  # else all eight earned the same
        assert abs(record["kl_mismatch"]) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(summary["checkpoint"])
    assert model.num_parameters() == 134_515_008
