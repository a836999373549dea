"""The knobs of an endpoint: typed arguments of `stateset_ray.serving.app:build`, checked before anything
starts.

Every default is a value that works on a laptop. They are written to and read from Serve's YAML (`args:`), and
set by `stateset-ray serve --set section.key=value`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "SERVE_LOGGING",
    "STEADY_MEMORY",
    "AgentSettings",
    "AutoscalingSettings",
    "ConversationSettings",
    "DeadlineSettings",
    "KeyEntry",
    "LimitSettings",
    "PolicySettings",
    "RateSettings",
    "SecuritySettings",
    "ServeSettings",
    "SwapSettings",
    "TranscriptSettings",
]

_Scope = Literal["chat", "agent", "admin"]

SERVE_LOGGING = {"encoding": "JSON", "enable_access_log": False}
"""How Serve's proxies and replicas log. The gate's line of a request says more than those that proxy, ingress
and policy would each write of it; probes of health and what is refused for want of room get none."""

STEADY_MEMORY = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""Environment of processes that answer. Thousands of short requests in dozens of threads leave glibc with
ever more memory that is free, but in pieces: one arena keeps it together, and the threads take turns anyway.
Caches of each thread fill slowly; without them memory stays as it is after some minutes."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class LimitSettings(_Section):
    """What one request may hold; everything beyond is refused before it costs anything."""

    body_bytes: int = Field(default=1 << 20, ge=1024)
    depth: int = Field(default=16, ge=4)
    """Levels of lists and objects in the body."""
    containers: int = Field(default=10_000, ge=16)
    """Lists and objects in the body."""
    messages: int = Field(default=512, ge=1)
    message_chars: int = Field(default=200_000, ge=1)
    choices: int = Field(default=8, ge=1)
    stops: int = Field(default=4, ge=1)
    stop_chars: int = Field(default=64, ge=1)


class DeadlineSettings(_Section):
    """Seconds until an answer is given up, and its slot is free again."""

    body: float = Field(default=30.0, gt=0)
    """Until a request's body must be there."""
    first_token: float = Field(default=60.0, gt=0)
    idle: float = Field(default=60.0, gt=0)
    """Between two tokens."""
    total: float = Field(default=600.0, gt=0)
    keep_alive: float = Field(default=15.0, gt=0)
    """A stream in which nothing happened for so long gets a comment, so that nobody in between closes it."""
    drain: float = Field(default=60.0, ge=0)
    """What replicas that are stopped are given to finish their answers."""


class RateSettings(_Section):
    """What one key may ask for. In memory they hold for each ingress replica; with Redis for all together."""

    requests: str = Field(default="600/minute", pattern=r"^\d+\s*/\s*(second|minute|hour|day)$")
    concurrent: int = Field(default=64, ge=1)
    """Requests of one key that are answered at a time, for each ingress replica."""
    storage: str = Field(default="memory://", pattern=r"^(memory://|rediss?://.+)$")


class KeyEntry(_Section):
    """A key, as it is kept: by its hash."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[_Scope, ...] = ("chat",)


class SecuritySettings(_Section):
    """Who may ask. Without any key nobody may, unless `open` says so."""

    keys_file: Path | None = None
    """JSON, `{"keys": [KeyEntry, ...]}`; read again when it changes: keys rotate without a restart."""
    keys: tuple[KeyEntry, ...] = ()
    """Beside those of the file and of the environment variable STATESET_RAY_API_KEYS."""
    open: bool = False
    """Let anyone chat who reaches the port by a loopback name. Never on a network."""
    tls_cert: Path | None = None
    """A file with the certificate (and its chain), on every node: the endpoint speaks HTTPS only."""
    tls_key: Path | None = None
    """Its private key, without a password."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both")
        return self


class PolicySettings(_Section):
    """The replicas that hold the model."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What answers: plain transformers, on any machine; or vLLM (extra `vllm`), for GPUs."""
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    slots: int = Field(default=16, ge=1)
    """Conversations whose cache one replica keeps, and replies that it samples at a time."""
    ongoing: int = Field(default=32, ge=1)
    """Requests that one replica takes; those above `slots` wait in it for a slot."""
    queued: int = Field(default=64, ge=1)
    """Requests that wait in each ingress replica for a policy replica with room; more are answered 429."""
    max_context: int = Field(default=0, ge=0)
    """Tokens of a conversation; 0: `rollout.max_context` of the run."""
    max_reply_tokens: int = Field(default=0, ge=0)
    """Tokens that a request may ask for, and gets if it names no limit; 0: what the context has room for."""
    remembered: int = Field(default=1024, ge=0)
    """Conversations whose token ids a replica keeps, so that they go on with the ids that were sampled."""
    surge: int = Field(default=0, ge=0, le=100)
    """Percent of the replicas that may be there besides while an update replaces them. With 0 some stop
    first, so that there are fewer meanwhile; more than 0 needs room, and waits for it."""
    threads: int = Field(default=0, ge=0)
    """Torch threads of a replica; 0: the machine's cores, shared among the replicas."""


class SwapSettings(_Section):
    """How newer checkpoints of the run are taken over."""

    poll_seconds: float = Field(default=5.0, ge=0)
    """How often the run's folder is looked at; 0: the first checkpoint stays."""
    probe: str = Field(default="Hello", min_length=1)
    """What a new checkpoint must answer with finite probabilities before it may answer anyone."""
    canary_failures: int = Field(default=3, ge=1)
    """Answers in which a canary may fail in a replica before it answers nobody there."""


class TranscriptSettings(_Section):
    """A sample of the conversations that were served, written into a folder. Off while there is none."""

    folder: Path | None = None
    share: float = Field(default=0.01, gt=0, le=1)
    """Of the conversations."""
    redact: bool = True
    """Keep personal data out; keys are kept out in any case."""
    file_bytes: int = Field(default=64 << 20, ge=1024)
    files: int = Field(default=16, ge=1)
    """That are kept, of all ingress replicas that write into this folder."""


class AutoscalingSettings(_Section):
    """Replicas by load. Off while `max_replicas` is 0."""

    min_replicas: int = Field(default=1, ge=0)
    """0: where nobody asks for `downscale_delay` seconds there is none; the next request waits for one."""
    max_replicas: int = Field(default=0, ge=0)
    target_tokens: float = Field(default=2048.0, gt=0)
    """Tokens, queued and still to sample, that one replica should have before it."""
    upscale_delay: float = Field(default=10.0, ge=0)
    downscale_delay: float = Field(default=300.0, ge=0)
    interval: float = Field(default=2.0, gt=0)
    """Seconds between two looks."""

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.max_replicas and self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas = {self.min_replicas} is more than max_replicas = {self.max_replicas}"
            )
        return self


class AgentSettings(_Section):
    """The policy with the tools of the environment that it was trained in (`/v1/agent/chat/completions`)."""

    enabled: bool = False
    tools: tuple[str, ...] = ()
    """The tools that it may call; empty: all that the environment offers."""
    task: int = Field(default=0, ge=0)
    """The held-out task whose world the tools work on, where the environment makes its worlds up."""
    turns: int = Field(default=8, ge=1)
    """Replies to one request: calls, and the answer."""
    reply_tokens: int = Field(default=0, ge=0)
    """Tokens of each reply, if the request names no limit; 0: `rollout.max_turn_tokens` of the run."""
    seconds: float = Field(default=120.0, gt=0)
    """For one request, all its replies and tools together; after it nothing is begun."""
    tool_seconds: float = Field(default=10.0, gt=0)
    """For one call of a tool."""
    tools_at_once: int = Field(default=16, ge=1)
    """Plain (not `async`) tools that run at a time in each ingress replica; more wait, within their time."""
    result_chars: int = Field(default=4000, ge=1)
    """What the policy is told of a longer result is its beginning."""
    audit_file: Path | None = None
    """Every call is a JSON line in the log; and in this file as well."""
    audit_arguments: bool = True
    """Write what tools were called with, redacted; or only the names of it."""

    @field_validator("audit_file")
    @classmethod
    def _absolute(cls, file: Path | None) -> Path | None:
        if file is not None and not file.is_absolute():
            raise ValueError("name an absolute path: replicas work in folders of their own")
        return file


class ConversationSettings(_Section):
    """Conversations that the server keeps (`/v1/conversations`). Off while `store` is empty."""

    store: str = Field(default="", pattern=r"^(|sqlite:////.+|rediss?://.+)$")
    """`sqlite:////absolute/path` for one machine, `redis://HOST:PORT/0` for several (extra `redis`)."""
    per_key: int = Field(default=1000, ge=1)
    """Conversations of one key; more are refused."""
    items: int = Field(default=256, ge=1)
    """Messages of one conversation."""
    chars: int = Field(default=500_000, ge=1)
    """Characters of one conversation."""
    idle_days: float = Field(default=30.0, gt=0)
    """A conversation that was not used for so long is removed."""


class ServeSettings(_Section):
    """All of an endpoint.

    Attributes:
        source: a run's folder (newer checkpoints are taken over), one checkpoint, or a model's name.
        model_id: what clients call it; by default the run's or the folder's name.
        temperature: of requests that name none.

    Example:
        >>> ServeSettings(source="runs/shop/checkpoints/step-00000012").name
        'shop'
    """

    source: str = Field(min_length=1)
    model_id: str = Field(default="", pattern=r"^[A-Za-z0-9._/-]{0,128}$")
    temperature: float = Field(default=1.0, ge=0, le=2)
    ingress_replicas: int = Field(default=2, ge=1)
    ingress_ongoing: int = Field(default=256, ge=1)
    retries: int = Field(default=3, ge=0)
    """How often a request is sent again whose replica died before its first token."""
    redact: bool = True
    """Keep personal data and keys out of log lines."""
    page: bool = True
    """A page to chat with the policy in a browser, at `/`."""
    policy: PolicySettings = PolicySettings()
    limits: LimitSettings = LimitSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    rates: RateSettings = RateSettings()
    security: SecuritySettings = SecuritySettings()
    swap: SwapSettings = SwapSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    transcripts: TranscriptSettings = TranscriptSettings()
    agent: AgentSettings = AgentSettings()
    conversations: ConversationSettings = ConversationSettings()

    @property
    def name(self) -> str:
        """The model's id."""
        if self.model_id:
            return self.model_id
        path = Path(self.source)
        if re.fullmatch(r"step-\d+", path.name) and path.parent.name == "checkpoints":
            path = path.parent.parent
        elif path.name == "checkpoints":
            path = path.parent
        return re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-")[:128] or "policy"

    @property
    def may_sleep(self) -> bool:
        """Whether there may be no policy replica at all."""
        return self.autoscaling.max_replicas > 0 and self.autoscaling.min_replicas == 0

    @property
    def most_replicas(self) -> int:
        """Policy replicas that there may be."""
        return max(self.policy.replicas, self.autoscaling.max_replicas)
