"""Packed linear layers: equal to plain ones, alike in every batch, and true to new weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.models import Hardware, TreeRows, state_tensors
from stateset_ray.policies import packed_linear
from stateset_ray.policies.packed_linear import InferenceWeights, PackedLinear, usable

needs_operators = pytest.mark.skipif(not usable(), reason="this build of PyTorch cannot pack weights")


def test_the_private_operators_that_it_leans_on_are_there():
    # Pinned versions have them; a new PyTorch without them is slower here, and this says why.
    assert usable()
    assert hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    assert hasattr(torch.ops.mkldnn, "_linear_pointwise")


@needs_operators
@settings(deadline=None)
@given(
    st.integers(1, 70), st.sampled_from([(1536, 576), (576, 1536), (300, 64), (7, 5)]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_it_multiplies_as_a_plain_layer_does_and_a_row_alike_in_every_batch(rows, shape, biased, seed):
    torch.manual_seed(seed)
    linear = torch.nn.Linear(shape[1], shape[0], bias=biased)
    packed = PackedLinear(linear)
    given_rows = torch.randn(rows, shape[1])
    with torch.inference_mode():
        whole = packed(given_rows[None])
        torch.testing.assert_close(whole, linear(given_rows[None]), rtol=1e-5, atol=1e-5)
        index = seed % rows
        assert torch.equal(packed(given_rows[index : index + 1])[0], whole[0, index])


def _logits(model, ids):
    with torch.inference_mode():
        return model(
            input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None],
            rows=TreeRows([(len(ids), -1)]), use_cache=False,
        ).logits  # fmt: skip


@needs_operators
def test_a_tied_output_layer_follows_the_embedding(tiny, hardware):
    model = copy.deepcopy(tiny)
    weights = InferenceWeights(model, hardware)
    assert weights.shapes == {name: tensor.shape for name, tensor in state_tensors(tiny).items()}
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    new = state_tensors(other)
    assert weights.mismatch(new) == []
    weights.load(new)
    torch.testing.assert_close(_logits(model, [5, 6, 7]), _logits(other, [5, 6, 7]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(_logits(tiny, [5, 6, 7]), _logits(other, [5, 6, 7]), atol=1e-2)


@needs_operators
def test_a_packed_model_can_be_copied_and_each_copy_has_weights_of_its_own(tiny, hardware):
    model = copy.deepcopy(tiny)
    InferenceWeights(model, hardware)
    twin = copy.deepcopy(model)
    new = {name: tensor * 1.5 for name, tensor in state_tensors(tiny).items()}
    InferenceWeights(twin, hardware).load(new)
    other = copy.deepcopy(tiny)
    other.load_state_dict(new, strict=False)
    torch.testing.assert_close(_logits(model, [5, 6, 7]), _logits(tiny, [5, 6, 7]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_logits(twin, [5, 6, 7]), _logits(other, [5, 6, 7]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(_logits(model, [5, 6, 7]), _logits(twin, [5, 6, 7]), atol=1e-2)


@needs_operators
def test_a_model_that_was_packed_before_takes_the_same_weights(tiny, hardware):
    model = copy.deepcopy(tiny)
    first, second = InferenceWeights(model, hardware), InferenceWeights(model, hardware)
    assert second.shapes == first.shapes
    assert second.mismatch(state_tensors(tiny)) == []


def test_what_does_not_belong_is_named(tiny, hardware):
    weights = InferenceWeights(copy.deepcopy(tiny), hardware)
    tensors = dict(state_tensors(tiny))
    norm = next(name for name in tensors if "norm" in name)
    tensors[norm] = torch.zeros(3)
    tensors["stranger"] = torch.zeros(1)
    lost = next(name for name in tensors if "q_proj" in name)
    del tensors[lost]
    assert weights.mismatch(tensors) == sorted([norm, "stranger", lost])


@pytest.mark.parametrize("reason", ["dtype", "build"])
def test_elsewhere_the_model_stays_as_it_is(tiny, hardware, monkeypatch, reason):
    model = copy.deepcopy(tiny)
    if reason == "build":
        monkeypatch.setattr(packed_linear, "usable", lambda: False)
    else:
        model, hardware = model.bfloat16(), Hardware("cpu", torch.bfloat16, 1)
    weights = InferenceWeights(model, hardware)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    weights.load({name: tensor + 1 for name, tensor in state_tensors(tiny).items()})
    name = next(iter(weights.shapes))
    torch.testing.assert_close(
        state_tensors(model)[name].float(), state_tensors(tiny)[name] + 1, rtol=1e-2, atol=1e-2
    )
