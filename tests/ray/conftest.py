"""One local Ray cluster for all tests of this folder, apart from any other on this machine."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# The controller sends its import paths to the workers: this is how they find `playground`.
sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture(scope="session", autouse=True)
def local_ray() -> Iterator[None]:
    """A cluster that `open_run` finds by `ray.is_initialized()`; its CPUs are logical ones."""
    import ray

    if ray.is_initialized():  # of another folder's tests
        yield
        return
    # Short, because the sockets in it must stay below 108 characters.
    folder = tempfile.mkdtemp(prefix="ssr", dir="/tmp")
    before = os.environ.copy()
    # Ray would write a token into the home directory, and a RAY_ADDRESS would be joined.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _temp_dir=folder,
    )  # fmt: skip
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(folder, ignore_errors=True)
