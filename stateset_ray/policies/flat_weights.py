"""All weights of a model in one stretch of bytes, to be sent in pieces of one size.

However many parameters a model has, and however small most of them are, what travels is the same number of
large messages; the names, shapes and dtypes go ahead of them once, as plain data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

__all__ = ["FlatWeights", "Place", "places"]

_ALIGNMENT = 64  # bytes: a view of any dtype may begin there, and no two tensors share a cache line


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies.

    Attributes:
        name: of the tensor.
        dtype: as torch calls it, without `torch.`.
        shape: of the tensor.
        start: in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """The byte after its last."""
        size: int = getattr(torch, self.dtype).itemsize
        for length in self.shape:
            size *= length
        return self.start + size


def places(tensors: Mapping[str, torch.Tensor]) -> tuple[Place, ...]:
    """Lay tensors end to end, in their order.

    Example:
        >>> [place.start for place in places({"a": torch.zeros(3), "b": torch.zeros(2)})]
        [0, 64]
    """
    laid: list[Place] = []
    start = 0
    for name, tensor in tensors.items():
        laid.append(Place(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start))
        start = -(-laid[-1].end // _ALIGNMENT) * _ALIGNMENT
    return tuple(laid)


class FlatWeights:
    """A stretch of main memory that tensors lie in; its pages are used again for every version.

    Args:
        laid: where each tensor lies, in order.
        pinned: so that a GPU copies from and to it at full speed.
    """

    def __init__(self, laid: tuple[Place, ...], *, pinned: bool = False) -> None:
        self.places = laid
        self.bytes = torch.empty(laid[-1].end if laid else 0, dtype=torch.uint8, pin_memory=pinned)
        self.tensors = {place.name: self._view(place) for place in laid}
        """Views of the bytes, by name."""

    def _view(self, place: Place) -> torch.Tensor:
        return self.bytes[place.start : place.end].view(getattr(torch, place.dtype)).view(place.shape)

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors, of the names, dtypes and shapes that this was made for, into their places."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    def pieces(self, size: int) -> Iterator[torch.Tensor]:
        """Views of the bytes, each of `size` bytes but the last."""
        yield from self.bytes.split(size) if len(self.bytes) else ()

    def described(self) -> list[list[Any]]:
        """The places as JSON can hold them; `from_description` makes an empty stretch like this one."""
        return [[p.name, p.dtype, list(p.shape), p.start] for p in self.places]

    @classmethod
    def from_description(cls, described: list[list[Any]], *, pinned: bool = False) -> Self:
        """Room for what `described` tells of."""
        return cls(
            tuple(Place(name, dtype, tuple(shape), start) for name, dtype, shape, start in described),
            pinned=pinned,
        )
