"""Models: where they come from, whether they fit, how ragged attention computes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stateset_ray.config import ModelConfig, load_config
from stateset_ray.errors import ConfigError, ModelError
from stateset_ray.models import (
    TreeRows,
    check_fits,
    check_reference,
    choose_hardware,
    count_parameters,
    load_model,
    load_tokenizer,
    local_folder,
    parameter_shapes,
    state_tensors,
)


def test_rows_never_see_each_other(tiny):
    ids = torch.randint(3, 250, (1, 30))
    positions = torch.cat([torch.arange(18), torch.arange(12)])[None]
    with torch.no_grad():
        rows = TreeRows([(18, -1), (12, -1)])
        both = tiny(input_ids=ids, position_ids=positions, rows=rows, use_cache=False).logits
        second = tiny(
            input_ids=ids[:, 18:], position_ids=positions[:, 18:], rows=TreeRows([(12, -1)]), use_cache=False
        ).logits
    assert torch.allclose(both[:, 18:], second, atol=1e-5)


def test_ragged_attention_is_the_models_own(hardware):
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 250, (1, 25))
    plain = AutoModelForCausalLM.from_pretrained(local_folder("tiny"), attn_implementation="eager")
    ours = load_model("tiny", hardware)
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits
        got = ours(
            input_ids=ids, position_ids=torch.arange(25)[None], rows=TreeRows([(25, -1)]), use_cache=False
        ).logits
    assert torch.allclose(expected, got, atol=1e-5)


def test_tied_weights_travel_once(tiny):
    names = state_tensors(tiny)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert sum(t.numel() for t in names.values()) == count_parameters("tiny")


def test_hardware_is_decided_in_one_place():
    assert choose_hardware(ModelConfig(), gpus=0).dtype is torch.float32
    assert choose_hardware(ModelConfig(threads=3), gpus=0).threads == 3
    assert choose_hardware(ModelConfig(dtype="bfloat16"), gpus=0).dtype is torch.bfloat16
    assert choose_hardware(ModelConfig(), gpus=0, peers=10_000).threads == 1
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="asks for a GPU"):
            choose_hardware(ModelConfig(device="cuda"), gpus=1)


def test_a_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        check_fits(load_config(None, [f"model.name={tmp_path}/nothing"]))
    with pytest.raises(ModelError, match="Hugging Face layout"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="cannot be found"):
        check_fits(load_config(None, ["model.name=nobody/no-such-model-here"]))


def test_lengths_beyond_the_model_are_refused():
    settings = ["model.name=tiny", "rollout.max_context=4096", "learner.micro_batch_tokens=4096"]
    with pytest.raises(ConfigError, match="exceeds the model's 2048 positions"):
        check_fits(load_config(None, settings))


def test_sliding_windows_are_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(local_folder("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="full attention"):
        check_fits(load_config(None, [f"model.name={folder}"]))


def test_two_processes_may_build_a_model_at_once(tmp_path):
    code = "from stateset_ray.models import local_folder; print(local_folder('tiny'))"
    env = {"STATESET_RAY_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=100)[0].strip().splitlines()[-1] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(said) == 1
    assert sorted(p.name for p in (tmp_path / "models").iterdir() if p.is_dir()) == [Path(said.pop()).name]


@pytest.mark.parametrize("more", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}])
def test_attention_that_is_not_plain_is_refused(more):
    """Dropped without a word, it would make another policy of the model, in sampler and learner alike."""
    from stateset_ray.models import _ragged_attention

    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ModelError, match="caps its logits or has sinks"):
        _ragged_attention(torch.nn.Linear(1, 1), q, q, q, None, rows=TreeRows([(3, -1)]), **more)


def test_a_reference_of_another_vocabulary_is_refused_before_anything_loads(tmp_path):
    """Its log-probabilities would be those of other tokens under the same ids."""
    settings = load_config(None, ["model.name=tiny", "grpo.kl_coef=0.1"])
    check_reference(settings)  # the model itself
    other = tmp_path / "other"
    shutil.copytree(local_folder("tiny"), other)
    named = settings.with_overrides([f'grpo.reference="{other}"'])
    check_reference(named)  # another model of the same vocabulary
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**shape, "vocab_size": shape["vocab_size"] + 1}))
    with pytest.raises(ModelError, match="another vocabulary") as caught:
        check_reference(named)
    assert "grpo.reference" in caught.value.mend


def test_the_shapes_of_a_model_are_known_without_its_weights(tiny):
    expected = {name: tensor.shape for name, tensor in state_tensors(tiny).items()}
    assert parameter_shapes("tiny") == expected
