"""All weights in one stretch of bytes: nothing is lost, and the pieces have one size."""

import json
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.policies.flat_weights import FlatWeights, places

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=8
)


def filled(kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    """Tensors of these dtypes and shapes, each of values of its own."""
    made = {}
    for seed, (name, (dtype, shape)) in enumerate(kinds.items()):
        noise = 100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        made[name] = noise > 0 if dtype == torch.bool else noise.abs().to(dtype)
    return made


@settings(deadline=None, max_examples=60)
@given(TENSORS, st.integers(1, 300))
def test_what_is_received_piece_by_piece_is_what_was_sent(kinds, size) -> None:
    tensors = filled(kinds)
    sent = FlatWeights(places(tensors))
    sent.fill(tensors)
    received = FlatWeights.from_description(json.loads(json.dumps(sent.described())))
    pieces = list(sent.pieces(size))
    for target, piece in zip(received.pieces(size), pieces, strict=True):
        target.copy_(piece)
    assert all(len(piece) == size for piece in pieces[:-1])
    assert received.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = received.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back, tensor)


def test_the_number_of_pieces_does_not_grow_with_the_number_of_tensors() -> None:
    few, many = ({f"w{i}": torch.zeros(6400 // count) for i in range(count)} for count in (1, 100))
    assert [len(list(FlatWeights(places(t)).pieces(6400))) for t in (few, many)] == [4, 4]


def test_no_tensor_shares_bytes_with_another_and_each_may_be_viewed() -> None:
    laid = places(filled({"a": (torch.bool, (3,)), "b": (torch.float64, (2, 2)), "c": (torch.bfloat16, ())}))
    for before, after in pairwise(laid):
        assert before.end <= after.start
        assert after.start % 64 == 0


def test_a_version_is_written_over_the_one_before_in_the_same_memory() -> None:
    flat = FlatWeights(places({"a": torch.zeros(3)}))
    view, where = flat.tensors["a"], flat.bytes.data_ptr()
    flat.fill({"a": torch.ones(3)})
    assert view.tolist() == [1, 1, 1]
    assert flat.bytes.data_ptr() == where
