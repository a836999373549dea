"""What cannot work is refused at once, by name, and leaves neither actors nor a run folder behind."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from playground import slowed, small

from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, ConfigError, ModelError, RunError, StatesetError, TemplateError
from stateset_ray.models import local_folder
from stateset_ray.train import train

pytestmark = pytest.mark.ray


def empty_model(folder: Path) -> Config:
    (folder / "model").mkdir()
    return small(folder, f'model.name="{folder / "model"}"')


def silent_model(folder: Path) -> Config:
    shutil.copytree(local_folder("tiny"), folder / "model")
    (folder / "model" / "chat_template.jinja").unlink()
    return small(folder, f'model.name="{folder / "model"}"')


def overridden(*overrides: str) -> Callable[[Path], Config]:
    return lambda folder: small(folder, *overrides)


ECHO = "stateset_ray.environments.echo"
CASES = {
    "no model folder": (overridden("model.name=./nowhere"), ModelError, "no such model folder", "model.name"),
    "no model in it": (empty_model, ModelError, "no model in the Hugging Face layout", "config.json"),
    "no chat template": (silent_model, TemplateError, "no chat template", "instruction-tuned"),
    "no module": (
        overridden('environment.path="nowhere.at_all:Echo"'),
        ConfigError,
        "cannot be imported",
        "package.module",
    ),
    "no class": (overridden(f'environment.path="{ECHO}:Ecko"'), ConfigError, "no Environment class", "Echo"),
    "no such option": (overridden("environment.options.lenght=3"), ConfigError, "cannot be built", "length"),
    "too long": (
        overridden("rollout.max_context=4096", "learner.micro_batch_tokens=4096"),
        ConfigError,
        "exceeds the model's 2048 positions",
        "at most 2048",
    ),
    "nothing to resume": (overridden("run.name=never"), RunError, "no run of this name", "run.name"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_anything_heavy(tmp_path: Path, case: str) -> None:
    build, kind, problem, mend = CASES[case]
    config = build(tmp_path)
    started = time.monotonic()
    with pytest.raises(StatesetError, match=problem) as caught:
        train(config, resume=case == "nothing to resume")
    assert time.monotonic() - started < slowed(20)  # transformers may be imported here for the first time
    assert type(caught.value) is kind
    assert mend in caught.value.mend
    assert not config.run.folder.exists()


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written") as caught:
        train(small(tmp_path / "file"))
    assert "run.dir" in caught.value.mend


def test_more_than_the_cluster_has_is_refused(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"GPU: 3 wanted, 0 free of 0") as caught:
        train(small(tmp_path, "cluster.learner_gpus=3"))
    assert time.monotonic() - started < slowed(30)
    assert "ask for less" in caught.value.mend
    assert ray.is_initialized()  # the cluster was there before, and stays


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learner.learning_rate=5e-3", "learner.learning_rate: 0.001 then, 0.005 now"),
        ("grpo.group_size=2", "grpo.group_size: 4 then, 2 now"),
        ('environment.path="playground:Constant"', "environment.path"),
    ],
)
def test_another_configuration_is_not_resumed(tmp_path: Path, override: str, says: str) -> None:
    config = small(tmp_path)
    config.run.folder.mkdir()
    (config.run.folder / "config.toml").write_text(config.to_toml())
    with pytest.raises(ConfigError, match="not the configuration that the run began with") as caught:
        train(config.with_overrides([override]), resume=True)
    assert says in str(caught.value)
    assert "config.toml" in caught.value.mend
