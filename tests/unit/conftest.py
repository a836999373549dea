"""The tiny model, loaded once; and no test of this folder connects to Ray."""

import sys

import pytest


def _joined() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.fixture(autouse=True)
def no_ray():
    """A test that joined Ray unawares would die with that cluster, in the middle of another test."""
    before = _joined()
    yield
    assert _joined() == before, "this test has connected to Ray"


@pytest.fixture(scope="session")
def hardware():
    from stateset_ray.config import ModelConfig
    from stateset_ray.models import choose_hardware

    chosen = choose_hardware(ModelConfig(name="tiny", threads=1, device="cpu"), gpus=0)
    chosen.apply()
    return chosen


@pytest.fixture(scope="session")
def tiny(hardware):
    from stateset_ray.models import load_model

    return load_model("tiny", hardware)


@pytest.fixture(scope="session")
def renderer():
    from stateset_ray.models import load_tokenizer
    from stateset_ray.policies.renderer import Renderer

    return Renderer(load_tokenizer("tiny"))
