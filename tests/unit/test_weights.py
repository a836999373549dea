"""Weights travel as numpy arrays without loss."""

import numpy as np
import pytest
import torch

from stateset_ray.policies.weights import PARTS, decode, encode, split


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (4, 5)])
def test_round_trip_is_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (100 * torch.randn(shape)).to(dtype)
    back = decode(encode(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_what_is_sent_does_not_change_with_the_model() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    array = encode(tensor)
    with torch.no_grad():
        tensor += 1
    assert not array.any()


def test_without_a_copy_it_is_the_memory_that_is_there_where_it_can_be() -> None:
    tensor = torch.zeros(2, 3)
    shared, turned = encode(tensor, copy=False), encode(tensor.T, copy=False)
    tensor += 1
    assert shared.all()
    assert not turned.any()


def test_a_transposed_tensor_keeps_its_values() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(decode(encode(tensor)), tensor)


@pytest.mark.filterwarnings("error")
def test_read_only_arrays_are_decoded_without_a_warning() -> None:
    array = encode(torch.ones(3, dtype=torch.bfloat16))
    array.flags.writeable = False
    assert torch.equal(decode(array), torch.ones(3, dtype=torch.bfloat16))


def test_uint16_is_refused() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        encode(torch.from_numpy(np.zeros(2, dtype=np.uint16)))


@pytest.mark.parametrize("parameters", [1, 3, 3000])
def test_bug_38_a_version_travels_in_as_many_parts_however_many_parameters(parameters: int) -> None:
    """So that the remote calls of a publication do not grow with the model."""
    arrays = {f"layer.{i}": np.zeros(1 + i % 7, np.float32) for i in range(parameters)}
    parts = split(arrays)
    assert len(parts) == PARTS
    assert {name: array.nbytes for part in parts for name, array in part.items()} == {
        name: array.nbytes for name, array in arrays.items()
    }
    sizes = [sum(array.nbytes for array in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= 28  # the largest array
