"""Serve's YAML file: written for an endpoint, and read strictly.

Serve ignores every key that it does not know, at each level: a typo in `max_ongoing_requests` silently means
the default of 5. This walks the file beside Serve's own models and names what they would ignore.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from stateset_ray.errors import ConfigError
from stateset_ray.serving.security import is_loopback
from stateset_ray.serving.settings import SERVE_LOGGING, ServeSettings
from stateset_ray.settings import validated

__all__ = ["APPLICATION", "IMPORT_PATH", "check_deploy_file", "deploy_file", "http_options", "unknown_keys"]

APPLICATION = "policy"
"""The name of our application, unless a file says otherwise."""
IMPORT_PATH = "stateset_ray.serving.app:build"
_DEPLOYMENTS = ("Ingress", "Policy")
_HEAD = """\
# An endpoint of stateset_ray, for `serve deploy {name}` or the serveConfigV2 of a RayService.
# Checked by `stateset-ray serve --check {name}`: Serve itself ignores keys that it does not know.
"""


def deploy_file(settings: ServeSettings, host: str, port: int, name: str = "FILE.yaml") -> str:
    """The file that `serve deploy` takes, with every setting that is not the default.

    Args:
        name: of the file, for its own first lines.
    """
    tree = {
        "proxy_location": "EveryNode",
        "http_options": http_options(settings, host, port),
        "logging_config": dict(SERVE_LOGGING),
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": settings.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }
    check_deploy_file(tree)
    return _HEAD.format(name=name) + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def http_options(settings: ServeSettings, host: str, port: int) -> dict[str, Any]:
    """What Serve is told of where it listens."""
    options: dict[str, Any] = {"host": host, "port": port}
    security = settings.security
    if security.tls_cert is not None:
        options |= {"ssl_certfile": str(security.tls_cert), "ssl_keyfile": str(security.tls_key)}
    return options


def check_deploy_file(source: Mapping[str, Any] | Path) -> None:
    """Check a file, or what was read from one, as strictly as it will be taken loosely.

    Raises:
        ConfigError: it cannot be read, holds a key that nobody knows, or a value that is wrong.
    """
    tree = _read(source) if isinstance(source, Path) else source
    problems = [*unknown_keys(ServeDeploySchema, tree), *_unknown_deployments(tree)]
    if problems:
        raise ConfigError(
            "the Serve file holds keys that Serve would ignore:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    try:
        ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"the Serve file is wrong at {where}: {first['msg']}") from error
    for application in tree["applications"]:
        if application.get("import_path") == IMPORT_PATH:
            settings = validated(ServeSettings, application.get("args") or {}, "args")
            host = str((tree.get("http_options") or {}).get("host", "0.0.0.0"))  # Serve's default
            if settings.security.open and not is_loopback(host):
                raise ConfigError(
                    "the Serve file lets anyone in who reaches a network address", given=host,
                    mend="use keys and leave security.open out, or set http_options.host to 127.0.0.1",
                )  # fmt: skip


def unknown_keys(model: type[BaseModel], tree: Any, at: str = "") -> Iterator[str]:
    """What a model would ignore in a tree, each with its place and the nearest key there is."""
    if not isinstance(tree, Mapping):
        return
    fields: dict[str, Any] = dict(model.model_fields)
    fields |= {field.alias: field for field in model.model_fields.values() if field.alias}
    for key, value in tree.items():
        place = f"{at}.{key}".lstrip(".")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            yield f"{place}" + (f"; did you mean {near[0]!r}?" if near else "")
            continue
        for inner in _models(fields[key].annotation):
            items = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, item in items:
                yield from unknown_keys(inner, item, place if index is None else f"{place}[{index}]")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation such as `Optional[list[Model]]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _unknown_deployments(tree: Mapping[str, Any]) -> Iterator[str]:
    for number, application in enumerate(tree.get("applications") or []):
        if not isinstance(application, Mapping) or application.get("import_path") != IMPORT_PATH:
            continue
        for index, deployment in enumerate(application.get("deployments") or []):
            name = deployment.get("name") if isinstance(deployment, Mapping) else None
            if name not in _DEPLOYMENTS:
                yield f"applications[{number}].deployments[{index}].name is neither of {_DEPLOYMENTS}"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the Serve file cannot be read: {error}", given=str(path)) from error
    if not isinstance(tree, Mapping):
        raise ConfigError("the Serve file is no mapping", given=str(path))
    return tree
