"""The warnings of a step: loud and named where learning cannot work, silent where it can."""

from typing import Any

import pytest

from stateset_ray.config import load_config
from stateset_ray.grpo.diagnosis import diagnose

HEALTHY: dict[str, Any] = {
    "step": 0,
    "tokens_per_trajectory": {"mean": 40.0},
    "reward_mean": 0.3,
    "reward_std": 0.4,
    "equal_reward_share": 0.25,
    "truncated_share": 0.1,
    "stop_reasons": {"completed": 30, "turn_tokens": 2},
    "errors": [],
    "staleness": {"mean": 0.0, "max": 0},
    "update": {
        "kl_mismatch_k3": 2e-4, "clip_fraction_low": 0.01, "clip_fraction_high": 0.02, "entropy": 1.2,
        "grad_norm": 0.5,
    },
}  # fmt: skip


def names(**changes: Any) -> list[str]:
    update = HEALTHY["update"] | changes.pop("update", {})
    return [problem.name for problem in diagnose({**HEALTHY, **changes, "update": update}, load_config())]


def test_a_healthy_step_has_nothing_to_say() -> None:
    assert names() == []
    assert diagnose({**HEALTHY, "update": {}}, load_config()) == []  # nothing was learned, nothing measured


def test_what_was_sampled_by_older_weights_may_differ_from_what_is_learned_now() -> None:
    far = {"kl_mismatch_k3": 1.5}
    assert names(update=far) == ["sampler_disagrees"]
    assert names(update=far, staleness={"mean": 1.2, "max": 2}) == []
    assert names(update=far, staleness={"mean": None, "max": None}) == ["sampler_disagrees"]


def test_a_weight_whose_reward_nobody_named_is_told() -> None:
    config = load_config(None, ["grpo.reward_weights={solved=1.0, polite=1.0}"])
    assert diagnose({**HEALTHY, "rewards_named": ["polite", "solved"]}, config) == []
    [problem] = diagnose({**HEALTHY, "rewards_named": ["polite", "solvd"]}, config)
    assert problem.name == "reward_not_named"
    assert "['solved']" in problem.text and "['polite', 'solvd']" in problem.text


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"equal_reward_share": 1.0}, "equal_rewards"),
        ({"truncated_share": 0.95}, "all_truncated"),
        ({"stop_reasons": {"completed": 4, "environment_error": 3, "timeout": 2}}, "most_failed"),
        ({"update": {"kl_mismatch_k3": 0.09}}, "sampler_disagrees"),
        ({"update": {"clip_fraction_low": 0.3, "clip_fraction_high": 0.3}}, "mostly_clipped"),
        ({"update": {"effective_sample_share": 0.05}}, "few_effective_samples"),
        ({"update": {"entropy": 1e-5}}, "entropy_collapsed"),
        ({"update": {"grad_norm": 0.0}}, "no_gradient"),
    ],
)
def test_each_problem_is_named_with_its_mend(changes: dict[str, Any], name: str) -> None:
    assert names(**changes) == [name]
    update = HEALTHY["update"] | changes.get("update", {})
    [problem] = diagnose({**HEALTHY, **changes, "update": update}, load_config())
    assert problem.text
    assert problem.mend
    assert not problem.fatal
    assert problem.as_dict()["name"] == name


def test_a_learner_that_scores_something_else_than_was_sampled_is_fatal() -> None:
    update = HEALTHY["update"] | {"kl_mismatch_k3": 3.0}
    [problem] = diagnose({**HEALTHY, "update": update}, load_config())
    assert problem.fatal
    assert "tokenization" in problem.text


def test_bug_30_a_first_step_in_which_nothing_was_sampled_is_fatal() -> None:
    nothing = {"tokens_per_trajectory": {"mean": 0.0}, "stop_reasons": {"context": 32}}
    [problem] = diagnose({**HEALTHY, **nothing}, load_config())
    assert (problem.name, problem.fatal) == ("nothing_sampled", True)
    assert "every loss mask is all zero" in problem.text
    assert "rollout.max_context" in problem.mend
    [later] = diagnose({**HEALTHY, **nothing, "step": 7}, load_config())
    assert not later.fatal
    # Conversations that failed sampled nothing for another reason, which has a name of its own.
    failed = nothing | {"stop_reasons": {"environment_error": 32}}
    assert names(**failed) == ["most_failed"]


def test_later_minibatches_are_off_policy_by_design() -> None:
    update = HEALTHY["update"] | {"kl_mismatch_k3": 0.09}
    settings = load_config(None, ["train.updates_per_step=2"])
    assert diagnose({**HEALTHY, "update": update}, settings) == []
