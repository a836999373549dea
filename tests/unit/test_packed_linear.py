"""Packed linear layers: equal to plain ones, alike in every batch, and true to new weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.models import ATTENTION, Hardware, TreeRows, state_tensors
from stateset_ray.policies import inference_weights
from stateset_ray.policies.fused_layer import FusedLayer, fusible
from stateset_ray.policies.inference_weights import InferenceWeights
from stateset_ray.policies.packed_linear import PackedLinear, usable

needs_operators = pytest.mark.skipif(not usable(), reason="this build of PyTorch cannot pack weights")


def test_the_private_operators_that_it_leans_on_are_there():
    # Pinned versions have them; a new PyTorch without them is slower here, and this says why.
    assert usable()
    assert hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    assert hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert "binary" in torch.ops.mkldnn._linear_pointwise.overloads()


@needs_operators
@settings(deadline=None)
@given(
    st.integers(1, 70), st.sampled_from([(1536, 576), (576, 1536), (300, 64), (7, 5)]), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_it_multiplies_as_a_plain_layer_does_and_a_row_alike_in_every_batch(rows, shape, biased, seed):
    torch.manual_seed(seed)
    linear = torch.nn.Linear(shape[1], shape[0], bias=biased)
    packed = PackedLinear([linear])
    given_rows = torch.randn(rows, shape[1])
    plus = torch.randn(rows, shape[0])
    with torch.inference_mode():
        for added in (None, plus):
            whole = packed(given_rows[None], added)
            wanted = linear(given_rows[None]) + (0 if added is None else added)
            torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=1e-5)
            one = slice(seed % rows, seed % rows + 1)
            alone = packed(given_rows[one], None if added is None else added[one])
            assert torch.equal(alone[0], whole[0, seed % rows])


def _logits(model, ids):
    with torch.inference_mode():
        return model(
            input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None],
            rows=TreeRows([(len(ids), -1)]), use_cache=False,
        ).logits  # fmt: skip


_KINDS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("LlamaConfig", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 24}),
}  # fmt: skip


def _model_of(kind, seed):
    """A small one of random weights; `tiny` must have been loaded, which registers the attention."""
    import transformers

    name, options = _KINDS[kind]
    config = getattr(transformers, name)(
        vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=False, attn_implementation=ATTENTION, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms of ones and biases of zeros would hide a mistake
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@needs_operators
@pytest.mark.parametrize("kind", _KINDS)
def test_fused_layers_compute_what_the_models_own_do_and_take_new_weights(kind, tiny, hardware):
    model, other = _model_of(kind, 1), _model_of(kind, 2)
    wanted, shapes = _logits(model, [5, 6, 7, 8, 9]), {n: t.shape for n, t in state_tensors(model).items()}
    weights = InferenceWeights(model, hardware)
    assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)
    assert weights.shapes == shapes
    torch.testing.assert_close(_logits(model, [5, 6, 7, 8, 9]), wanted, rtol=1e-4, atol=1e-4)
    weights.drop()
    weights.load(state_tensors(other))
    torch.testing.assert_close(
        _logits(model, [5, 6, 7, 8, 9]), _logits(other, [5, 6, 7, 8, 9]), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(wanted, _logits(other, [5, 6, 7, 8, 9]), atol=1e-2)


@needs_operators
@pytest.mark.parametrize("why", ["gelu", "some biases", "a subclass of a linear layer", "another decoder"])
def test_layers_that_compute_something_else_keep_their_own_code(why, tiny, hardware):
    model = _model_of("llama", 1)
    layer = model.model.layers[0]
    if why == "gelu":
        layer.mlp.act_fn = torch.nn.GELU()
    elif why == "some biases":
        layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(64))
    elif why == "another decoder":
        layer.__class__ = type("GraniteDecoderLayer", (type(layer),), {})
    else:
        layer.self_attn.q_proj.__class__ = type("Adapted", (torch.nn.Linear,), {})
    assert not fusible(layer)
    wanted = _logits(model, [5, 6, 7])
    InferenceWeights(model, hardware)
    assert isinstance(model.model.layers[1], FusedLayer) and model.model.layers[0] is layer
    torch.testing.assert_close(_logits(model, [5, 6, 7]), wanted, rtol=1e-4, atol=1e-4)


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
        monkeypatch.setattr(inference_weights, "usable", lambda: False)
    else:
        model, hardware = model.bfloat16(), Hardware("cpu", torch.bfloat16, 1)
    weights = InferenceWeights(model, hardware)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    weights.load({name: tensor + 1 for name, tensor in state_tensors(tiny).items()})
    name = next(iter(weights.shapes))
    torch.testing.assert_close(
        state_tensors(model)[name].float(), state_tensors(tiny)[name] + 1, rtol=1e-2, atol=1e-2
    )
