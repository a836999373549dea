"""One turn of the outer loop against a run that only takes notes."""

from types import SimpleNamespace
from typing import Any

import pytest

from stateset_ray import train as module
from stateset_ray.train import train_step


@pytest.mark.parametrize(
    ("update", "published"),
    [({"applied": 1.0}, [8]), ({"applied": 3.0}, [10]), ({}, [])],
    ids=["one optimizer step", "three", "nothing to learn"],
)
def test_bug_22_47_the_version_rises_by_one_for_each_applied_step(
    update: dict[str, float], published: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing applied (no gradient, or a step that was not finite and raised): nothing is published."""
    notes: dict[str, Any] = {"published": []}
    run = SimpleNamespace(
        config=None, version=7, collect=lambda step: "collected", update=lambda batch, step: update,
        publish=notes["published"].append,
        after=lambda *args: notes.update(after=args),
    )  # fmt: skip
    monkeypatch.setattr(module, "policy_batch", lambda collected, config: "batch")
    assert train_step(run, 3) == update  # type: ignore[arg-type]
    assert notes["published"] == published
    assert notes["after"][:3] == ("collected", "batch", update)
    assert notes["after"][3].keys() == {"rollout", "credit", "learner", "publish"}
