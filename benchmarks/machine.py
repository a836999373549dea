"""What the machine can do, measured in the same run as what is compared with it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from stateset_ray.models import Hardware

__all__ = ["commit", "describe", "limits", "linear_shapes", "seconds", "synchronize"]

_ROWS = 1024  # tokens of a large forward pass
_READ_BYTES = 1 << 30
_TIMES = 5


def describe() -> dict[str, Any]:
    """Processor, cores, memory, and how busy the machine is now."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_1min": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """The commit that is checked out, with `+` if the library was changed since."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short", "stateset_ray") else "")


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str = "cpu") -> tuple[float, float]:
    """Wall-clock seconds of one call, and the processor seconds of this process's threads."""
    synchronize(device)
    start, busy = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - busy


def limits(config: Any, hardware: Hardware) -> dict[str, Any]:
    """Matmul GFLOP/s and memory-read GB/s with one thread and with all; leaves the threads at all.

    The matmul figure is over one pass of the model's linear layers, `rows` tokens at once: all their
    operations by all their seconds.
    """
    shapes = linear_shapes(config)
    counts = sorted({1, hardware.threads})
    found: dict[str, Any] = {"rows": _ROWS, "matmul_gflops": {}, "memory_read_gb_s": {}}
    for threads in counts:
        torch.set_num_threads(threads)
        found["matmul_gflops"][str(threads)] = round(_matmul(shapes, hardware), 1)
        found["memory_read_gb_s"][str(threads)] = round(_read(hardware.device), 1)
    hardware.apply()
    return found


def linear_shapes(config: Any) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how often) of the model's linear layers, the head left out."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    kv = head * (getattr(config, "num_key_value_heads", None) or heads)
    return [
        (hidden, head * heads, 1), (hidden, kv, 2), (head * heads, hidden, 1),
        (hidden, inner, 2), (inner, hidden, 1),
    ]  # fmt: skip


def _matmul(shapes: list[tuple[int, int, int]], hardware: Hardware) -> float:
    flops = spent = 0.0
    for inputs, outputs, times in shapes:
        x = torch.randn(_ROWS, inputs, dtype=hardware.dtype, device=hardware.device)
        weight = torch.randn(outputs, inputs, dtype=hardware.dtype, device=hardware.device)
        best = _best(lambda x=x, weight=weight: F.linear(x, weight), hardware.device)
        flops += times * 2.0 * _ROWS * inputs * outputs
        spent += times * best
    return flops / spent / 1e9


def _read(device: str) -> float:
    block = torch.ones(_READ_BYTES // 4, device=device)
    return _READ_BYTES / _best(block.sum, device) / 1e9


def _best(work: Callable[[], Any], device: str) -> float:
    return min(seconds(work, device)[0] for _ in range(_TIMES + 1))
