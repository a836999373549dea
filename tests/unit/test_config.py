"""The configuration: read from TOML, overridden, checked across fields, written back."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.config import Config, load_config
from stateset_ray.errors import ConfigError


def test_a_config_survives_its_own_toml(tmp_path):
    config = load_config(None, ["run.name=x", "environment.options.length=2", "train.warm_start.steps=3"])
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == config
    assert config.environment.options == {"length": 2}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        ("grpo.groupsize=4", "did you mean 'grpo.group_size'?"),
        ("training.steps=4", "unknown key 'training'; did you mean 'train'?"),
        ("rollout.group_size=4", "did you mean 'grpo.group_size'?"),
        ("grpo.group_size=1", "grpo.group_size: Input should be greater than or equal to 2 (given: 1)"),
        ("learner.zero_stage=4", "learner.zero_stage"),
        ("learner.learning_rate=nan", "learner.learning_rate must be a finite number"),
        ("learner.ranks=3", "cannot be divided among learner.ranks = 3"),
        ("rollout.max_turn_tokens=600", "leaves no room for a prompt"),
        ("learner.micro_batch_tokens=100", "cannot hold one conversation"),
        ("rollout.turn_timeout=1000", "is longer than"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("rollout.engine_kind=vlm", "rollout.engine_kind"),
        ("run.name=a/b", "run.name"),
        ("environment.path=nocolon", "environment.path"),
        ("steps=3", "section.key=value"),
        ("train.steps", "section.key=value"),
        ("train.steps.more=3", "train.steps"),
        ("cluster.engine_gpus=1", "is for no one"),
        ("publish.transport=collective", "set rollout.engines"),
        ("publish.transport=carrier_pigeon", "publish.transport"),
        ("publish.folder=weights", "publish.transport is 'object_store', not 'folder'"),
        ("train.max_staleness=-1", "train.max_staleness"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(override, says):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert says in str(error.value)


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(None, ["train.steps=0", "grpo.group_size=1", "model.nam=x"])
    assert str(error.value).count("  - ") == 3


def test_a_missing_or_broken_file_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nsteps = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(broken)


def test_overrides_win_over_the_file_and_words_are_strings(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[train]\nsteps = 5\n[model]\nname = 'smollm2'\n")
    config = load_config(path, ["train.steps=7", "model.name=tiny", "learner.betas=[0.8, 0.9]"])
    assert (config.train.steps, config.model.name, config.learner.betas) == (7, "tiny", (0.8, 0.9))


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3


@given(st.text(max_size=40))
def test_no_override_raises_anything_but_a_config_error(text):
    with contextlib.suppress(ConfigError):
        load_config(None, [text])


@pytest.mark.parametrize("why", ["train.max_staleness=1", "rollout.engine_kind=vllm"])
def test_engines_sleep_only_where_nothing_is_asked_of_them_meanwhile(why):
    assert load_config(None, ["rollout.sleep=true"]).rollout.sleep
    with pytest.raises(ConfigError, match=r"rollout\.sleep is for"):
        load_config(None, ["rollout.sleep=true", why])


@pytest.mark.parametrize(
    ("heats", "wrong"),
    [
        (("rollout.temperature=0.005",), "rollout.temperature = 0.005"),
        (("rollout.temperature=3",), "rollout.temperature = 3.0"),
        (("evaluate.temperature=0.001",), "evaluate.temperature = 0.001"),
        (("evaluate.temperature=0",), ""),
    ],
)
def test_vllm_is_not_asked_for_temperatures_that_it_would_change(heats, wrong):
    load_config(None, heats)  # the other engine samples at any
    with pytest.raises(ConfigError, match=wrong) if wrong else contextlib.nullcontext():
        load_config(None, [*heats, "rollout.engine_kind=vllm"])
