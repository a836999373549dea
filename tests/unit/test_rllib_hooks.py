"""What `stateset_ray.rllib` takes from RLlib beyond its documented interface, by name.

If one of these fails after an upgrade of Ray, RLlib has changed where our Algorithm holds on to it: read the
reason beside the name, look at `stateset_ray/rllib/` and mend that, then this.
"""

from __future__ import annotations

import inspect

import pytest
from ray.rllib import _register_all
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics.metrics_logger import DEFAULT_STATS_CLS_LOOKUP, MetricsLogger
from ray.tune import registry
from ray.tune.trainable import Trainable

from stateset_ray.rllib import words

ITERATION = Algorithm._run_one_training_iteration

HOOKS = [
    (Algorithm, "_set_up_metrics", ["self"], "GRPO.setup calls it in place of Algorithm.setup"),
    (Algorithm, "setup", ["self", "config"], "GRPO.setup replaces it whole"),
    (Algorithm, "training_step", ["self"], "one step of ours"),
    (Algorithm, "restore_env_runners", ["self", "env_runner_group"], "called before every training_step"),
    (Algorithm, "evaluate", ["self", "parallel_train_future"], "called every evaluation_interval"),
    (Algorithm, "load_checkpoint", ["self", "checkpoint_dir"], "restores by path, then on_checkpoint_loaded"),
    (Algorithm, "log_result", ["self", "result"], "on_train_result is made there"),
    (Algorithm, "cleanup", ["self"], "ends our actors"),
    (Algorithm, "get_checkpointable_components", ["self"], "none of RLlib's are saved"),
    (AlgorithmConfig, "_translate_special_keys", ["key", "warn_deprecated"], "'callbacks' and its kind"),
    (AlgorithmConfig, "build_algo", ["self", "env", "use_copy"], "builds `algo_class`"),
    (AlgorithmConfig, "validate", ["self"], "replaced: nothing of RLlib's is checked"),
    (
        Checkpointable, "save_to_path", ["self", "path", "state", "filesystem", "use_msgpack"],
        "writes the state beside our checkpoint",
    ),
    (
        Checkpointable, "restore_from_path", ["self", "path", "component", "filesystem", "kwargs"],
        "reads that state",
    ),
    (Trainable, "step", ["self"], "GRPO.step adds `done`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "parameters", "why"), HOOKS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_hook_is_as_we_use_it(owner: type, name: str, parameters: list[str], why: str) -> None:
    found = getattr(owner, name, None)
    assert found is not None, f"{owner.__name__}.{name} is gone; it was needed: {why}"
    # Ray adds one of its own to the methods of a class that has been made an actor in this process.
    given = [parameter for parameter in inspect.signature(found).parameters if parameter != "_ray_trace_ctx"]
    assert given == parameters, f"{owner.__name__}.{name} now takes {given}; it is used: {why}"


@pytest.mark.parametrize(
    ("function", "line", "why"),
    [
        (ITERATION, "self.restore_env_runners(self.env_runner_group)", "overridden"),
        (ITERATION, "self.training_step()", "our step"),
        (ITERATION, "self.metrics.compile()", "clears the metrics of an iteration"),
        (Algorithm._run_one_evaluation, "if self.eval_env_runner_group is not None", "there is none"),
        (Algorithm._compile_iteration_results, "if self.env_runner_group:", "there is none"),
        (Algorithm.step, "and self.env_runner_group", "there is none"),
        (Algorithm.load_checkpoint, "self.restore_from_path(checkpoint_dir)", "ours"),
        (Algorithm.save_checkpoint, "self.save_to_path(", "ours"),
        (AlgorithmConfig.build_algo, "return algo_class( config=", "built from the config alone"),
        (registry._has_rllib_trainable, "_register_all()", "names are known in every cluster"),
        (_register_all, "in ALGORITHMS.items()", "ours stand there too"),
        (Trainable.__init__, "self.setup(copy.deepcopy(self.config))", "after _storage and logdir are set"),
    ],
)  # fmt: skip
def test_rllib_still_goes_that_way(function: object, line: str, why: str) -> None:
    source = " ".join(inspect.getsource(function).split())  # type: ignore[arg-type]
    assert line in source, f"{function} no longer says `{line}` ({why})"


def test_nothing_new_can_be_set_or_called_back() -> None:
    """A new method or callback of RLlib has to be given a meaning, or be refused."""
    fluent = {
        name
        for name, method in vars(AlgorithmConfig).items()
        if inspect.isfunction(method)
        and not name.startswith("_")
        and "NotProvided" in str(inspect.signature(method))
    }
    assert fluent - {*words._METHODS} <= {"build_learner_group"}, fluent - {*words._METHODS}
    hooks = {name for name in vars(RLlibCallback) if name.startswith("on_")}
    assert hooks == {
        *words.CALLED, "on_create_policy", "on_env_runners_recreated", "on_environment_created",
        "on_episode_created", "on_episode_start", "on_episode_step", "on_evaluate_offline_end",
        "on_evaluate_offline_start", "on_learn_on_batch", "on_offline_eval_runners_recreated",
        "on_postprocess_trajectory", "on_sub_environment_created", "on_workers_recreated",
    }  # fmt: skip


def test_metrics_and_episodes_are_as_we_fill_them() -> None:
    assert {"mean", "min", "max", "sum", "lifetime_sum", "item"} <= DEFAULT_STATS_CLS_LOOKUP.keys()
    logger = MetricsLogger(root=True, stats_cls_lookup=DEFAULT_STATS_CLS_LOOKUP)
    for value in (1.0, 3.0):
        logger.log_value(("a", "mean"), value, reduce="mean")
        logger.log_value(("a", "item"), value, reduce="item")
        logger.log_value("sum", value, reduce="lifetime_sum")
    assert logger.compile() == {"a": {"mean": 2.0, "item": 3.0}, "sum": 4.0}
    logger.log_value(("a", "mean"), 5.0, reduce="mean")
    logger.log_value("sum", 1.0, reduce="lifetime_sum")
    found = logger.compile()
    assert (found["a"]["mean"], found["sum"]) == (5.0, 5.0)
    kwargs = inspect.signature(SingleAgentEpisode).parameters
    assert {"observations", "actions", "rewards", "infos", "extra_model_outputs"} <= kwargs.keys()
    assert list(inspect.signature(make_callback).parameters) == [
        "callback_name", "callbacks_objects", "callbacks_functions", "args", "kwargs",
    ]  # fmt: skip


def test_environments_are_registered_where_we_look() -> None:
    registry.register_env("of-the-hooks-test", dict)
    assert registry._global_registry.contains(registry.ENV_CREATOR, "of-the-hooks-test")
    assert registry._global_registry.get(registry.ENV_CREATOR, "of-the-hooks-test") is dict
