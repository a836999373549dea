"""Serve's file: what Serve would ignore is found."""

from __future__ import annotations

import copy

import pytest
import yaml

from stateset_ray.errors import ConfigError
from stateset_ray.serving.deploy_file import check_deploy_file, deploy_file
from stateset_ray.serving.settings import PolicySettings, SecuritySettings, ServeSettings

SETTINGS = ServeSettings(
    source="tiny", policy=PolicySettings(replicas=2), security=SecuritySettings(open=True)
)


@pytest.fixture
def tree():
    return yaml.safe_load(deploy_file(SETTINGS, "127.0.0.1", 8123))


def test_what_is_written_is_what_serve_builds(tree):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built
    from ray.serve.schema import LoggingConfig, ServeDeploySchema

    from stateset_ray.serving.app import build

    schema = ServeDeploySchema.model_validate(tree)
    assert (schema.http_options.port, schema.applications[0].import_path) == (
        8123, "stateset_ray.serving.app:build",
    )  # fmt: skip
    application = built(build, schema.applications[0].args)
    policy = application._bound_deployment.init_args[1]._bound_deployment
    assert (policy.name, policy.num_replicas) == ("Policy", 2)
    assert application._bound_deployment.name == "Ingress"
    told = [schema.logging_config, application._bound_deployment, policy]
    for one in told:
        config = getattr(one, "_deployment_config", None)
        logging = LoggingConfig(**config.logging_config) if config else one
        assert (logging.encoding, logging.enable_access_log) == ("JSON", False), "the gate writes the lines"
    assert ServeSettings.model_validate(tree["applications"][0]["args"]) == SETTINGS
    with pytest.raises(ValueError, match="polcy"):
        built(build, {"source": "tiny", "polcy": {}})


@pytest.mark.parametrize(
    ("path", "value", "near"),
    [
        (["proxy_locaton"], "HeadOnly", "proxy_location"),
        (["http_options", "prot"], 1, "port"),
        (["logging_config", "encodng"], "JSON", None),
        (["applications", 0, "route_prefx"], "/", "route_prefix"),
        (
            ["applications", 0, "deployments"], [{"name": "Policy", "max_ongoing_request": 9}],
            "max_ongoing_requests",
        ),
        (
            ["applications", 0, "deployments"],
            [{"name": "Policy", "autoscaling_config": {"max_replica": 3}}],
            "max_replicas",
        ),
        (["applications", 0, "deployments"], [{"name": "Polcy"}], "neither of"),
        (["applications", 0, "args", "polcy"], {}, "policy"),
        (["applications", 0, "args", "policy", "slot"], 3, "slots"),
    ],
)  # fmt: skip
def test_a_typo_at_any_level_is_found(tree, path, value, near):
    check_deploy_file(tree)
    wrong = copy.deepcopy(tree)
    node = wrong
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        check_deploy_file(wrong)
    assert near is None or near in str(caught.value)


def test_an_open_endpoint_stays_on_loopback(tree):
    for options in ({"host": "0.0.0.0"}, {}):
        with pytest.raises(ConfigError, match="lets anyone in"):
            check_deploy_file(tree | {"http_options": options})


def test_files_that_are_no_files_of_serve(tmp_path):
    path = tmp_path / "x.yaml"
    for text in ("- 1", "a: [", "http_options: {port: x}\napplications: []"):
        path.write_text(text)
        with pytest.raises(ConfigError):
            check_deploy_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        check_deploy_file(tmp_path / "none.yaml")
