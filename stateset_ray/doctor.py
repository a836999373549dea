"""Whether this machine can run a configuration: what is there, what is missing, and how to mend it.

Each check is a small function that returns a `Finding`; one that breaks is a finding, too. Nothing is
started but, on demand, Ray.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stateset_ray.actors.address import address_of, check_answers
from stateset_ray.actors.memory import expected_memory, size
from stateset_ray.config import Config
from stateset_ray.environments.base import build_environment, check_expert, has_expert
from stateset_ray.environments.boundary import ask_expert
from stateset_ray.errors import ClusterError, StatesetError
from stateset_ray.models import check_fits, config_only, count_parameters, load_tokenizer
from stateset_ray.models import generation_stop_ids as stop_ids
from stateset_ray.offline_models import cache_dir
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.rollout import rollout

__all__ = ["TESTED", "Finding", "Status", "examine", "show"]

Status = Literal["ok", "note", "warn", "fail"]

TESTED = {
    "ray": ("2.60", "2.60"),
    "torch": ("2.10", "2.13"),
    "transformers": ("5.23", "5.23"),
    "deepspeed": ("0.19", "0.19"),
}
"""Package -> the lowest version that the code needs, and the newest that it was tested with."""

_GIB = 2**30
_EXPERT_TASKS = 3
_TOOL = {"type": "function", "function": {"name": "look_up_order", "description": "", "parameters": {}}}
_COLOURS = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        mend: what to do; empty where all is well.
    """

    name: str
    status: Status
    detail: str
    mend: str = ""


def examine(config: Config | None = None, *, start_ray: bool = False) -> list[Finding]:
    """Run all checks, those of a configuration too where one is given.

    Args:
        start_ray: really start (or join) Ray, and leave it again; takes some seconds.
    """
    given = config or Config()
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        **{name: partial(_package, name) for name in TESTED},
        "devices": partial(_devices, given),
        "deepspeed import": _deepspeed,
        "ray cluster": partial(_ray_started if start_ray else _ray_address, given),
        "ray token": partial(_ray_token, given),
        "cache folder": _cache,
        "ports": _ports,
    }
    if config is not None:
        checks |= {
            "model": partial(_model, config),
            "chat template": partial(_template, config),
            "environment": partial(_environment, config),
            "memory": partial(_memory, config),
            "run folder": partial(_run_folder, config),
            "shared memory": partial(_shared_memory, config),
        }
    return [_guarded(name, check) for name, check in checks.items()]


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings, and how to mend each that is not well."""
    table = Table.grid(padding=(0, 2))
    for wraps in (False, False, True):
        table.add_column(no_wrap=not wraps, overflow="fold")
    for finding in findings:
        text = Text(finding.detail)
        if finding.mend:
            text.append(f"\nto mend: {finding.mend}", "bold")
        table.add_row(Text(finding.status, _COLOURS[finding.status]), finding.name, text)
    console.print(table)
    count = {status: sum(f.status == status for f in findings) for status in ("fail", "warn")}
    summary = f"{count['fail']} to mend, {count['warn']} to look at" if any(count.values()) else "all is well"
    console.print(Text(summary))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except StatesetError as error:
        given = f" (given: {error.given!r})" if error.given is not None else ""
        return Finding(name, "fail", f"{error.problem}{given}", error.mend)
    except Exception as error:
        return Finding(name, "fail", f"the check broke: {type(error).__name__}: {error}", "please report it")


def _python() -> Finding:
    return Finding("python", "ok", sys.version.split()[0])  # an older one cannot even import this file


def _package(name: str) -> Finding:
    lowest, newest = TESTED[name]
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "fail", "not installed", f"pip install '{name}>={lowest}'")
    if _numbers(found) < _numbers(lowest):
        return Finding(name, "fail", f"{found} is too old", f"pip install '{name}>={lowest}'")
    if _numbers(found)[:2] > _numbers(newest):
        return Finding(name, "warn", f"{found}, newer than what was tested", f"if it fails: {newest}")
    return Finding(name, "ok", found)


def _devices(config: Config) -> Finding:
    import torch

    cores, count = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
    detail = f"{cores} cores, " + (f"{count} GPUs ({names})" if count else "no GPU: float32 on the CPU")
    room = config.cluster
    asked = room.learner_gpus * config.learner.ranks + room.worker_gpus * config.rollout.workers
    asked += room.engine_gpus * config.rollout.engines
    elsewhere = bool(address_of(config)[0])
    if asked > count and not elsewhere:
        return Finding(
            "devices", "fail", f"{detail}; the configuration asks for {asked:g} GPUs",
            "lower cluster.learner_gpus and worker_gpus, or name a cluster in cluster.address",
        )  # fmt: skip
    if count and not asked:
        mend = "set cluster.learner_gpus and cluster.worker_gpus (0.5 each shares one)"
        return Finding("devices", "warn", f"{detail}, not used", mend)
    return Finding("devices", "ok", detail)


def _deepspeed() -> Finding:
    import torch

    if not torch.cuda.is_available():  # as the learner does on a CPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with redirect_stdout(sys.stderr):
        import deepspeed
    device = deepspeed.accelerator.get_accelerator().device_name()
    return Finding("deepspeed import", "ok", f"works, for {device}")


def _ray_address(config: Config) -> Finding:
    address, source = address_of(config)
    if not address or address == "local":
        return Finding("ray cluster", "ok", "starts one of its own on this machine (--ray tries it)")
    try:
        asked = check_answers(address, source)
    except ClusterError as error:
        return Finding("ray cluster", "fail", f"{error.problem} ({error.given})", error.mend)
    if not asked:
        return Finding("ray cluster", "note", f"joins {address!r} ({source}); --ray tries it")
    return Finding("ray cluster", "ok", f"{address} answers ({source})")


def _ray_started(config: Config) -> Finding:
    import ray

    from stateset_ray.actors.placement import bundles, cluster

    with cluster(config):
        have = ray.cluster_resources()
    wanted = bundles(config)
    lacking = [
        f"{name}: {total:g} wanted, {have.get(name, 0):g} there"
        for name in ("CPU", "GPU")
        if (total := sum(bundle.get(name, 0) for bundle in wanted)) > have.get(name, 0)
    ]
    if lacking:
        return Finding("ray cluster", "fail", "; ".join(lacking), "add nodes, or ask for less in [cluster]")
    room = f"{have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
    return Finding("ray cluster", "ok", f"started, with {room}")


def _ray_token(config: Config) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    there = bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()
    joins = bool(address_of(config)[0])
    if mode not in ("", "token", "disabled"):
        return Finding("ray token", "fail", f"RAY_AUTH_MODE={mode!r} is unknown to Ray", "token or disabled")
    if mode == "token" and joins and not there:
        mend = "put the cluster's token there, or in RAY_AUTH_TOKEN"
        return Finding("ray token", "fail", f"RAY_AUTH_MODE=token, and no token in {path}", mend)
    if mode == "disabled" and joins:
        return Finding("ray token", "note", "switched off: whoever reaches the cluster's ports may use it")
    has = "a token is there" if there else "no token yet"
    return Finding("ray token", "ok", f"RAY_AUTH_MODE={mode or 'unset'}, {has}")


def _cache() -> Finding:
    folder = cache_dir()
    free = shutil.disk_usage(_existing(folder)).free
    if not os.access(_existing(folder), os.W_OK):
        return Finding("cache folder", "fail", f"{folder} cannot be written", "set STATESET_RAY_CACHE")
    few = free < 2 * _GIB
    mend = "free some space, or set STATESET_RAY_CACHE" if few else ""
    return Finding("cache folder", "warn" if few else "ok", f"{folder}, {size(free)} free", mend)


def _ports() -> Finding:
    used = []
    for port in (8000, 8265):
        with socket.socket() as probe:
            probe.settimeout(1)
            used += [port] if probe.connect_ex(("127.0.0.1", port)) == 0 else []
    if not used:
        return Finding("ports", "ok", "8000 (serving) and 8265 (dashboard) are free")
    return Finding("ports", "note", f"in use: {', '.join(map(str, used))}; perhaps a cluster that runs here")


def _model(config: Config) -> Finding:
    check_fits(config)
    kind = config_only(config.model.name).model_type
    count = count_parameters(config.model.name)
    return Finding("model", "ok", f"{config.model.name}: {kind}, {count / 1e6:,.1f} million parameters")


def _template(config: Config) -> Finding:
    tokenizer = load_tokenizer(config.model.name)
    renderer = Renderer(tokenizer, frozenset(stop_ids(config.model.name)))
    stops = " ".join(sorted(tokenizer.decode([token]) for token in renderer.stop_ids))
    try:
        renderer.check_tools([_TOOL])
        tools = "shows tools"
    except Exception:  # whatever the template raises: environments then describe tools in words
        tools = "shows no tools (environments describe them in words)"
    if renderer.rewrites_history:
        detail = f"rewrites earlier turns, so that every turn is learned as a sample of its own; {tools}"
        return Finding("chat template", "warn", detail, "a template that only appends learns faster")
    return Finding("chat template", "ok", f"replies end with {stops}; {tools}")


def _environment(config: Config) -> Finding:
    """Let the environment's expert play a few tasks within the configured limits."""
    section = config.environment
    environment = build_environment(section.path, section.options)
    if not has_expert(environment):
        if config.train.warm_start.steps:
            check_expert(environment)
        return Finding("environment", "ok", f"{section.path}; it has no expert, so it was not played")
    renderer = Renderer(load_tokenizer(config.model.name), frozenset(stop_ids(config.model.name)))
    try:
        return _play_expert(config, renderer)
    except StatesetError:
        raise
    except (Exception, SystemExit) as error:  # of the environment's own methods
        return Finding(
            "environment", "fail", f"{section.path} raised {type(error).__name__}: {error}",
            f"mend {section.path}",
        )  # fmt: skip


def _play_expert(config: Config, renderer: Renderer) -> Finding:
    section, rewards = config.environment, []
    for index in range(_EXPERT_TASKS):
        played = build_environment(section.path, section.options)
        script = ScriptedPolicy(renderer, lambda _, played=played: ask_expert(played))  # type: ignore[misc]
        task = played.task("train", index)
        game = rollout(played, task, script, renderer, config.rollout, id=f"doctor/{task.id}", seed=index)
        done = asyncio.run(game)
        if done.reward is None:
            return Finding("environment", "fail", f"{task.id}: {done.error}", f"mend {section.path}")
        if done.stop_reason.truncated:
            detail = f"the expert's conversation {task.id} was ended by {done.stop_reason}"
            return Finding("environment", "warn", detail, "raise that limit in [rollout]")
        rewards.append(done.reward)
    detail = f"{section.path}; its expert earns {', '.join(f'{reward:g}' for reward in rewards)}"
    if max(rewards) <= 0:
        return Finding("environment", "warn", detail, "an expert should earn something")
    return Finding("environment", "ok", detail)


def _memory(config: Config) -> Finding:
    need, free = expected_memory(config).total, _free_memory()
    detail = f"about {size(need)} expected at most, {size(free)} free here"
    if config.cluster.learner_gpus or config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return Finding("memory", "note", f"{detail}; on GPUs or other machines it is theirs that counts")
    mend = "lower learner.micro_batch_tokens or rollout.concurrency, or take a smaller model"
    return Finding("memory", "ok" if need < free else "warn", detail, "" if need < free else mend)


def _run_folder(config: Config) -> Finding:
    folder = _existing(config.run.dir)
    need = expected_memory(config).checkpoint * (config.train.keep_checkpoints + 1)
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("run folder", "fail", f"{folder} cannot be written", "set run.dir")
    detail = f"{config.run.dir}: {size(need)} for checkpoints, {size(free)} free"
    mend = "free some space, lower train.keep_checkpoints, or set run.dir"
    return Finding("run folder", "ok" if need < free else "fail", detail, "" if need < free else mend)


def _shared_memory(config: Config) -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "note", "there is no /dev/shm; Ray takes a folder in /tmp")
    need, free = 2 * expected_memory(config).published, shutil.disk_usage(place).free
    detail = f"/dev/shm: {size(need)} for published weights, {size(free)} free"
    mend = "in Docker: --shm-size; in Kubernetes: an emptyDir of medium Memory"
    return Finding("shared memory", "ok" if need < free else "warn", detail, "" if need < free else mend)


def _free_memory() -> int:
    """Free memory of the machine, or of the container where that is less."""
    free = int(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])
