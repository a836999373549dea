"""Who may ask: API keys, kept as hashes, compared in constant time, exchanged without a restart.

A key is 32 random bytes, so its plain SHA-256 gives nothing away. Keys come from three places: the settings,
a file that is read again when it changes, and the environment variable `STATESET_RAY_API_KEYS` (a
comma-separated list of keys with the scope `chat`). Where there is none at all, nobody is let in, unless
`open` says so.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import ssl
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from stateset_ray.errors import ConfigError
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.settings import KeyEntry, SecuritySettings

__all__ = [
    "ENVIRONMENT", "REDIS_PASSWORD", "Caller", "KeyRing", "add_key", "check_haproxy", "check_tls", "digest",
    "entries", "is_loopback", "with_password",
]  # fmt: skip

ENVIRONMENT = "STATESET_RAY_API_KEYS"
"""The environment variable with keys of the scope `chat`, separated by commas."""
REDIS_PASSWORD = "STATESET_RAY_REDIS_PASSWORD"
"""The environment variable with the password of Redis, on every node: in settings it would stand in files."""

_log = logging.getLogger(__name__)
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_PREFIX = "sk-ssr-"
_AGAIN = 5.0  # seconds after which a file that could not be taken over is read once more
_SHORTEST = 16  # characters of a key from the environment; less can be guessed


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: of the key; it stands in logs and keeps callers apart. Never the key itself.
        scopes: what the key is good for.
    """

    name: str
    scopes: frozenset[str]

    def need(self, scope: str) -> None:
        """Refuse a caller without this scope.

        Raises:
            ApiError: 403.
        """
        if scope not in self.scopes:
            raise ApiError(403, "scope_missing", f"this key lacks the scope {scope!r}")


class _KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    keys: tuple[KeyEntry, ...] = ()


class KeyRing:
    """All keys that are valid now.

    Args:
        settings: where keys are, and whether anyone may chat.
        environ: where `STATESET_RAY_API_KEYS` is looked up; by default the process's environment.

    Raises:
        ConfigError: the file cannot be read or is writable by others, a key is too short, or there is no
            key at all and the endpoint is not open.
    """

    def __init__(self, settings: SecuritySettings, environ: Mapping[str, str] | None = None) -> None:
        listed = (os.environ if environ is None else environ).get(ENVIRONMENT, "")
        self._file = settings.keys_file
        self._fixed = (*settings.keys, *entries(listed))
        self._stamp = _stamp(self._file) if self._file else None
        self._wrong, self._again = self._stamp, 0.0  # that could not be taken over, and when to try again
        self._keys = self._fixed + (_read(self._file) if self._file else ())
        self.open = settings.open and not self._keys
        if not self._keys and not self.open:
            raise ConfigError(
                "there is no API key, so nobody could use the endpoint",
                mend=f"make one (stateset-ray serve --new-key NAME --keys keys.json), or set {ENVIRONMENT}",
            )

    def caller(self, authorization: str | None) -> Caller:
        """Who sent this Authorization header.

        Raises:
            ApiError: 401.
        """
        self._refresh()
        if self.open:
            return Caller("anonymous", frozenset({"chat", "agent"}))
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise ApiError(401, "missing_api_key", "send an API key: Authorization: Bearer KEY")
        presented, found = digest(key.strip()), None
        for entry in self._keys:  # all of them, whichever matches: time must not tell
            if hmac.compare_digest(entry.sha256, presented):
                found = entry
        if found is None:
            raise ApiError(401, "invalid_api_key", "this API key is not valid")
        return Caller(found.name, frozenset(found.scopes))

    def _refresh(self) -> None:
        """Take over a file that was changed; a file that is wrong changes nothing."""
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp:
            return
        now = time.monotonic()
        if stamp == self._wrong and now < self._again:
            return
        try:
            self._keys = self._fixed + _read(self._file)
        except ConfigError as error:
            # It is read again though it stays as it is: it may have been the disk.
            self._wrong, self._again = stamp, now + _AGAIN
            _log.error("the keys stay as they were: %s", error.problem)
            return
        self._stamp = stamp
        self.open = self.open and not self._keys  # who takes the last key away again has not opened it


def entries(listed: str) -> tuple[KeyEntry, ...]:
    """The keys of a comma-separated list, named by what no one can turn back into them.

    Raises:
        ConfigError: one is too short to be safe.
    """
    keys = [key.strip() for key in listed.split(",") if key.strip()]
    if any(len(key) < _SHORTEST for key in keys):
        raise ConfigError(
            f"{ENVIRONMENT} holds a key of fewer than {_SHORTEST} characters",
            mend="use long random keys: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return tuple(KeyEntry(name=f"env-{digest(key)[:8]}", sha256=digest(key)) for key in keys)


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def add_key(path: Path, name: str, *, admin: bool = False, agent: bool = False) -> str:
    """Make a key and add its hash to a file of keys, which is made if missing (mode 0600).

    Args:
        admin: it may change weights.
        agent: it may let the policy call tools.

    Returns:
        The key, which is kept nowhere.

    Raises:
        ConfigError: the name is taken or not a plain one, or the file cannot be read.
    """
    known = _read(path) if path.exists() else ()
    if any(entry.name == name for entry in known):
        raise ConfigError("there is a key of this name already", given=name, mend="choose another name")
    key = _PREFIX + secrets.token_urlsafe(32)
    try:
        scopes = ("chat", *(["agent"] if agent else []), *(["admin"] if admin else []))
        entry = KeyEntry.model_validate({"name": name, "sha256": digest(key), "scopes": scopes})
    except ValidationError as error:
        raise ConfigError(
            "a key's name may hold letters, digits, '.', '_' and '-'", given=name, mend="choose another name"
        ) from error
    body = {"keys": [e.model_dump(mode="json") for e in (*known, entry)]}
    beside = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    beside.touch(mode=0o600)
    beside.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
    return key


def check_tls(settings: SecuritySettings) -> None:
    """Read the certificate and its key, before Serve does so in a process whose errors nobody sees.

    Raises:
        ConfigError: they cannot be read, do not fit each other, or the key can be read by others.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return
    try:
        if settings.tls_key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                "the private key of TLS can be read by others", given=str(settings.tls_key),
                mend=f"chmod 600 {settings.tls_key}",
            )  # fmt: skip
        # A password would be asked for at a terminal: an empty one is refused instead.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.tls_cert, settings.tls_key, password=""
        )
    except (OSError, ValueError) as error:  # ssl's errors are OSErrors
        raise ConfigError(
            f"the certificate of TLS and its key cannot be used: {error}", given=str(settings.tls_cert)
        ) from error


def check_haproxy(settings: SecuritySettings, host: str) -> None:
    """Refuse what an endpoint behind Serve's HAProxy could not answer, where this process's environment asks
    for HAProxy: it would come up, and find none of its ingress replicas.

    Args:
        host: the address that the endpoint listens on; its ingress replicas listen there, too.

    Raises:
        ConfigError: TLS, or an address at which HAProxy does not look for replicas.
    """
    if os.environ.get(_HAPROXY) != "1":
        return
    if settings.tls_cert is not None:
        raise ConfigError(
            "Serve's HAProxy speaks no TLS", given=f"security.tls_cert and {_HAPROXY}=1",
            mend=f"let what stands before it speak TLS, or unset {_HAPROXY}",
        )  # fmt: skip
    if not (is_loopback(host) or host in ("0.0.0.0", "::")):
        raise ConfigError(
            "Serve's HAProxy finds ingress replicas that listen on loopback or on all addresses only",
            given=host, mend=f"give --host 0.0.0.0, or unset {_HAPROXY}",
        )  # fmt: skip


def with_password(url: str, environ: Mapping[str, str] | None = None) -> str:
    """The URL of a Redis, with the password of the environment where it has none of its own.

    Example:
        >>> with_password("redis://10.0.0.5:6379/0", {"STATESET_RAY_REDIS_PASSWORD": "a/b"})
        'redis://:a%2Fb@10.0.0.5:6379/0'
    """
    password = (os.environ if environ is None else environ).get(REDIS_PASSWORD, "")
    parts = urlsplit(url)
    if not password or parts.scheme not in ("redis", "rediss") or parts.password is not None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this address, or by this name.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    # Also when its mode or owner was changed: who could write it is looked at, too.
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


def _read(path: Path) -> tuple[KeyEntry, ...]:
    try:
        if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                "the file of keys can be written by others", given=str(path), mend=f"chmod 600 {path}"
            )
        found = _KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"the file of keys cannot be read: {error.strerror}", given=str(path)) from error
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_input=False)[0]["loc"])) or "the file"
        raise ConfigError(
            f"the file of keys is wrong at {where}",
            given=str(path),
            mend='it must look like {"keys": [{"name": "shop", "sha256": "...", "scopes": ["chat"]}]}',
        ) from error
    if len({entry.name for entry in found}) != len(found):
        raise ConfigError("the file of keys holds a name twice", given=str(path))
    return found
