"""A process group of one sender and its receivers, apart from the learner's own, and what is broadcast in it.

Its members meet at a store that the sender holds. A member that dies or falls silent breaks the group: every
wait in it ends with an error within the time limit, and the members that are left meet anew.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch

from stateset_ray.policies.flat_weights import FlatWeights

__all__ = ["Backend", "BroadcastGroup", "distributed"]

distributed: Any = torch.distributed  # its stores and groups are half typed
Backend = Literal["gloo", "nccl"]

_WINDOW = {"gloo": 4, "nccl": 2}  # pieces that are under way at once
_SENDER = 0
_NEVER = timedelta(days=1)
_MEETING = timedelta(seconds=15)  # at most: every member has just asked for its seat, and waits to take it


class BroadcastGroup:
    """One member's end of the group; the sender is rank 0. Making it waits for all members.

    Args:
        store: where the members meet.
        epoch: of this group: no two groups of one store have the same.
        rank: of this member among `size`.
        backend: nccl between GPUs that are apart; gloo through main memory.
        address: of this node, by which the other members reach it.
        timeout: seconds of silence that break the group.

    Raises:
        RuntimeError: the members did not meet in time.
    """

    def __init__(
        self, store: Any, epoch: int, rank: int, size: int, backend: Backend, address: str, timeout: float
    ) -> None:
        self.epoch = epoch
        self._sends = rank == _SENDER
        self._backend = backend
        self._timeout = timedelta(seconds=timeout)
        meeting = distributed.PrefixStore(f"group/{epoch}", store)
        self._group = _make(backend, meeting, rank, size, address, min(_MEETING, self._timeout))
        self._buffers: list[torch.Tensor] = []
        # Apart from the stream that the process computes on: neither waits for the other.
        self._stream = torch.cuda.Stream() if backend == "nccl" else None

    def broadcast(self, weights: FlatWeights, piece_bytes: int) -> None:
        """Send or receive all of it, in pieces.

        Raises:
            RuntimeError: a member died or was silent too long; the group must be closed.
        """
        with torch.cuda.stream(self._stream):  # nothing where there is none
            self._broadcast(weights, piece_bytes)
        if self._stream is not None:
            self._stream.synchronize()

    def _broadcast(self, weights: FlatWeights, piece_bytes: int) -> None:
        window, under_way = _WINDOW[self._backend], deque[tuple[Any, torch.Tensor, torch.Tensor]]()

        def finish() -> None:
            work, piece, here = under_way.popleft()
            work.wait(self._timeout)
            if here is not piece and not self._sends:
                piece.copy_(here, non_blocking=True)

        for number, piece in enumerate(weights.pieces(piece_bytes)):
            if len(under_way) == window:
                finish()
            here = piece
            if self._backend == "nccl":
                here = self._buffer(number % window, piece_bytes)[: len(piece)]
                if self._sends:
                    here.copy_(piece, non_blocking=True)
            under_way.append((self._group.broadcast(here, _SENDER, self._timeout), piece, here))
        while under_way:
            finish()

    def _buffer(self, index: int, size: int) -> torch.Tensor:
        while len(self._buffers) <= index:
            self._buffers.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        return self._buffers[index]

    def close(self) -> None:
        """Give the group up, whatever is under way in it."""
        with suppress(RuntimeError):  # what is broken already cannot be broken further
            self._group.abort()


def _make(
    backend: Backend, store: Any, rank: int, size: int, address: str, timeout: timedelta
) -> Any:  # fmt: skip
    """A group that is not known to `torch.distributed`, where only one can be the default."""
    if backend == "nccl":
        nccl = distributed.ProcessGroupNCCL.Options()
        # Ours are the limits, and they only break the group; NCCL's own would end the process.
        nccl._timeout = _NEVER
        return distributed.ProcessGroupNCCL(store, rank, size, nccl)
    gloo = distributed.ProcessGroupGloo._Options()
    gloo._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]
    gloo._timeout = timeout
    return distributed.ProcessGroupGloo(store, rank, size, gloo)
