"""One kernel for all stretches: the same numbers and gradients as a kernel for each.

The fused kernel runs on GPUs only. Its mathematics, the block mask above all, is what is tested here: without
compilation, on the CPU, where FlexAttention computes a gradient if one does not let it refuse.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from stateset_ray.config import load_config
from stateset_ray.errors import ConfigError
from stateset_ray.learner.flex_rows import FlexRows
from stateset_ray.models import TreeRows


@st.composite
def trees(draw):
    """Groups of a prefix and its children, and conversations without one."""
    segments = []
    for _ in range(draw(st.integers(1, 4))):
        parent = len(segments)
        segments.append((draw(st.integers(1, 40)), -1))
        segments += [(draw(st.integers(1, 30)), parent) for _ in range(draw(st.integers(0, 3)))]
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


@pytest.mark.parametrize("settings", [[], ["model.device=cpu", "cluster.learner_gpus=1"]])
def test_it_is_refused_where_it_has_no_backward_pass(settings):
    with pytest.raises(ConfigError, match="no backward pass on a CPU"):
        load_config(None, ["learner.attention=flex", *settings])
