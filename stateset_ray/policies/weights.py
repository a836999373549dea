"""Weights on their way from learner to engines: torch tensors <-> numpy arrays, without loss.

Numpy has no bfloat16: its bits travel as uint16, which no model uses for anything else, so that the
dtype of the array is the marker and the arrays need no envelope.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["PARTS", "decode", "encode", "split"]

PARTS = 8
"""One object as large as the model finds no hole to reuse in an object store, which would then hold three
versions where one and a half are enough; and one file is written, hashed and read by one core."""

_Array = TypeVar("_Array", bound=Any)


def encode(tensor: torch.Tensor, *, copy: bool = True) -> npt.NDArray[Any]:
    """The tensor as an array of the same shape in main memory.

    Args:
        copy: False lets the array share the memory of a tensor that is there already.

    Raises:
        TypeError: a uint16 tensor, which would come back as bfloat16.

    Example:
        >>> encode(torch.ones(2, dtype=torch.bfloat16)).dtype
        dtype('uint16')
    """
    if tensor.dtype == torch.uint16:
        raise TypeError("uint16 stands for bfloat16 here and cannot be sent itself")
    here = tensor.detach()
    if copy or here.device.type != "cpu" or not here.is_contiguous():
        here = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(here)
    if here.dtype == torch.bfloat16:
        bits: npt.NDArray[np.uint16] = here.view(torch.uint16).numpy()
        return bits
    array: npt.NDArray[Any] = here.numpy()
    return array


def decode(array: npt.NDArray[Any]) -> torch.Tensor:
    """The tensor that `encode` was given, sharing the array's memory: read it, do not write it.

    Example:
        >>> decode(encode(torch.ones(2, dtype=torch.bfloat16)))
        tensor([1., 1.], dtype=torch.bfloat16)
    """
    with warnings.catch_warnings():
        # Arrays from an object store are read-only; torch cannot express that and warns.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def split(arrays: Mapping[str, _Array], parts: int = PARTS) -> list[dict[str, _Array]]:
    """Divide arrays or tensors into dictionaries of about equal bytes, the largest first.

    Args:
        arrays: by name.
        parts: how many dictionaries; some may stay empty.

    Example:
        >>> [sorted(part) for part in split({"a": np.zeros(9), "b": np.zeros(2)})][:3]
        [['a'], ['b'], []]
    """
    divided: list[dict[str, _Array]] = [{} for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(arrays, key=lambda n: (-arrays[n].nbytes, n)):
        lightest = loads.index(min(loads))
        divided[lightest][name] = arrays[name]
        loads[lightest] += arrays[name].nbytes
    return divided
