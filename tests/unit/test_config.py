"""The configuration: read from TOML, overridden, checked across fields, written back."""

import contextlib
import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.config import Config, corrected, load_config
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


def test_the_mark_that_editors_on_windows_begin_a_file_with_is_no_part_of_it(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[train]\nsteps = 5\n", encoding="utf-8-sig")
    assert load_config(path).train.steps == 5


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


@pytest.mark.parametrize("more", [(), ("grpo.preset=gspo",), ("grpo.preset=dppo",)])
def test_a_stored_configuration_is_corrected_for_staleness_as_a_fresh_one(tmp_path, more):
    path = tmp_path / "config.toml"
    for before, after in ((0, 2), (2, 0), (2, 1)):
        path.write_text(corrected(load_config(None, [*more, f"train.max_staleness={before}"])).to_toml())
        fresh = corrected(load_config(None, [*more, f"train.max_staleness={after}"]))
        assert corrected(load_config(path, [f"train.max_staleness={after}"])) == fresh
        assert corrected(load_config(path)) == load_config(path)  # a resume stays what the run was


def test_what_a_stored_configuration_says_on_purpose_stays(tmp_path):
    path = tmp_path / "config.toml"
    for purpose, before, after in (("sampler", 2, 3), ("proximal", 0, 2)):
        settings = [f"grpo.trust={purpose}", "grpo.correction=none", f"train.max_staleness={before}"]
        path.write_text(corrected(load_config(None, settings)).to_toml())
        objective = corrected(load_config(path, [f"train.max_staleness={after}"])).grpo
        assert (objective.trust, objective.correction) == (purpose, "none")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"x": None}, "x is None"),
        ({"x": {"y": [1, None]}}, r"x\.y\[1\] is None"),
        ({"day": datetime.date(2026, 1, 1)}, "day is a date"),
        ({"days": [datetime.datetime(2026, 1, 1)]}, r"days\[0\] is a date"),
    ],
)
def test_options_that_toml_cannot_hold_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Config(environment={"options": options})


def test_a_named_reference_is_not_moved():
    with pytest.raises(ConfigError, match="reference_every cannot move"):
        load_config(None, ["grpo.kl_coef=0.1", "grpo.reference=x", "grpo.reference_every=5"])
