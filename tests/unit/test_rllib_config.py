"""GRPOConfig: RLlib's words for our settings, and what is refused. No actor is started."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.spaces import Text
from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.registry import ALGORITHMS
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.tune.registry import get_trainable_cls

from stateset_ray.actors.placement import bundles
from stateset_ray.config import Config, corrected, load_config
from stateset_ray.environments.base import Environment, build_environment
from stateset_ray.environments.echo import Echo
from stateset_ray.errors import ConfigError, StatesetError
from stateset_ray.rllib import GRPO, GRPOConfig
from stateset_ray.rllib.results import episode_of
from stateset_ray.rllib.words import CALLED, SECTIONS
from stateset_ray.types import Message, StopReason, Task, Trajectory, Turn

ECHO = "stateset_ray.environments.echo:Echo"


def echo() -> GRPOConfig:
    return GRPOConfig().environment(ECHO)


# --- what is understood


def test_the_defaults_are_ours() -> None:
    config = echo().settings()
    assert config.train.steps == 1_000_000  # RLlib's users say when to stop
    endless = Config.model_validate({"train": {"steps": 1_000_000}})
    assert config == endless


def test_rllibs_words_reach_our_settings() -> None:
    config = (
        GRPOConfig()
        .api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        .framework("torch")
        .environment(ECHO, env_config={"length": 2})
        .environment(env_config={"turns": 1})
        .env_runners(
            num_env_runners=3, num_envs_per_env_runner=16, num_cpus_per_env_runner=2,
            num_gpus_per_env_runner=0.5,
        )
        .learners(num_learners=2, num_cpus_per_learner=4, num_gpus_per_learner=1)
        .training(lr=1e-4, grad_clip=0.5)
        .evaluation(evaluation_interval=5, evaluation_duration=12, evaluation_config={"explore": False})
        .resources(placement_strategy="SPREAD")
        .debugging(seed=7, log_level="ERROR")
    )  # fmt: skip
    found = config.settings()
    assert found.environment.options == {"length": 2, "turns": 1}
    assert (found.rollout.workers, found.rollout.concurrency) == (3, 16)
    assert (found.cluster.worker_cpus, found.cluster.worker_gpus) == (2, 0.5)
    assert (found.learner.ranks, found.cluster.learner_cpus, found.cluster.learner_gpus) == (2, 4, 1)
    assert (found.learner.learning_rate, found.learner.max_grad_norm) == (1e-4, 0.5)
    assert (found.evaluate.tasks, found.evaluate.temperature) == (12, 0)
    assert found.train.evaluate_every == 0  # RLlib evaluates, by iterations
    assert (found.cluster.strategy, found.run.seed) == ("SPREAD", 7)


def test_every_setting_of_ours_is_reached_by_its_section() -> None:
    config = echo().training(
        model="tiny", grpo={"preset": "gspo", "group_size": 4}, learner={"lora": {"rank": 2}},
        train={"warm_start": {"steps": 3}}, rollout={"max_turns": 2},
    )  # fmt: skip
    config.training(grpo={"clip_low": 1e-3}, model={"threads": 1}, learner={"lora": {"alpha": 8}})
    found = config.settings()
    assert (found.model.name, found.model.threads) == ("tiny", 1)
    assert (found.grpo.preset, found.grpo.ratio, found.grpo.clip_low) == ("gspo", "sequence", 1e-3)
    assert (found.learner.lora.rank, found.learner.lora.alpha) == (2, 8)
    assert (found.train.warm_start.steps, found.rollout.max_turns) == (3, 2)


def test_what_both_can_say_is_one_setting_and_the_last_word_counts() -> None:
    config = echo().training(lr=1e-3, learner={"ranks": 2}).training(learner={"learning_rate": 1e-5})
    assert (config.lr, config.num_learners) == (1e-5, 2)
    assert config.training(lr=1e-4).learners(num_learners=1).settings().learner.learning_rate == 1e-4
    assert config.settings().learner.ranks == 1


def test_a_toml_file_is_where_one_may_start(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    path = root / "examples" / "quickstart.toml"
    ours = load_config(path, ["train.evaluate_every=4", "run.seed=3"])
    config = GRPOConfig.from_toml(path, ["train.evaluate_every=4", "run.seed=3"])
    assert (config.evaluation_interval, config.seed) == (4, 3)
    tree = ours.model_dump()
    tree["train"]["evaluate_every"] = 0
    assert config.settings() == Config.model_validate(tree)
    assert config.training(lr=2e-4).settings().learner.learning_rate == 2e-4


def test_staleness_is_corrected_for_as_without_rllib(tmp_path: Path) -> None:
    (tmp_path / "ahead.toml").write_text("[train]\nmax_staleness = 1\n", encoding="utf-8")
    ours = corrected(load_config(tmp_path / "ahead.toml"))
    assert ours.grpo.correction == "tis"
    assert GRPOConfig.from_toml(tmp_path / "ahead.toml").settings().grpo == ours.grpo


def test_a_config_survives_what_rllib_and_tune_do_with_it() -> None:
    config = echo().training(lr=1e-4, model="tiny", grpo={"group_size": 4}).debugging(seed=3)
    config.callbacks(on_train_result=print)
    for other in (
        GRPOConfig().update_from_dict(config.to_dict()),
        GRPOConfig.from_state(config.get_state()),
        config.copy(),
        copy.deepcopy(config),
    ):
        other.validate()
        assert other.settings() == config.settings()
        assert other.callbacks_on_train_result is print


def test_search_spaces_wait_until_tune_has_drawn() -> None:
    config = echo().training(
        lr=tune.loguniform(1e-5, 1e-3), grpo={"group_size": tune.grid_search([2, 4]), "preset": "dapo"}
    )
    space = config.to_dict()
    assert space["grpo"]["group_size"] == {"grid_search": [2, 4]}
    drawn = {**space, "lr": 2e-4, "grpo": {**space["grpo"], "group_size": 2}}
    found = GRPOConfig().update_from_dict(drawn).settings()
    assert (found.learner.learning_rate, found.grpo.group_size, found.grpo.preset) == (2e-4, 2, "dapo")


def test_a_trial_is_granted_what_its_run_looks_for() -> None:
    config = echo().env_runners(num_env_runners=2).learners(num_learners=2, num_gpus_per_learner=1)
    config.training(rollout={"engines": 1})
    request = GRPO.default_resource_request(config.to_dict())
    wanted = bundles(config.settings())
    assert request.bundles[0] == {"CPU": 1}
    assert request.bundles[1:] == wanted
    assert len(wanted) == 2 + 1 + 2
    assert request.strategy == "PACK"


def test_no_two_trials_share_a_folder_or_a_mirror(tmp_path: Path) -> None:
    algorithm = object.__new__(GRPO)
    algorithm._storage = object()  # as in a trial of Tune
    homes = []
    for name in ("a", "b"):
        algorithm._logdir = str(tmp_path / name)
        homes.append(algorithm._at_home(load_config(None, ["run.mirror=memory://m/"])).run)
    assert [run.mirror for run in homes] == ["memory://m/a", "memory://m/b"]
    assert homes[0].dir != homes[1].dir
    assert algorithm._at_home(load_config(None, [])).run.mirror == ""


def test_tune_and_build_algo_know_it_by_name() -> None:
    assert get_trainable_cls("GRPO") is get_trainable_cls("StatesetGRPO") is GRPO
    assert {"GRPO", "StatesetGRPO"} <= ALGORITHMS.keys()  # what is registered anew with every cluster
    assert echo().algo_class is GRPO
    assert isinstance(GRPO.get_default_config(), GRPOConfig)


# --- environments


class Talk(gymnasium.Env):
    observation_space = action_space = Text(max_length=50, min_length=0)

    def __init__(self, config: Any = None, word: str = "hi") -> None:
        self.word = (config or {}).get("word", word)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        return self.word, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", float(action == self.word), True, False, {}


@pytest.fixture
def talking():
    sys.modules["talking"] = sys.modules[__name__]
    Talk.__module__ = "talking"
    gymnasium.register("Talk-v0", entry_point="talking:Talk", max_episode_steps=3)
    yield
    del gymnasium.registry["Talk-v0"], sys.modules["talking"]
    Talk.__module__ = __name__


def opening(config: GRPOConfig) -> str:
    section = config.settings().environment
    environment: Environment = build_environment(section.path, section.options)
    return environment.reset(environment.task("train", 0), 0).messages[0].content  # type: ignore[union-attr]


def test_an_environment_is_ours_or_gymnasiums_by_name_or_by_class(talking: None) -> None:
    assert GRPOConfig().environment(Echo, env_config={"length": 2}).settings().environment.path == ECHO
    for env in ("Talk-v0", "gymnasium:Talk-v0", "talking:Talk-v0", "gymnasium:talking:Talk"):
        assert opening(GRPOConfig().environment(env, env_config={"word": "yes"})) == "yes"
    for env in (Talk, "talking:Talk", "talking.Talk"):  # built from one mapping
        config = GRPOConfig().environment(env, env_config={"word": "yes"})
        assert opening(config) == "yes"
        assert config.settings().environment.options["config"] == {"word": "yes"}


def test_the_workers_need_not_have_registered_it(talking: None) -> None:
    config = GRPOConfig().environment("Talk-v0", env_config={"word": "yes"})
    section = config.settings().environment
    spec = gymnasium.registry.pop("Talk-v0")
    environment = build_environment(section.path, section.options)
    assert environment.reset(environment.task("train", 0), 0).messages[0].content == "yes"  # type: ignore[union-attr]
    assert '"max_episode_steps": 3' in section.options["spec"]
    drawn = GRPOConfig().update_from_dict(config.to_dict())  # in a trial's process
    assert drawn.settings() == config.settings()
    drawn.env = "Other-v0"
    with pytest.raises(ConfigError, match="no environment has this name"):
        drawn.settings()
    gymnasium.registry["Talk-v0"] = spec


def test_a_name_that_rllib_knows_is_found_first(talking: None) -> None:
    class Local(Talk):
        pass

    tune.register_env("Local-v0", lambda config: Local(config))
    tune.register_env("Broken-v0", lambda config: config["nothing"])
    assert opening(GRPOConfig().environment("Local-v0", env_config={"word": "yes"})) == "yes"
    for name, said in (("Broken-v0", "KeyError"), ("Unknown-v0", "nobody has registered")):
        with pytest.raises(ConfigError, match=said):
            build_environment("stateset_ray.actors.registered:Registered", {"id": name})


def test_a_class_that_the_workers_cannot_import_is_refused(talking: None) -> None:
    class Local(Talk):
        pass

    gymnasium.register("Hidden-v0", entry_point=lambda: Talk())
    try:
        for env in (Local, "Hidden-v0"):
            with pytest.raises(ConfigError, match="the workers cannot"):
                GRPOConfig().environment(env).settings()
    finally:
        del gymnasium.registry["Hidden-v0"]


# --- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda c: c.training(gamma=0.9), "gamma of RLlib has no meaning here: set training(grpo="),
        (lambda c: c.training(train_batch_size=32), "tasks_per_step"),
        (lambda c: c.training(grop={}), "did you mean 'grpo'?"),
        (lambda c: c.training(grpo={"grup_size": 4}), "did you mean 'grpo.group_size'?"),
        (lambda c: c.training(learner={"lora": {"rnk": 4}}), "did you mean 'learner.lora.rank'?"),
        (lambda c: c.training(grpo=4), "grpo is a section"),
        (lambda c: c.env_runners(num_env_runers=1), "did you mean 'num_env_runners'?"),
        (lambda c: c.env_runners(rollout_fragment_length=200), "whole conversations are played"),
        (lambda c: c.env_runners(explore=True), "rollout={'temperature'"),
        (lambda c: c.environment(ECHO, observation_space=None), "observations are text"),
        (lambda c: c.learners(num_aggregator_actors_per_learner=1), "has no meaning here"),
        (lambda c: c.evaluation(evaluation_num_env_runners=1), "the same workers evaluate"),
        (lambda c: c.evaluation(evaluation_duration_unit="timesteps"), "so many episodes"),
        (lambda c: c.evaluation(evaluation_config={"lr": 1}), "temperature"),
        (lambda c: c.reporting(log_gradients=True), "log_gradients of RLlib has no meaning here"),
        (lambda c: c.debugging(fake_sampler=True), "fake_sampler"),
        (lambda c: c.resources(num_gpus=1), "set num_gpus_per_learner"),
        (lambda c: c.framework("tf2"), "framework of RLlib has no meaning here"),
        (lambda c: c.api_stack(enable_rl_module_and_learner=False), "enable_rl_module_and_learner"),
        (lambda c: c.multi_agent(policies={"a"}), "policies of RLlib has no meaning here"),
        (lambda c: c.offline_data(input_="x"), "input_ of RLlib"),
        (lambda c: c.rl_module(model_config={}), "set training(model={...})"),
        (lambda c: c.fault_tolerance(restart_failed_env_runners=True), "workers are always restarted"),
        (lambda c: c.experimental(_validate_config=False), "_validate_config of RLlib"),
        (lambda c: c.checkpointing(export_native_model_files=True), "export_native_model_files"),
        (lambda c: c.python_environment(extra_python_environs_for_driver={}), "extra_python_environs"),
        (lambda c: c.callbacks(on_episode_step=print), "on_episode_step of RLlib has no meaning here"),
        (lambda c: c.callbacks(on_episode_ends=print), "did you mean 'on_episode_end'?"),
        (lambda c: c.update_from_dict({"gamma": 0.5}), "gamma of RLlib has no meaning here"),
        (lambda c: c.update_from_dict({"num_env_runer": 5}), "did you mean 'num_env_runners'?"),
        (lambda c: c.update_from_dict({"grpo": {"clip": 5}}), "unknown key 'grpo.clip'"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_by_name(given: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        given(echo())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("gamma", 0.5, "gamma of RLlib"),
        ("num_epochs", 3, "updates_per_step"),
        ("learing_rate", 1, "unknown setting 'learing_rate'"),
        ("evaluation_parallel_to_training", True, "between two steps"),
        ("evaluation_config", {"gamma": 1}, "evaluation_config"),
        ("num_env_runners", 0, "num_env_runners=1 or more"),
        ("num_learners", 0, "num_learners=1 or more"),
        ("num_envs_per_env_runner", 0, "rollout.concurrency"),
        ("grad_clip", None, "always clipped"),
        ("lr", [[0, 1e-3], [100, 0]], "learner.learning_rate"),
        ("env", None, "the algorithm has no environment"),
        ("env", "Nowhere-v0", "no environment has this name"),
        ("env_config", {"f": print}, "plain data"),
    ],
)
def test_properties_are_checked_when_it_is_built(name: str, value: Any, said: str) -> None:
    config = echo()
    setattr(config, name, value)
    with pytest.raises(StatesetError) as caught:
        config.validate()
    assert said in str(caught.value)


def test_every_setting_of_rllib_either_acts_or_is_refused() -> None:
    """Each property of AlgorithmConfig, changed, is seen in our settings, acts in RLlib, or is refused."""
    acts = {
        "callbacks_class", "evaluation_config", "stats_cls_lookup", "log_level", "log_sys_usage",
        "num_cpus_for_main_process", "custom_resources_for_main_process", "min_time_s_per_iteration",
        "min_train_timesteps_per_iteration", "min_sample_timesteps_per_iteration",
    }  # fmt: skip
    ours = echo().settings()
    for name in vars(AlgorithmConfig()):
        if name in acts or name in ("algo_class", "_is_frozen", "model") or re.match("callbacks_on_", name):
            continue
        config = echo()
        setattr(config, name, object() if name.startswith("env") else 0.123)
        try:
            config.validate()
        except (StatesetError, TypeError):
            continue
        assert config.settings() != ours, f"{name} is ignored"


def test_callbacks_that_nobody_would_call_are_refused() -> None:
    class Stepping(RLlibCallback):
        def on_episode_step(self, **kwargs: Any) -> None: ...

    class Ending(RLlibCallback):
        def on_episode_end(self, **kwargs: Any) -> None: ...

    echo().callbacks(Ending).validate()
    with pytest.raises(
        ConfigError, match="Stepping has callbacks that are never called here: on_episode_step"
    ):
        echo().callbacks([Ending, Stepping])


def test_a_schedule_needs_an_end_and_an_evaluation_tasks() -> None:
    with pytest.raises(ConfigError, match="cosine schedule needs an end"):
        echo().training(learner={"schedule": "cosine"}).validate()
    echo().training(learner={"schedule": "cosine"}, train={"steps": 9}).validate()
    with pytest.raises(ConfigError, match="nothing"):
        echo().evaluation(evaluation_interval=1, evaluation_duration=0).validate()


def test_methods_that_reach_for_a_policy_say_where_it_is() -> None:
    algorithm = object.__new__(GRPO)
    for name in ("get_policy", "get_module", "get_weights", "compute_single_action", "export_policy_model"):
        with pytest.raises(StatesetError, match=rf"no {name}\(\)"):
            getattr(algorithm, name)()


def test_the_document_says_what_is_so() -> None:
    """Its program is one, and every word in its table of settings is understood."""
    text = (Path(__file__).parents[2] / "docs" / "rllib.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program.partition("algorithm =")[0], names)
    names["config"].validate()
    table = text.partition("## What is set where")[2].partition("\n\nA setting")[0]
    for method, arguments in re.findall(r"^\| `(\w+)\((.*?)\)` \|", table, re.MULTILINE):
        for name in re.findall(r"(\w+)=", arguments):
            value = {} if name in ("env_config", *SECTIONS) else None
            getattr(echo(), method)(**{name: value})
    assert set(re.findall(r"`(on_\w+)`", text)) == set(CALLED)


# --- conversations as episodes


def test_a_conversation_is_an_episode() -> None:
    turns = (
        Turn((1, 2), (3,), (-0.5,), policy_version=4, reward=0.25),
        Turn((5,), (6, 7), (-0.5, -1.0), policy_version=4, reward=1.0),
    )
    messages = (
        Message("system", "Be brief."), Message("user", "one?"), Message("assistant", "1"),
        Message("user", "two?"), Message("tool", "2!"), Message("assistant", "2"),
    )  # fmt: skip
    trajectory = Trajectory(
        "r/0/t/0/0", Task("t", 0), 0, messages, turns, StopReason.COMPLETED, info={"solved": True}
    )
    episode = episode_of(trajectory)
    assert episode.id_ == "r/0/t/0/0"
    assert len(episode) == 2
    assert episode.get_return() == 1.25
    assert list(episode.get_observations()) == ["Be brief.\none?", "two?\n2!", ""]
    assert list(episode.get_actions()) == ["1", "2"]
    assert list(episode.get_rewards()) == [0.25, 1.0]
    assert episode.get_infos(-1) == {"solved": True}
    assert list(episode.get_extra_model_outputs("action_logp")) == [-0.5, -1.5]
    assert (episode.is_terminated, episode.is_truncated, episode.is_done) == (True, False, True)


def test_replies_that_the_task_brought_are_no_actions() -> None:
    messages = (
        Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"),
        Message("user", "e"),
    )  # fmt: skip
    turns = (Turn((1,), (2,), (-0.1,), policy_version=0),)
    episode = episode_of(Trajectory("x", Task("t", 0), 0, messages, turns, StopReason.MAX_TURNS))
    assert list(episode.get_observations()) == ["a\nb\nc", "e"]
    assert list(episode.get_actions()) == ["d"]
    assert (episode.is_terminated, episode.is_truncated) == (False, True)
