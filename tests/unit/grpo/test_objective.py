"""The objective as configuration: presets, what wins over them, and what is refused."""

from itertools import permutations
from typing import Any, get_args

import pytest

from stateset_ray.config import Config, load_config
from stateset_ray.errors import ConfigError
from stateset_ray.objective import PRESETS, ObjectiveConfig, PresetName

# Every part that says what is computed: preset -> its value. Written out, so that a changed default shows.
PARTS = ("advantage", "loss", "ratio", "trust", "clip_low", "clip_high", "aggregation")
TABLE: dict[str, tuple[Any, ...]] = {
    "default": ("mean", "ppo", "token", "sampler", 0.2, 0.28, "token_mean"),
    "grpo": ("mean_std", "ppo", "token", "sampler", 0.2, 0.2, "sequence_mean"),
    "dr_grpo": ("mean", "ppo", "token", "sampler", 0.2, 0.2, "constant"),
    "dapo": ("mean_std", "ppo", "token", "sampler", 0.2, 0.28, "token_mean"),
    "gspo": ("mean_std", "ppo", "sequence", "proximal", 3e-4, 4e-4, "sequence_mean"),
    "cispo": ("mean_std", "cispo", "token", "sampler", 0.2, 4.0, "token_mean"),
    "rloo": ("rloo", "ppo", "token", "sampler", 0.2, 0.2, "constant"),
    "reinforce_pp": ("reinforce_pp", "ppo", "token", "sampler", 0.2, 0.2, "token_mean"),
    "dppo": ("mean", "dppo", "token", "sampler", 0.2, 0.2, "token_mean"),
}
BESIDE: dict[str, dict[str, Any]] = {
    "dapo": {"refills": 3, "overlong_share": 0.2},
    "reinforce_pp": {"kl_in": "reward", "kl_estimator": "k1"},
}
"""Further parts of a preset; all others are the defaults of every run."""


@pytest.mark.parametrize("preset", TABLE)
def test_a_preset_is_its_named_parts_and_otherwise_the_defaults(preset: str) -> None:
    ours = ObjectiveConfig(preset=preset).model_dump()  # type: ignore[arg-type]
    expected = {**dict(zip(PARTS, TABLE[preset], strict=True)), **BESIDE.get(preset, {}), "preset": preset}
    assert ours == {**ObjectiveConfig().model_dump(), **expected}


def test_every_preset_is_in_the_table_and_has_the_reference_free_default() -> None:
    assert set(TABLE) == set(PRESETS) == set(get_args(PresetName))
    for preset in PRESETS:
        assert ObjectiveConfig(preset=preset).kl_coef == 0
        assert ObjectiveConfig(preset=preset).correction == "none"


OVERRIDES: dict[str, Any] = {
    "group_size": 4, "advantage": "batch_std", "credit": "return_to_go", "truncated": "clamp",
    "overlong_share": 0.5, "refills": 1, "shuffle_rewards": True, "clip_low": 0.11, "clip_high": 0.33,
    "aggregation": "constant", "kl_coef": 0.01, "entropy_coef": 0.01, "reward_weights": {"solved": 1.0},
    "outcome_weight": 0.5, "overlong_penalty": 0.2, "log_ratio_penalty": 0.1, "sapo_tau_positive": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_one_part_beside_a_preset_wins_and_leaves_the_others(preset: Any) -> None:
    for key, value in OVERRIDES.items():
        ours = ObjectiveConfig(preset=preset, **{key: value}).model_dump()
        assert ours == {**ObjectiveConfig(preset=preset).model_dump(), key: value}


def test_even_a_default_wins_when_it_is_set_beside_a_preset() -> None:
    assert ObjectiveConfig(preset="grpo", clip_high=0.28, advantage="mean").clip_high == 0.28


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_configuration_reads_back_equal(preset: Any, tmp_path: Any) -> None:
    config = load_config(None, [f"grpo.preset={preset}", "grpo.clip_low=0.07", "grpo.reward_weights.a=0.5"])
    assert config.grpo == ObjectiveConfig(preset=preset, clip_low=0.07, reward_weights={"a": 0.5})
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(file) == config


@pytest.mark.parametrize(("old", "new"), list(permutations(PRESETS, 2)))
def test_another_preset_replaces_the_old_ones_parts_but_not_what_was_set_beside_it(
    old: Any, new: Any
) -> None:
    beside = {"clip_low": 0.07, "group_size": 4, "gamma": 0.9, "credit": "return_to_go"}
    config = Config(grpo=ObjectiveConfig(preset=old, **beside))
    ours = config.with_overrides([f"grpo.preset={new}"])
    assert ours.grpo == ObjectiveConfig(preset=new, **beside)
    # What is set in the same breath wins, too.
    ours = config.with_overrides(["grpo.clip_high=0.5", f"grpo.preset={new}"])
    assert ours.grpo == ObjectiveConfig(preset=new, **beside, clip_high=0.5)


@pytest.mark.parametrize(("old", "new"), [("gspo", "grpo"), ("dapo", "default")])
def test_another_preset_replaces_the_parts_of_a_stored_configuration(
    old: Any, new: Any, tmp_path: Any
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(Config(grpo=ObjectiveConfig(preset=old, group_size=4)).to_toml(), encoding="utf-8")
    assert load_config(file, [f"grpo.preset={new}"]).grpo == ObjectiveConfig(preset=new, group_size=4)
    # What a person wrote was meant, default or not.
    file.write_text(f'[grpo]\npreset = "{old}"\nclip_high = 0.28\n', encoding="utf-8")
    assert load_config(file, [f"grpo.preset={new}"]).grpo.clip_high == 0.28


def test_an_override_of_something_else_leaves_the_objective_alone() -> None:
    config = Config(grpo=ObjectiveConfig(preset="gspo", clip_high=0.1))
    assert config.with_overrides(["train.steps=3"]).grpo == config.grpo
    assert config.with_overrides(["grpo.clip_low=0.01"]).grpo == ObjectiveConfig(
        preset="gspo", clip_high=0.1, clip_low=0.01
    )


# Refusals: what contradicts, and which keys the message must name.
CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"loss": "cispo", "dual_clip": 9.0}, ("dual_clip", "grpo.loss", "'cispo'")),
    ({"loss": "sapo", "ratio": "sequence"}, ("grpo.ratio", "grpo.loss", "'sapo'")),
    ({"dual_clip": 1.28}, ("grpo.dual_clip = 1.28", "grpo.clip_high")),
    ({"dual_clip": 0.5}, ("grpo.dual_clip = 0.5", "grpo.clip_high")),
    ({"loss": "dppo", "clip_high": 1.0}, ("grpo.loss = 'dppo'", "grpo.clip_high = 1.0")),
    ({"loss": "dppo", "trust": "proximal"}, ("grpo.loss = 'dppo'", "grpo.trust")),
    ({"correction": "tis"}, ("grpo.correction = 'tis'", "grpo.trust")),
    ({"correction": "mis", "trust": "sampler"}, ("grpo.correction = 'mis'", "grpo.trust")),
    (
        {"correction": "mis", "trust": "proximal", "correction_low": 2.0, "correction_high": 2.0},
        ("grpo.correction_low = 2.0", "grpo.correction_high = 2.0"),
    ),
    ({"kl_coef": 0.1, "kl_estimator": "k1"}, ("grpo.kl_estimator = 'k1'", "grpo.kl_in")),
    ({"kl_target": 0.1}, ("kl_target", "grpo.kl_coef")),
    ({"reference": "tiny"}, ("reference", "grpo.kl_coef")),
    ({"reference_every": 5}, ("reference_every", "grpo.kl_coef")),
    (
        {"kl_coef": 0.1, "reference": "tiny", "reference_every": 5},
        ("grpo.reference_every", "grpo.reference = 'tiny'"),
    ),
    ({"gamma": 0.9}, ("grpo.gamma = 0.9", "grpo.credit")),
    ({"reward_weights": {"a": 0.0, "b": 0.0}}, ("grpo.reward_weights", "0")),
    ({"reward_weights": {"a": 1.0, "b": -1.0}, "overlong_share": 0.1}, ("overlong_share", "reward_weights")),
]


@pytest.mark.parametrize(("settings", "named"), CONTRADICTIONS)
def test_a_contradiction_is_refused_and_names_its_keys(
    settings: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as direct:
        ObjectiveConfig(**settings)
    with pytest.raises(ConfigError) as from_file:
        Config().with_overrides(f"grpo.{key}={_toml(value)}" for key, value in settings.items())
    for text in (str(direct.value), str(from_file.value)):
        assert [name for name in named if name not in text] == []


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {number}" for key, number in value.items()) + "}"
    return repr(value)


def test_every_contradiction_has_a_case() -> None:
    met = set()
    for given, _ in CONTRADICTIONS:
        whole = {**ObjectiveConfig().model_dump(), **given}
        rows = ObjectiveConfig.model_construct(**whole)._contradictions()
        met |= {index for index, (wrong, _) in enumerate(rows) if wrong}
    assert met == set(range(len(ObjectiveConfig()._contradictions())))


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("clip_low", -0.1), ("clip_low", 0.0), ("clip_low", 1.0), ("clip_high", -0.1), ("clip_high", 0.0),
        ("dual_clip", -1.0), ("correction_low", -0.5), ("correction_high", 0.0), ("kl_coef", -0.1),
        ("entropy_coef", -0.1), ("gamma", 0.0), ("gamma", 1.1), ("group_size", 1), ("sapo_tau_positive", 0.0),
        ("overlong_share", 1.0), ("overlong_penalty", -1.0), ("refills", -1), ("log_ratio_penalty", -1.0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_its_key(key: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=rf"grpo\.{key}: .*\(given: {bad}\)"):
        load_config(None, [f"grpo.{key}={bad}"])


def test_an_unknown_preset_is_refused_and_the_choices_named() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["grpo.preset=grop"])
    text = str(error.value)
    assert "grpo.preset" in text and "'grop'" in text
    assert [preset for preset in PRESETS if repr(preset) not in text] == []


def test_a_misspelt_part_beside_a_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"clip_hihg.*grpo\.clip_high"):
        load_config(None, ["grpo.preset=dapo", "grpo.clip_hihg=0.3"])


def test_presets_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        PRESETS["grpo"] = {}  # type: ignore[index]
    assert ObjectiveConfig().model_config["frozen"]
