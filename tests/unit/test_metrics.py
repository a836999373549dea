"""What a run writes down."""

from pathlib import Path

import pytest

from stateset_ray.errors import RunError
from stateset_ray.metrics import JsonLines, MemoryMeter, resident_bytes, spread, versions


def test_records_come_back_and_a_cut_line_does_not(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    for step in range(3):
        lines.append({"step": step, "value": 0.1 + 0.2})
    with lines.path.open("a") as file:
        file.write('{"step": 3, "val')
    assert [r["step"] for r in lines.read()] == [0, 1, 2]
    assert lines.read()[0]["value"] == 0.1 + 0.2


def test_rewinding_drops_what_will_be_written_again(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(5):
        lines.append({"step": step})
    lines.rewind(3)
    lines.append({"step": 3})
    assert [r["step"] for r in lines.read()] == [0, 1, 2, 3]


def test_a_full_disk_is_a_clear_error():
    lines = JsonLines(Path("/dev/full"))
    with pytest.raises(RunError, match="cannot be written"):
        lines.append({"step": 0})


def test_memory_counts_this_process():
    with MemoryMeter(seconds=0.01) as meter:
        held = bytearray(64 * 2**20)
        held[::4096] = b"x" * len(held[::4096])
        assert resident_bytes() > 64 * 2**20
    assert meter.peak_bytes > 64 * 2**20


def test_spread_and_versions():
    assert spread([0.0, 1.0]) == {"mean": 0.5, "std": 0.5}
    assert spread([]) == {"mean": 0.0, "std": 0.0}
    assert {"python", "torch", "ray", "deepspeed"} <= versions().keys()
