"""Weights on their way from learner to engines: torch tensors <-> numpy arrays, without loss.

Numpy has no bfloat16: its bits travel as uint16, which no model uses for anything else, so that the
dtype of the array is the marker and the arrays need no envelope.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["decode", "encode"]


def encode(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A copy of the tensor, in main memory, as an array of the same shape.

    Raises:
        TypeError: a uint16 tensor, which would come back as bfloat16.

    Example:
        >>> encode(torch.ones(2, dtype=torch.bfloat16)).dtype
        dtype('uint16')
    """
    if tensor.dtype == torch.uint16:
        raise TypeError("uint16 stands for bfloat16 here and cannot be sent itself")
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    copy.copy_(tensor.detach())
    if copy.dtype == torch.bfloat16:
        bits: npt.NDArray[np.uint16] = copy.view(torch.uint16).numpy()
        return bits
    array: npt.NDArray[Any] = copy.numpy()
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
