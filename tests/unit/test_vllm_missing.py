"""Without vLLM, its engine says what to install. What it does with vLLM is tested in tests/vllm."""

import importlib.util

import pytest

from stateset_ray.errors import ModelError
from stateset_ray.policies.vllm_engine import VllmEngine


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_error_names_the_extra_and_the_way_out(hardware):
    with pytest.raises(ModelError, match="not installed where the engine runs") as caught:
        VllmEngine("tiny", {2}, slots=2, max_context=64, hardware=hardware)
    assert "stateset-ray[vllm]" in caught.value.mend
    assert "engine_kind = 'transformers'" in caught.value.mend
