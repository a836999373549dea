"""One local Ray cluster for all tests of this folder, apart from any other on this machine."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

# The controller sends its import paths to the workers: this is how they find `playground`.
sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture(scope="session", autouse=True)
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster that `open_run` finds by `ray.is_initialized()`; its CPUs are logical ones."""
    import ray

    from stateset_ray.actors.placement import start_ray

    if ray.is_initialized():  # of another folder's tests
        yield
        return
    # Short, because the sockets in it must stay below 108 characters.
    folder = tempfile.mkdtemp(prefix="ssr", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        # Ray would write a token into the home directory, and would join a RAY_ADDRESS.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        # Another process of pytest may start one just now, and both would take too long.
        with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
            start_ray(
                num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                _temp_dir=folder,
            )  # fmt: skip
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
