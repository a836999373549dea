"""A run whose mirror is an S3 server: killed, and continued where nothing of it lies."""

from __future__ import annotations

import runpy
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from playground import small

from stateset_ray.metrics import JsonLines
from stateset_ray.train import train

pytestmark = [
    pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400),
    pytest.mark.skipif(
        not all(find_spec(name) for name in ("moto", "flask", "s3fs", "boto3")),
        reason="needs an S3 server and its client: pip install 'moto[server]' s3fs boto3",
    ),
]  # fmt: skip
support = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "support_s3.py"))

DIES = """
import os, signal, sys
from stateset_ray.config import load_config
from stateset_ray.train import train

def on_event(event):
    if event["event"] == "mirrored" and event["name"] == "step-00000002":
        os.kill(os.getpid(), signal.SIGKILL)

train(load_config(sys.argv[1]), on_event=on_event)
"""


def test_a_killed_run_goes_on_from_s3_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    for name, value in support["KEYS"].items():
        monkeypatch.setenv(name, value)
    settings = ("train.steps=4", "train.checkpoint_every=1", "learner.engine=torch", "run.name=demo")
    mirrored = (*settings, 'run.mirror="s3://bucket/runs"')
    with support["serving_s3"]("bucket") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        here = f'cluster.address="{ray.get_runtime_context().gcs_address}"'
        begun = tmp_path / "begun.toml"
        begun.write_text(small(tmp_path / "lost", here, *mirrored).to_toml())
        died = subprocess.run([sys.executable, "-c", DIES, str(begun)], check=False, timeout=200)
        assert died.returncode == -signal.SIGKILL
        assert not (tmp_path / "empty").exists()

        busy = [2]  # what is busy for a moment is asked again

        def fault(request: Any) -> Any:
            busy[0] -= request["REQUEST_METHOD"] == "PUT" and "step-00000003" in request["PATH_INFO"]
            return ("500 Internal Server Error", b"<Error/>") if 0 <= busy[0] < 2 else None

        server.fault = fault
        events: list[Any] = []
        train(small(tmp_path / "empty", *mirrored), resume=True, on_event=events.append)
        assert busy[0] < 0
    [resumed] = [event for event in events if event["event"] == "resumed"]
    assert resumed["step"] == 2
    assert not [event for event in events if event.get("name") == "not_mirrored"]
    mirrored_steps = [event["name"] for event in events if event["event"] == "mirrored"]
    assert mirrored_steps[0] == "step-00000003"

    train(small(tmp_path / "whole", *settings))
    broken, whole = tmp_path / "empty/demo", tmp_path / "whole/demo"
    records = [JsonLines(folder / "metrics.jsonl").read() for folder in (broken, whole)]
    assert [record["step"] for record in records[0]] == [0, 1, 2, 3]
    for mine, theirs in zip(*records, strict=True):
        for key in ("policy_version", "reward_mean", "loss", "grad_norm", "trajectories"):
            assert mine[key] == theirs[key], (key, mine["step"])
    weights = "checkpoints/step-00000004/model.safetensors"
    assert (broken / weights).read_bytes() == (whole / weights).read_bytes()
