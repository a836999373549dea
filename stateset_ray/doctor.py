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
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stateset_ray.config import Config
from stateset_ray.environments.base import Environment, build_environment
from stateset_ray.errors import StatesetError
from stateset_ray.models import (
    cache_dir,
    check_fits,
    choose_hardware,
    config_only,
    count_parameters,
    generation_stop_ids,
    load_tokenizer,
)
from stateset_ray.policies.renderer import Renderer
from stateset_ray.policies.scripted import ScriptedPolicy
from stateset_ray.rollout import rollout

__all__ = ["TESTED", "Finding", "Memory", "Status", "examine", "expected_memory", "show"]

Status = Literal["ok", "note", "warn", "fail"]

TESTED = {
    "ray": ("2.60", "2.60"),
    "torch": ("2.6", "2.13"),
    "transformers": ("5.0", "5.23"),
    "deepspeed": ("0.19", "0.19"),
}
"""Package -> the lowest version that the code needs, and the newest that it was tested with."""

_GIB = 2**30
_PROCESS = 350 * 2**20  # of one actor before its model: Python, torch, Ray
_BUCKET = 50_000_000  # elements of the learner's reduce buckets (`learner.engine`)
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


@dataclass(frozen=True)
class Memory:
    """Bytes that a run is expected to take, on the device for learners and engines.

    Attributes:
        learner: weights, gradients and optimizer of one rank, and activations of one micro-batch.
        engine: weights and KV cache of one rollout worker, if every slot is filled.
        published: one version of the weights in the object store; two while they change.
        checkpoint: one checkpoint on disk.
        total: everything, on all machines together.
    """

    learner_state: int
    activations: int
    weights: int
    kv_cache: int
    published: int
    checkpoint: int
    total: int

    def rows(self) -> list[str]:
        """A line for each part."""
        return [
            f"{'learner rank':<16} {_size(self.learner_state)} weights, gradients, Adam moments and ZeRO's "
            f"flat copies, + about {_size(self.activations)} activations",
            f"{'rollout worker':<16} {_size(self.weights)} weights + {_size(self.kv_cache)} KV cache at most",
            f"{'object store':<16} {_size(self.published)} a version; two while weights change",
            f"{'checkpoint':<16} {_size(self.checkpoint)} on disk",
            f"{'in all':<16} {_size(self.total)}, with {_size(_PROCESS)} for each process itself",
        ]


def expected_memory(config: Config) -> Memory:
    """Estimate what a run takes, from the model's shape alone; no weights are loaded.

    One rank of DeepSpeed ZeRO-1 in float32 was measured at 6.7 times the weights at its peak, which is:
    weights, gradients, two Adam moments, the flat master copy, flat gradients, and two reduce buckets.
    ZeRO 1 divides moments, master and flat gradients among the ranks, 2 the gradients, 3 the weights too.

    Raises:
        ModelError: the model cannot be found.
    """
    model = config_only(config.model.name)
    parameters, ranks, limits = count_parameters(config.model.name), config.learner.ranks, config.rollout
    hardware = choose_hardware(config.model, config.cluster.learner_gpus)
    size = hardware.dtype.itemsize
    stage = config.learner.zero_stage
    share = {name: ranks if stage >= least else 1 for name, least in (("weights", 3), ("gradients", 2))}
    state = parameters * (size // share["weights"] + size // share["gradients"] + 4 * 4 // ranks)
    state += 2 * min(parameters, _BUCKET) * size
    if config.grpo.kl_coef:
        state += parameters * size  # the frozen reference is whole on each rank
    heads = model.num_attention_heads
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    head = getattr(model, "head_dim", None) or model.hidden_size // heads
    cache = model.num_hidden_layers * 2 * limits.concurrency * kv_heads * limits.max_context * head * size
    activations, weights = _activations(config, model, size), parameters * size
    total = ranks * (state + activations + _PROCESS) + limits.workers * (weights + cache + _PROCESS)
    return Memory(
        state, activations, weights, cache, weights,
        checkpoint=parameters * (2 * size + 3 * 4), total=total + 2 * weights + _PROCESS,
    )  # fmt: skip


def _activations(config: Config, model: Any, size: int) -> int:
    """What one micro-batch leaves for its backward pass: layers, then logits of the sampled tokens."""
    limits, train = config.rollout, config.train
    step = train.tasks_per_step * config.grpo.group_size * limits.max_context // config.learner.ranks
    tokens = min(config.learner.micro_batch_tokens, step)
    layers = 1 if config.learner.gradient_checkpointing else model.num_hidden_layers
    inner = getattr(model, "intermediate_size", None) or 4 * model.hidden_size
    kept = tokens * size * layers * (8 * model.hidden_size + 4 * inner)
    longest = min(limits.max_turns * limits.max_turn_tokens, limits.max_sampled_tokens, limits.max_context)
    logits = tokens * longest // limits.max_context * model.vocab_size * 4
    return int(kept + 3 * logits)  # logits, their float32 softmax and its gradient


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
    for column in ("status", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("detail", overflow="fold")
    for finding in findings:
        text = Text(finding.detail)
        if finding.mend:
            text.append(f"\nto mend: {finding.mend}", "bold")
        table.add_row(Text(finding.status, _COLOURS[finding.status]), finding.name, text)
    console.print(table)
    count = {status: sum(f.status == status for f in findings) for status in ("fail", "warn")}
    console.print(
        Text(f"{count['fail']} to mend, {count['warn']} to look at" if any(count.values()) else "all is well")
    )


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except StatesetError as error:
        given = f" (given: {error.given!r})" if error.given is not None else ""
        return Finding(name, "fail", f"{error.problem}{given}", error.mend)
    except Exception as error:
        return Finding(
            name, "fail", f"the check broke: {type(error).__name__}: {error}", "report this, please"
        )


def _python() -> Finding:
    found = sys.version.split()[0]
    good = sys.version_info >= (3, 11)
    return Finding("python", "ok" if good else "fail", found, "" if good else "install Python 3.11 or newer")


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
    elsewhere = bool(room.address or os.environ.get("RAY_ADDRESS"))
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

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with redirect_stdout(sys.stderr):
        import deepspeed
    return Finding(
        "deepspeed import", "ok", f"works, for {deepspeed.accelerator.get_accelerator().device_name()}"
    )


def _ray_address(config: Config) -> Finding:
    address = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    source = "cluster.address" if config.cluster.address else "RAY_ADDRESS"
    if not address or address == "local":
        return Finding("ray cluster", "ok", "starts one of its own on this machine (--ray tries it)")
    match = re.fullmatch(r"(?:\w+://)?([\w.-]+):(\d+)", address)
    if match is None:
        return Finding("ray cluster", "note", f"joins {address!r} ({source}); --ray tries it")
    try:
        socket.create_connection((match[1], int(match[2])), timeout=3).close()
    except OSError as error:
        return Finding(
            "ray cluster", "fail", f"nothing answers at {address} ({source}): {error}",
            f"start that cluster, or unset {source} to start one here",
        )  # fmt: skip
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
    return Finding(
        "ray cluster", "ok", f"started, with {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
    )


def _ray_token(config: Config) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    there = bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()
    joins = bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))
    if mode not in ("", "token", "disabled"):
        return Finding("ray token", "fail", f"RAY_AUTH_MODE={mode!r} is unknown to Ray", "token or disabled")
    if mode == "token" and joins and not there:
        mend = "put the cluster's token there, or in RAY_AUTH_TOKEN"
        return Finding("ray token", "fail", f"RAY_AUTH_MODE=token, and no token in {path}", mend)
    if mode == "disabled" and joins:
        return Finding("ray token", "note", "switched off: whoever reaches the cluster's ports may use it")
    return Finding(
        "ray token", "ok", f"RAY_AUTH_MODE={mode or 'unset'}, {'a token' if there else 'no token yet'}"
    )


def _cache() -> Finding:
    folder = cache_dir()
    free = shutil.disk_usage(_existing(folder)).free
    if not os.access(_existing(folder), os.W_OK):
        return Finding("cache folder", "fail", f"{folder} cannot be written", "set STATESET_RAY_CACHE")
    few = free < 2 * _GIB
    mend = "free some space, or set STATESET_RAY_CACHE" if few else ""
    return Finding("cache folder", "warn" if few else "ok", f"{folder}, {_size(free)} free", mend)


def _ports() -> Finding:
    used = [port for port in (8000, 8265) if _listens(port)]
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
    renderer = Renderer(tokenizer, generation_stop_ids(config.model.name))
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
    """Let the expert play a few tasks within the configured limits."""
    section = config.environment
    environment = build_environment(section.path, section.options)
    if type(environment).expert is Environment.expert:
        if config.train.warm_start.steps:
            environment.expert()  # raises the error that says so
        return Finding("environment", "ok", f"{section.path}; it has no expert, so it was not played")
    renderer = Renderer(load_tokenizer(config.model.name), generation_stop_ids(config.model.name))
    rewards = []
    for index in range(_EXPERT_TASKS):
        played = build_environment(section.path, section.options)
        script = ScriptedPolicy(renderer, lambda _, played=played: played.expert())  # type: ignore[misc]
        task = played.task("train", index)
        done = asyncio.run(
            rollout(played, task, script, renderer, config.rollout, id=f"doctor/{task.id}", seed=index)
        )
        if done.reward is None:
            return Finding("environment", "fail", f"{task.id}: {done.error}", f"mend {section.path}")
        if done.stop_reason.truncated:
            detail = f"the expert's conversation {task.id} was ended by {done.stop_reason}"
            return Finding("environment", "warn", detail, "raise that limit in [rollout]")
        rewards.append(done.reward)
    detail = f"{section.path}; its expert earns {', '.join(f'{reward:g}' for reward in rewards)}"
    low = max(rewards) <= 0
    return Finding(
        "environment", "warn" if low else "ok", detail, "its expert should earn something" if low else ""
    )


def _memory(config: Config) -> Finding:
    need, free = expected_memory(config).total, _free_memory()
    detail = f"about {_size(need)} expected at most, {_size(free)} free here"
    if config.cluster.learner_gpus or config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return Finding("memory", "note", f"{detail}; on GPUs or other machines it is theirs that counts")
    mend = "lower learner.micro_batch_tokens, rollout.concurrency or rollout.max_context, or take a smaller model"
    return Finding("memory", "ok" if need < free else "warn", detail, "" if need < free else mend)


def _run_folder(config: Config) -> Finding:
    folder = _existing(config.run.dir)
    need = expected_memory(config).checkpoint * (config.train.keep_checkpoints + 1)
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("run folder", "fail", f"{folder} cannot be written", "set run.dir")
    detail = f"{config.run.dir}: {_size(need)} for checkpoints, {_size(free)} free"
    mend = "free some space, lower train.keep_checkpoints, or set run.dir"
    return Finding("run folder", "ok" if need < free else "fail", detail, "" if need < free else mend)


def _shared_memory(config: Config) -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "note", "there is no /dev/shm; Ray takes a folder in /tmp")
    need, free = 2 * expected_memory(config).published, shutil.disk_usage(place).free
    detail = f"/dev/shm: {_size(need)} for published weights, {_size(free)} free"
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


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= 100 * 2**20 else f"{count / 2**20:.1f} MiB"
