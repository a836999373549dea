"""Serve a policy: `stateset-ray serve RUN` on this machine, or the file that a cluster's Serve takes.

On a machine of its own it starts Ray and Serve, blocks until Ctrl-C or SIGTERM, lets what is under way end,
and leaves nothing behind. On a cluster that it joins it deploys one application and removes that one again.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from stateset_ray.actors.placement import cluster
from stateset_ray.committed import check_not_a_path
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, ConfigError
from stateset_ray.serving.agent_tools import load_tools
from stateset_ray.serving.security import (
    ENVIRONMENT,
    KeyRing,
    check_haproxy,
    check_tls,
    entries,
    is_loopback,
)
from stateset_ray.serving.settings import SERVE_LOGGING, STEADY_MEMORY, ServeSettings
from stateset_ray.serving.source import Source
from stateset_ray.serving.stores import open_store
from stateset_ray.settings import apply_override, validated

__all__ = ["check_new", "check_port", "prepared", "serve", "write_deploy_file"]

_INGRESS_CPUS = 0.1


def prepared(source: str, overrides: Sequence[str], host: str, keys: Path | None) -> ServeSettings:
    """The settings of an endpoint, checked down to the files of its first version; starts nothing.

    Args:
        source: a run's folder, a checkpoint, or a model's name.
        overrides: `section.key=value`.
        host: the address it will listen on: without keys, only a loopback one is accepted.
        keys: a file of keys.

    Raises:
        StatesetError: what is wrong, and how to mend it.
    """
    for package in ("fastapi", "limits", "yaml"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                "serving needs packages that are not installed", given=package,
                mend="pip install 'stateset-ray[serve]'",
            )  # fmt: skip
    check_not_a_path(source)
    path = Path(source)
    if path.is_file():
        raise ConfigError(
            "a file cannot be served", given=source,
            mend="give a run's folder, a checkpoint, or a model's name (in a TOML file, its model.name)",
        )  # fmt: skip
    tree: dict[str, Any] = {"source": str(path.absolute()) if path.exists() else source}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not (key.strip() and equals):
            raise ConfigError(
                "an override must look like section.key=value, or key=value", given=override,
                mend="for example --set policy.slots=8",
            )  # fmt: skip
        if "." in key:
            apply_override(tree, override)
        else:  # the settings of no section
            inner: dict[str, Any] = {}
            apply_override(inner, f"endpoint.{override}")
            tree |= inner["endpoint"]
    security = tree.setdefault("security", {})
    if keys is not None:
        security["keys_file"] = str(keys.absolute())
    if not (security.get("keys_file") or security.get("keys") or os.environ.get(ENVIRONMENT)):
        if not is_loopback(host):
            raise ConfigError(
                "without API keys a policy is served to this machine only", given=host,
                mend=f"make a key (stateset-ray serve --new-key NAME --keys keys.json), or set {ENVIRONMENT}",
            )  # fmt: skip
        security["open"] = True
    transcripts = tree.get("transcripts", {})
    if isinstance(transcripts.get("folder"), str):  # replicas have working directories of their own
        transcripts["folder"] = str(Path(transcripts["folder"]).absolute())
    settings = validated(ServeSettings, tree, "--set")
    if settings.transcripts.folder is not None:
        _check_writable(settings.transcripts.folder, "transcripts.folder")
    KeyRing(settings.security)
    check_tls(settings.security)
    check_haproxy(settings.security, host)
    # These bring torch and other packages, which the lines above do not need.
    from stateset_ray.serving.rates import Rates
    from stateset_ray.serving.verification import checked

    Rates(settings.rates)

    found = Source(settings.source)
    if settings.agent.enabled:
        load_tools(settings)
    if (store := open_store(settings.conversations)) is not None:
        asyncio.run(store.close())
    checked(found.first(), found.config(), settings.policy.max_context)
    return settings


def write_deploy_file(settings: ServeSettings, path: Path, host: str, port: int) -> None:
    """Write the file that `serve deploy` takes; with mode 0600, since URLs in it may have passwords.

    Raises:
        ConfigError: there is a file of that name, or it cannot be written.
    """
    from stateset_ray.serving.deploy_file import deploy_file

    text = deploy_file(settings, host, port, path.name)
    check_new(path)
    try:
        place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(place, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(
            f"the file cannot be written: {error.strerror}", given=str(path), mend="choose another place"
        ) from error


def check_new(path: Path) -> None:
    """Refuse a name that is taken, or a folder that is not there.

    Raises:
        ConfigError: what is wrong.
    """
    if os.path.lexists(path):
        raise ConfigError("there is such a file already", given=str(path), mend="choose another name")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(
            "the file cannot be written: its folder is not there, or not to be written to", given=str(path),
            mend="make the folder, or choose another place",
        )  # fmt: skip


def _check_writable(folder: Path, key: str) -> None:
    """Make a folder and a file in it, and remove what was made: a replica that cannot only logs it."""
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{key} cannot be written to: {error.strerror}", given=str(folder),
            mend="name a folder that this user may make and write to",
        ) from error  # fmt: skip
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def serve(
    settings: ServeSettings, *, host: str, port: int, address: str = "",
    on_ready: Callable[[str], None] = lambda url: None, stop: threading.Event | None = None,
) -> None:  # fmt: skip
    """Serve until Ctrl-C, SIGTERM, or `stop`; returns when everything under way has ended.

    Args:
        settings: from `prepared`.
        address: of a Ray cluster to join; by default RAY_ADDRESS, else a cluster of its own.
        on_ready: told the base URL once the policy answers.
        stop: set it to end; for tests and for programs that bring their own signals.

    Raises:
        StatesetError: it cannot be started.
    """
    check_port(host, port, address)
    alone = _is_alone(address)
    if not alone and settings.security.open:
        raise ConfigError(
            "on a cluster that is joined, Serve may listen to a network: API keys are needed",
            mend=f"make one (stateset-ray serve --new-key NAME --keys keys.json), or set {ENVIRONMENT}",
        )
    settings = _with_keys_of_environment(settings)
    cpus = settings.most_replicas * settings.policy.cpus + settings.ingress_replicas * _INGRESS_CPUS
    config = Config.model_validate({"cluster": {"address": address}})
    # Signals after Ray is joined, whose own handler of SIGTERM would end the process at once.
    with (
        _steady_memory(),
        cluster(config, at_least_cpus=cpus),
        _signals(stop or threading.Event()) as ended,
    ):
        _run(settings, host, port, alone, on_ready, ended)


@contextmanager
def _steady_memory() -> Iterator[None]:
    """Serve's proxy keeps its memory as our replicas do: it has the environment of the cluster's start."""
    ours = {name: value for name, value in STEADY_MEMORY.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _run(
    settings: ServeSettings, host: str, port: int, alone: bool,
    on_ready: Callable[[str], None], ended: threading.Event,
) -> None:  # fmt: skip
    from ray import serve as ray_serve

    from stateset_ray.serving.app import build
    from stateset_ray.serving.deploy_file import APPLICATION, http_options

    known = True  # unless Serve says otherwise: what is not ours is not removed
    try:
        ray_serve.start(
            http_options=http_options(settings, host, port),
            proxy_location="HeadOnly" if alone else "EveryNode",
            logging_config=SERVE_LOGGING,
        )
        known = APPLICATION in ray_serve.status().applications
        ingress = ray_serve.run(build(settings), name=APPLICATION, route_prefix="/")
    except BaseException as error:  # also a second Ctrl-C: it is not to go on loading behind our back
        if alone:
            ray_serve.shutdown()
        elif not known:
            with suppress(Exception):
                ray_serve.delete(APPLICATION)
        if not isinstance(error, Exception):
            raise
        # Serve raises RuntimeError, with the replicas' traceback as text.
        raise ClusterError(
            f"the endpoint did not come up: {error}",
            mend="its replicas' logs are in Ray's folder, logs/serve",
        ) from error
    try:
        on_ready(f"{'https' if settings.security.tls_cert else 'http'}://{host}:{port}/v1")
        while not ended.wait(1.0):
            pass
        _drain(ingress, settings.deadlines.drain)
    finally:
        if alone:
            ray_serve.shutdown()
        else:
            ray_serve.delete(APPLICATION)


def _drain(ingress: Any, seconds: float) -> None:
    """Let the ingress finish what is under way while the policy still answers."""
    if seconds:
        with suppress(TimeoutError):  # then Serve's own limits end what is left
            ingress.broadcast("drain", seconds).results(timeout_s=seconds + 30, return_exceptions=True)


def _with_keys_of_environment(settings: ServeSettings) -> ServeSettings:
    """The same with the hashes of this process's keys: workers elsewhere lack its environment."""
    found = entries(os.environ.get(ENVIRONMENT, ""))
    security = settings.security.model_copy(update={"keys": (*settings.security.keys, *found)})
    return settings.model_copy(update={"security": security})


def _is_alone(address: str) -> bool:
    """Whether a cluster is started, which nobody else uses."""
    return not (ray.is_initialized() or address or os.environ.get("RAY_ADDRESS"))


def check_port(host: str, port: int, address: str = "") -> None:
    """Refuse a port that this machine cannot listen at; on a cluster that is joined Serve may listen already.

    Raises:
        ConfigError: it is taken, or the address is not this machine's.
    """
    if not _is_alone(address):
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {host} cannot be used: {error.strerror}", mend="choose another with --port"
            ) from error


@contextmanager
def _signals(ended: threading.Event) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield ended
        return

    def end(number: int, frame: Any) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
