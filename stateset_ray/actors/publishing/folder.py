"""Weights through a shared folder (`policies.weight_folder`), which other clusters can read as well."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from stateset_ray.actors.publishing.base import Arrived
from stateset_ray.actors.remote import get
from stateset_ray.config import Config
from stateset_ray.errors import CheckpointError, ClusterError
from stateset_ray.learner.learner import Learner
from stateset_ray.policies import weight_folder
from stateset_ray.policies.weights import decode

__all__ = [
    "FolderReceiver",
    "FolderSender",
    "check_run_folder",
    "check_shared",
    "root_of",
    "sees",
    "write_probe",
]

_PROBE = ".probe"
_LATE = 10.0  # seconds until another node shows a new file


def root_of(config: Config) -> str:
    """The folder that versions are published into, as an absolute path."""
    return str(Path(config.publish.folder or config.run.folder / "weights").absolute())


class FolderSender:
    """Writes each version as a model in the Hugging Face layout; implements `Sender`.

    The handle is the folder's path.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._beside: dict[str, bytes] = {}

    def send(self, learner: Learner, version: int, lineage: int, root: str) -> tuple[Any, ...]:
        """See `Sender.send`.

        Raises:
            CheckpointError: it cannot be written; the versions before it are whole.
        """
        arrays = learner.export_weights(copy=False)
        if learner.rank != 0:
            return (None,)
        self._beside = self._beside or weight_folder.description(self._config.model.name)
        folder = weight_folder.publish(
            Path(root), version, lineage, {name: decode(array) for name, array in arrays.items()},
            keep=self._config.publish.keep, timeout=self._config.publish.timeout, beside=self._beside,
        )  # fmt: skip
        return (str(folder),)


class FolderReceiver:
    """Verifies and maps a version's files; implements `Receiver`."""

    def __init__(self) -> None:
        # Of its own: those of the event loop may all be with environments that block.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")

    async def fetch(self, version: int, lineage: int, handle: Any) -> Arrived:
        """See `Receiver.fetch`.

        Raises:
            CheckpointError: the version is damaged, or gone and there is no newer one.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _read, version, lineage, Path(handle))


def _read(version: int, lineage: int, folder: Path) -> Arrived:
    try:
        found = weight_folder.open_version(folder)
        if found.lineage == lineage:
            return Arrived(found.version, found.tensors())
    except CheckpointError:
        if folder.is_dir():
            raise
    # Whoever asks late finds its version replaced, and a newer one will do.
    newer = weight_folder.newest(folder.parent)
    if newer is None or newer.lineage != lineage or newer.version < version:
        raise CheckpointError(
            f"version {version} of the weights is not there any more, and no newer one of its lineage is",
            given=str(folder),
            mend="raise publish.keep; two runs must not share publish.folder",
        )
    return Arrived(newer.version, newer.tensors())


def check_run_folder(learners: Any, folder: Path, seconds: float = _LATE) -> None:
    """Check that the controller sees what rank 0 writes into the run's folder, before anything is trained.

    Args:
        learners: the `LearnerGroup`.
        folder: of the run.
        seconds: that a network file system may take to show it.

    Raises:
        ClusterError: it does not; the rank's node is named.
        CheckpointError: rank 0 cannot write there.
    """
    token, writer = learners.write_probe(str(folder.absolute()))
    deadline = time.monotonic() + seconds
    while not sees(str(folder), token)[0]:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"what the learner writes on {writer} is not seen on {socket.gethostname()}: no checkpoint "
                "could be completed",
                given=f"run.dir = {folder.parent}",
                mend="set run.dir to storage that all nodes mount at the same path",
            )
        time.sleep(0.1)
    (folder / _PROBE).unlink(missing_ok=True)


def check_shared(learners: Any, receivers: Sequence[Any], root: str, seconds: float) -> None:
    """Check that every receiver sees what rank 0 writes, before anything is trained.

    Args:
        learners: the `LearnerGroup`.
        receivers: actors that will fetch weights.
        root: see `root_of`.
        seconds: to wait for their answers.

    Raises:
        ClusterError: one does not; its node is named.
        CheckpointError: rank 0 cannot write there.
    """
    token, writer = learners.write_probe(root)
    answers = get(
        [actor.sees.remote(root, token) for actor in receivers], timeout=seconds,
        waiting_for="the engines to look into publish.folder",
    )  # fmt: skip
    blind = sorted({node for there, node in answers if not there})
    if blind:
        raise ClusterError(
            f"what the learner writes on {writer} is not seen on {', '.join(blind)}",
            given=f"publish.folder = {root}",
            mend="name a folder on storage that all these nodes mount at the same path, or set "
            "publish.transport = 'object_store'",
        )


def write_probe(root: str) -> tuple[str, str]:
    """Leave a file in a folder; (what is written there, this node's name).

    Raises:
        CheckpointError: it cannot be written.
    """
    token = os.urandom(16).hex()
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / _PROBE).write_text(token, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the learner cannot write into this folder: {error.strerror}",
            given=root,
            mend="name a folder that rank 0 may write to (run.dir, publish.folder)",
        ) from error
    return token, socket.gethostname()


def sees(root: str, token: str) -> tuple[bool, str]:
    """Whether the file of `write_probe` is seen from here; this node's name."""
    found = ""
    with suppress(OSError, UnicodeDecodeError):
        found = (Path(root) / _PROBE).read_text(encoding="utf-8")
    return found == token, socket.gethostname()
