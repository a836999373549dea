"""What all tests share: one torch thread, a model cache that outlives the test, no network.

`make test` plays them with two processes at a time (pytest-xdist). They are dealt out file by file, since the
tests of a file share what is loaded once; each process that is dealt one that needs Ray starts a cluster of
its own, and keeps it for the next.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the tests beside these want a core, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray comes first: it takes longest, and short files at the end even out who is done when."""
    items.sort(key=lambda item: not _starts_ray(item.nodeid))


def _starts_ray(nodeid: str) -> bool:
    return nodeid.startswith(("tests/ray/", "tests/e2e/")) and "test_readme" not in nodeid
