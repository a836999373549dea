"""What all tests share: one torch thread, a model cache that outlives the test, no network.

`make test` plays them with two processes at a time (pytest-xdist). All that start Ray are played by one of
them, in one cluster; the others are dealt out file by file, since the tests of a file share what is loaded
once.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the tests beside these want a core, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_RAY = "tests/ray/"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray comes first: it takes longest, and one process plays all of it."""
    items.sort(key=lambda item: not _starts_ray(item.nodeid))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who plays what: all of Ray together, and everything else by file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _RAY if _starts_ray(nodeid) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # by number of tests, which says nothing
    return ByFile(config, log)


def _starts_ray(nodeid: str) -> bool:
    return nodeid.startswith((_RAY, "tests/e2e/")) and "test_readme" not in nodeid
