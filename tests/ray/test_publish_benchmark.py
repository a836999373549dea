"""The benchmark of publications, in small: each transport reaches every engine, and no request fails."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.publish import TRANSPORTS, measure  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "transport", [t if t == "collective" else pytest.param(t, marks=pytest.mark.slow) for t in TRANSPORTS]
)
def test_every_version_is_answered_with_while_requests_go_on(transport: str, tmp_path: Path) -> None:
    options = argparse.Namespace(
        model="tiny", engines=2, conversations=3, repeats=2, bucket_mib=1, folder=str(tmp_path)
    )
    found = measure(transport, options, [np.zeros(1000, np.float32)])
    assert found.keys() == {"quiet", "busy"}
    for side in found.values():
        assert len(side["of_each"]) == 2
        assert 0 < side["learner"] + side["engines"] <= side["seconds"]
    assert found["quiet"]["replies"] == 0
    assert found["busy"]["replies"] > 0
