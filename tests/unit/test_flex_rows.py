"""One kernel for all stretches: the same numbers and gradients as a kernel for each.

The fused kernel runs on GPUs only. Its mathematics, the block mask above all, is what is tested here: without
compilation, on the CPU, where FlexAttention computes a gradient if one does not let it refuse.
"""

import tracemalloc

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stateset_ray.config import load_config
from stateset_ray.errors import ConfigError
from stateset_ray.learner.flex_rows import FlexRows
from stateset_ray.models import TreeRows


@st.composite
def trees(draw, longest=40):
    """Groups of a prefix and its children, and conversations without one."""
    segments = []
    for _ in range(draw(st.integers(1, 4))):
        parent = len(segments)
        segments.append((draw(st.integers(1, longest)), -1))
        segments += [(draw(st.integers(1, longest)), parent) for _ in range(draw(st.integers(0, 3)))]
    return segments


@pytest.mark.filterwarnings("ignore")
@hypothesis_settings(deadline=None, max_examples=15)
@given(trees(), st.sampled_from([(4, 4), (6, 2)]), st.integers(0, 999))
def test_output_and_gradients_are_those_of_separate_stretches(segments, heads, seed):
    torch.manual_seed(seed)
    total = sum(length for length, _ in segments)
    inputs = [torch.randn(1, n, total, 16, requires_grad=True) for n in (heads[0], heads[1], heads[1])]
    weight = torch.randn(1, total, heads[0], 16)
    outputs, gradients = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_validate_device", lambda *_: None)
        for rows in (TreeRows(segments), FlexRows(segments, "cpu", compiled=False)):
            outputs.append(rows.attend(0, *inputs, 0.25))
            gradients.append(torch.autograd.grad((outputs[-1] * weight).sum(), inputs))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def dense(segments):
    """May the query (row) look at the key (column)? Written down pair by pair."""
    own = [s for s, (length, _) in enumerate(segments) for _ in range(length)]
    return torch.tensor(
        [[(a == b and i >= j) or segments[a][1] == b for j, b in enumerate(own)] for i, a in enumerate(own)]
    )


@hypothesis_settings(deadline=None, max_examples=15)
@given(trees(longest=90))
@example([(256, -1), (130, 0), (128, 0), (5, -1)])  # full blocks within a parent, and of one
def test_the_blocks_are_those_of_the_whole_mask(segments):
    whole = dense(segments)

    def looked_up(_b, _h, query, key):
        return whole[query, key]

    rows = FlexRows(segments, "cpu", compiled=False)
    total = len(whole)
    expected = flex.create_block_mask(looked_up, None, None, total, total, device="cpu")
    ours = rows._mask
    assert ours.shape == expected.shape
    for kind in ("kv", "q", "full_kv", "full_q"):
        for part in (f"{kind}_num_blocks", f"{kind}_indices"):
            assert torch.equal(getattr(ours, part), getattr(expected, part)), part
    assert torch.equal(flex.create_mask(ours.mask_mod, 1, 1, total, total, device="cpu")[0, 0], whole)


def test_no_pair_of_tokens_is_ever_held():
    total = 32 * 1024
    segments = [(total // 4, -1), *[(total // 8, 0)] * 6]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    tracemalloc.start()
    try:
        with Watch():
            FlexRows(segments, "cpu", compiled=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest <= (total // 128 + 1) ** 2
    assert peak < total**2 / 64  # bytes of numpy's arrays


@pytest.mark.parametrize("settings", [[], ["model.device=cpu", "cluster.learner_gpus=1"]])
def test_it_is_refused_where_it_has_no_backward_pass(settings):
    with pytest.raises(ConfigError, match="no backward pass on a CPU"):
        load_config(None, ["learner.attention=flex", *settings])
