"""Search spaces: what is read, what is refused, and that only valid configurations come out of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from stateset_ray.config import Config, load_config
from stateset_ray.errors import ConfigError
from stateset_ray.sweep.plan import Plan, read_plan, shipped, trials_to_run
from stateset_ray.sweep.space import Dice, varied

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    def read(text: str, *overrides: str, samples: int = 0) -> Plan:
        path = tmp_path / "space.toml"
        path.write_text(text)
        return read_plan(load_config(None, overrides), path, samples=samples)

    return read


def test_every_kind_is_drawn_within_its_ends(plan: Any) -> None:
    found, _ = trials_to_run(
        plan("""
        [sweep]
        samples = 200
        [space]
        "learner.learning_rate" = { loguniform = [1e-6, 1e-3] }
        "learner.weight_decay" = { uniform = [0.0, 0.1] }
        "rollout.max_turns" = { randint = [2, 4] }
        "grpo.advantage" = { choice = ["mean", "rloo"] }
        """)
    )
    rates = [values["learner.learning_rate"] for values in found]
    assert all(1e-6 <= rate <= 1e-3 for rate in rates)
    below = sum(rate < math.sqrt(1e-6 * 1e-3) for rate in rates)
    assert 70 < below < 130, "half of the draws lie below the geometric mean"
    decays = [values["learner.weight_decay"] for values in found]
    assert 0.04 < sum(decays) / len(decays) < 0.06
    assert {values["rollout.max_turns"] for values in found} == {2, 3, 4}, "both ends are included"
    assert {values["grpo.advantage"] for values in found} == {"mean", "rloo"}
    assert len(found) == 200


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    text = '[space]\n"learner.learning_rate" = { loguniform = [1e-6, 1e-4] }\n'
    path.write_text(text, encoding="utf-8-sig")
    assert read_plan(load_config(), path).text == text


def test_the_same_seed_draws_the_same_trials_and_more_samples_keep_the_first(plan: Any) -> None:
    text = '[sweep]\nseed = {}\n[space]\n"learner.learning_rate" = {{ loguniform = [1e-6, 1e-3] }}'
    first, again, other = (trials_to_run(plan(text.format(seed), samples=4))[0] for seed in (1, 1, 2))
    assert first == again != other
    assert trials_to_run(plan(text.format(1), samples=6))[0][:4] == first


def test_a_grid_is_tried_in_full_and_each_point_drawn_so_many_times(plan: Any) -> None:
    found, _ = trials_to_run(
        plan("""
        sweep.samples = 2
        [space.grpo]
        group_size = { grid = [4, 8] }
        loss = { grid = ["ppo", "cispo"] }
        clip_low = { uniform = [0.1, 0.3], when = { "grpo.loss" = "ppo" } }
        """)
    )
    points = [(values["grpo.group_size"], values["grpo.loss"], "grpo.clip_low" in values) for values in found]
    both = [(4, "ppo", True), (4, "ppo", True), (8, "ppo", True), (8, "ppo", True)]
    assert sorted(points) == sorted([*both, (4, "cispo", False), (8, "cispo", False)])


def test_a_grid_alone_has_no_doubles_and_leaves_out_what_cannot_be(plan: Any) -> None:
    found, notes = trials_to_run(
        plan("""
        sweep.samples = 5
        space."grpo.loss" = { grid = ["ppo", "dppo"] }
        space."grpo.clip_high" = { grid = [0.2, 4.0] }
        """)
    )
    assert [(v["grpo.loss"], v["grpo.clip_high"]) for v in found] == [
        ("ppo", 0.2),
        ("ppo", 4.0),
        ("dppo", 0.2),
    ]
    assert notes[0].startswith("1 points of the grid give no valid configuration: ") and "dppo" in notes[0]


def test_a_setting_varies_only_where_it_matters_and_in_the_way_that_holds(plan: Any) -> None:
    text = """
        [space]
        "grpo.clip_high" = [
            { uniform = [0.2, 0.4], when = { "grpo.loss" = "ppo" } },
            { uniform = [2.0, 6.0], when = { "grpo.loss" = ["cispo"] } },
        ]
        "grpo.loss" = { choice = ["ppo", "cispo", "sapo"] }
        """
    found, _ = trials_to_run(plan(text, samples=60))
    ranges = {"ppo": (0.2, 0.4), "cispo": (2.0, 6.0)}
    for values in found:
        low, high = ranges.get(values["grpo.loss"], (0, 0))
        assert low <= values.get("grpo.clip_high", 0) <= high
    assert {values["grpo.loss"] for values in found} == {"ppo", "cispo", "sapo"}


def test_a_condition_may_be_on_what_the_configuration_or_its_preset_says(plan: Any) -> None:
    text = '[space]\n"grpo.clip_low" = { uniform = [0.1, 0.3], when = { "grpo.loss" = "ppo" } }\n'
    text += '"learner.weight_decay" = { uniform = [0.0, 0.1] }\n'
    assert "grpo.clip_low" in trials_to_run(plan(text, samples=1))[0][0]
    assert "grpo.clip_low" not in trials_to_run(plan(text, "grpo.preset=cispo", samples=1))[0][0]
    found, _ = trials_to_run(plan(text + '"grpo.preset" = { grid = ["dapo", "cispo"] }', samples=1))
    assert ["grpo.clip_low" in values for values in found] == [True, False]


def test_what_the_checks_refuse_is_drawn_again(plan: Any) -> None:
    found, notes = trials_to_run(
        plan(
            '[space]\n"rollout.max_turn_tokens" = { randint = [40, 160] }',
            "rollout.max_context=100",
            samples=20,
        )
    )
    assert max(values["rollout.max_turn_tokens"] for values in found) < 100
    assert "were refused by the configuration's checks" in notes[0]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ('"learner.learning_rat" = { uniform = [0, 1] }', "did you mean 'learner.learning_rate'"),
        ('"grpo.clip_low" = { uniform = [0.1, 0.2], when = { "grpo.los" = "ppo" } }', "'grpo.loss'"),
        ('"learner" = { choice = [1] }', "is a section, not a setting"),
        ('"learner.betas.first" = { choice = [1] }', "learner.betas.first is a part of a setting"),
        ('"learner.learning_rate" = 1e-3', "must vary in exactly one way"),
        ('"learner.learning_rate" = { unform = [1e-6, 1e-3] }', "must vary in exactly one way"),
        ('"learner.learning_rate" = { uniform = [0, 1], choice = [1] }', "must vary in exactly one way"),
        ('"learner.learning_rate" = { uniform = [1e-3, 1e-6] }', "low end below its high end"),
        ('"learner.learning_rate" = { uniform = [1e-6] }', "two finite numbers"),
        ('"learner.learning_rate" = { uniform = [1e-6, inf] }', "two finite numbers"),
        ('"learner.learning_rate" = { loguniform = [0, 1e-3] }', "low end above 0"),
        ('"learner.learning_rate" = { uniform = [-2.0, -1.0] }', "learner.learning_rate: "),
        ('"rollout.max_turns" = { randint = [1.5, 3] }', "two whole numbers"),
        ('"grpo.loss" = { choice = [] }', "needs a list of values"),
        ('"grpo.loss" = { choice = ["ppo", "ppo"] }', "names a value twice"),
        ('"grpo.loss" = { choice = ["ppo", "pppo"] }', "grpo.loss: Input should be"),
        ('"grpo.loss" = [{ choice = ["ppo"] }]', "each says with `when`"),
        ('"grpo.loss" = { choice = ["ppo"] }\n[space.grpo]\nloss = { choice = ["ppo"] }', "given twice"),
        ('"train.steps" = { choice = [1, 2] }', "trials of different lengths"),
        ('"evaluate.tasks" = { choice = [1, 2] }', "different exams"),
        ('"cluster.worker_cpus" = { choice = [1, 2] }', "where actors sit"),
        ('"run.name" = { choice = ["a", "b"] }', "named by the sweep"),
        ("", "varies nothing"),
        (
            '"grpo.loss" = { choice = ["ppo"], when = { "grpo.ratio" = "token" } }\n'
            '"grpo.ratio" = { choice = ["token"], when = { "grpo.loss" = "ppo" } }',
            "lead in a circle",
        ),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused(plan: Any, space: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(f"[space]\n{space}")
    assert said in str(error.value)


def test_a_space_that_gives_nothing_valid_is_refused_with_the_reason(plan: Any) -> None:
    with pytest.raises(ConfigError, match="200 draws from this search space gave no valid") as error:
        plan('[space]\n"rollout.max_turn_tokens" = { randint = [200, 300] }', "rollout.max_context=100")
    assert "leaves no room for a prompt" in str(error.value)
    with pytest.raises(ConfigError, match="gave no valid"):  # nothing is drawn, so once is enough
        plan('[space]\n"rollout.max_turn_tokens" = { grid = [200] }', "rollout.max_context=100")


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("sample = 3", "did you mean 'sweep.samples'"),
        ('scheduler = "bayes"', "sweep.scheduler"),
        ('scheduler = "pbt"\nsamples = 1', "at least 2 trials"),
        ('scheduler = "pbt"\npbt.interval = 10', "leaves no comparison"),
        ('scheduler = "asha"\nasha.grace = 10', "all of train.steps"),
        ('scheduler = "pbt"\nsearcher = "optuna"', "beside no searcher"),
        ('scheduler = "asha"\nmetric = "heldout_reward"', "not known when trials are compared"),
        ("pbt.factors = [1.0]", "must be positive and not 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(plan: Any, sweep: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(f'[sweep]\n{sweep}\n[space]\n"learner.weight_decay" = {{ uniform = [0.0, 0.1] }}')
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('"model.dtype" = { choice = ["float32", "bfloat16"] }', "holds weights of this model"),
        ('"learner.ranks" = { choice = [1, 2] }', "optimizer states of this layout"),
        ('"learner.lora.rank" = { choice = [4, 8] }', "optimizer states of this layout"),
        ('"rollout.workers" = { choice = [1, 2] }', "keeps the room"),
        ('"train.warm_start.steps" = { choice = [1, 2] }', "has happened"),
        ('"grpo.kl_coef" = { choice = [0.0, 0.1] }', "gives none to go on with"),
        ('"grpo.kl_coef" = { uniform = [0.0, 0.1] }', "gives none to go on with"),
        ('"grpo.reference_every" = { choice = [1, 2] }', "holds the reference as it is"),
    ],
)
def test_pbt_over_what_a_checkpoint_pins_is_refused(plan: Any, entry: str, said: str) -> None:
    with pytest.raises(ConfigError, match="cannot be perturbed") as error:
        plan(f'[sweep]\nscheduler = "pbt"\n[space]\n{entry}', "grpo.kl_coef=0.1")
    assert said in str(error.value)


def test_pbt_over_a_kl_that_is_steered_is_refused(plan: Any) -> None:
    text = '[sweep]\nscheduler = "pbt"\n[space]\n"grpo.kl_coef" = { uniform = [0.1, 0.2] }'
    plan(text)
    with pytest.raises(ConfigError, match="it is steered from step to step"):
        plan(text, "grpo.kl_coef=0.1", "grpo.kl_target=0.01")


def test_guests_are_refused_in_a_sweep(plan: Any) -> None:
    with pytest.raises(ConfigError, match="would take the room of other trials"):
        plan('[space]\n"learner.weight_decay" = { uniform = [0.0, 0.1] }', "rollout.max_workers=3")


def test_what_is_compared_is_the_heldout_reward_where_it_is_known(plan: Any) -> None:
    entry = '[space]\n"learner.weight_decay" = { uniform = [0.0, 0.1] }\n'
    asha = entry + '[sweep]\nscheduler = "asha"\n'
    assert plan(entry).metric == "heldout_reward"
    assert plan(entry, "evaluate.tasks=0").metric == "reward_mean"
    assert plan(asha).metric == "reward_mean"
    assert plan(asha, "train.evaluate_every=2").metric == "heldout_reward"
    assert plan(asha, "train.evaluate_every=3").metric == "reward_mean"


PERTURBED = """
    [sweep]
    scheduler = "pbt"
    [space]
    "learner.learning_rate" = { loguniform = [1e-5, 1e-3] }
    "rollout.max_turns" = { randint = [1, 4] }
    "grpo.loss" = { choice = ["ppo", "cispo", "sapo"] }
    "grpo.clip_high" = [
        { uniform = [0.2, 0.4], when = { "grpo.loss" = "ppo" } },
        { uniform = [2.0, 6.0], when = { "grpo.loss" = "cispo" } },
    ]
    """


def test_perturbed_values_stay_within_their_ends_and_valid(plan: Any) -> None:
    space, dice = plan(PERTURBED).space, Dice(0)
    values = {
        "learner.learning_rate": 9e-4,
        "rollout.max_turns": 1,
        "grpo.loss": "ppo",
        "grpo.clip_high": 0.39,
    }
    seen = []
    for _ in range(300):
        before, values = values, space.perturb(values, dice, 0.0, (0.8, 1.25))
        rate, last = values["learner.learning_rate"], before["learner.learning_rate"]
        assert rate in (pytest.approx(0.8 * last), pytest.approx(min(1e-3, 1.25 * last)), pytest.approx(1e-5))
        assert isinstance(values["rollout.max_turns"], int) and 1 <= values["rollout.max_turns"] <= 4
        varied(space.config, values)
        low, high = {"ppo": (0.2, 0.4), "cispo": (2.0, 6.0)}.get(values["grpo.loss"], (0, 0))
        assert low <= values.get("grpo.clip_high", 0) <= high, "what newly matters is drawn anew"
        seen.append(values)
    assert {v["rollout.max_turns"] for v in seen} == {1, 2, 3, 4}, "a small number moves, too"
    assert {v["grpo.loss"] for v in seen} == {"ppo", "cispo", "sapo"}


def test_an_option_at_the_end_moves_inwards(plan: Any) -> None:
    space = plan(
        '[sweep]\nscheduler = "pbt"\n[space]\n"learner.betas" = { choice = [[0.9, 0.95], [0.8, 0.9]] }'
    ).space
    for seed in range(8):
        assert space.perturb({"learner.betas": [0.8, 0.9]}, Dice(seed), 0.0, (0.5,)) == {
            "learner.betas": [0.9, 0.95]
        }


def test_perturbation_without_a_valid_way_keeps_what_was(plan: Any) -> None:
    text = '[sweep]\nscheduler = "pbt"\n[space]\n"rollout.max_turn_tokens" = { randint = [50, 400] }'
    space = plan(text, "rollout.max_context=100").space
    values = {"rollout.max_turn_tokens": 60}
    assert space.perturb(values, Dice(0), 0.0, (4.0,)) == values


def test_values_resolve_a_preset_and_keep_what_was_set_beside_it() -> None:
    config = load_config(None, ["grpo.preset=gspo", "grpo.gamma=1.0", "grpo.clip_high=0.001"])
    other = varied(config, {"grpo.preset": "dapo"}).grpo
    assert (other.preset, other.ratio, other.refills, other.clip_high) == ("dapo", "token", 3, 0.001)


def test_a_trial_with_rollouts_ahead_is_corrected_like_a_run() -> None:
    config = load_config(None, ["train.max_staleness=1"])
    assert varied(config, {"grpo.clip_high": 0.3}).grpo.correction == "tis"
    assert varied(config, {"grpo.correction": "none"}).grpo.correction == "none"


def test_values_below_a_mapping_are_free(plan: Any) -> None:
    found, _ = trials_to_run(plan('[space]\n"environment.options.difficulty" = { grid = [1, 2] }'))
    assert [varied(Config(), v).environment.options["difficulty"] for v in found] == [1, 2]


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("example", ["quickstart", "customer_service"])
def test_a_shipped_space_goes_with_the_examples(name: str, example: str) -> None:
    plan = read_plan(load_config(EXAMPLES / f"{example}.toml"), name)
    found, _ = trials_to_run(plan)
    assert len(found) == plan.sweep.samples
    for values in found:
        varied(plan.config, values)


def test_the_shipped_spaces_are_those_of_the_documents() -> None:
    assert shipped() == ["customer_service", "full", "generation", "grpo", "optimizer"]


def test_a_missing_space_names_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="customer_service, full, generation"):
        read_plan(Config(), "grppo")
