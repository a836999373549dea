"""Without vLLM, its engine says what to install. What it does with vLLM is tested in tests/vllm."""

import importlib.util

import pytest

from stateset_ray.errors import ModelError
from stateset_ray.policies.vllm_engine import VllmEngine


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize(("serving", "key"), [(False, "rollout.engine_kind"), (True, "policy.engine")])
def test_the_error_names_the_extra_and_the_way_out(hardware, serving, key):
    with pytest.raises(ModelError, match=f"{key} = 'vllm' needs vLLM, which is not installed") as caught:
        VllmEngine("tiny", {2}, slots=2, max_context=64, hardware=hardware, serving=serving)
    assert "stateset-ray[vllm]" in caught.value.mend
    assert f"{key} = 'transformers'" in caught.value.mend
