"""Keys, rates and redaction."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.errors import ConfigError
from stateset_ray.serving.faults import ApiError
from stateset_ray.serving.rates import Rates
from stateset_ray.serving.redaction import RedactingFilter, redact
from stateset_ray.serving.security import ENVIRONMENT, KeyRing, add_key, digest, is_loopback, with_password
from stateset_ray.serving.settings import KeyEntry, RateSettings, SecuritySettings

LONG = "k" * 32


def refused(ring: KeyRing, authorization: str | None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ring.caller(authorization)
    assert LONG not in caught.value.message
    return caught.value


def test_without_keys_nobody_is_let_in():
    with pytest.raises(ConfigError, match="no API key"):
        KeyRing(SecuritySettings(), {})
    assert KeyRing(SecuritySettings(open=True), {}).caller(None).scopes == {"chat", "agent"}


def test_a_key_closes_what_was_open():
    ring = KeyRing(SecuritySettings(open=True), {ENVIRONMENT: LONG})
    assert not ring.open
    assert refused(ring, None).code == "missing_api_key"


def test_the_first_key_of_a_file_closes_what_was_open(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text('{"keys": []}')
    path.chmod(0o600)
    ring = KeyRing(SecuritySettings(open=True, keys_file=path), {})
    assert ring.caller(None).name == "anonymous"
    key = add_key(path, "shop")
    assert refused(ring, None).code == "missing_api_key"
    assert ring.caller(f"Bearer {key}").name == "shop"
    path.write_text('{"keys": []} ')
    assert refused(ring, None).code == "missing_api_key"


def test_keys_of_the_environment():
    ring = KeyRing(SecuritySettings(), {ENVIRONMENT: f" {LONG} ,{LONG}2,"})
    for key in (LONG, f"{LONG}2"):
        caller = ring.caller(f"Bearer {key}")
        assert caller.scopes == {"chat"}
        assert key not in repr(caller)
    assert ring.caller(f"bearer {LONG}").name == f"env-{digest(LONG)[:8]}"
    for wrong in (f"Bearer {LONG}3", f"Basic {LONG}", LONG, "Bearer ", "", None, "Bearer \ud800"):
        assert refused(ring, wrong).status == 401
    with pytest.raises(ConfigError, match="fewer than"):
        KeyRing(SecuritySettings(), {ENVIRONMENT: "short"})


def test_every_key_is_compared(monkeypatch):
    """Whichever matches: how long it takes must not tell."""
    import stateset_ray.serving.security as module

    seen = []
    compare = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: seen.append(a) or compare(a, b))
    keys = tuple(KeyEntry(name=f"k{i}", sha256=digest(f"{LONG}{i}")) for i in range(5))
    assert KeyRing(SecuritySettings(keys=keys), {}).caller(f"Bearer {LONG}0").name == "k0"
    assert len(seen) == 5


def test_a_file_of_keys_rotates_without_a_restart(tmp_path):
    path = tmp_path / "keys.json"
    first = add_key(path, "shop")
    assert path.stat().st_mode & 0o077 == 0
    assert first not in path.read_text()
    ring = KeyRing(SecuritySettings(keys_file=path), {})
    assert ring.caller(f"Bearer {first}").name == "shop"
    second = add_key(path, "boss", admin=True)
    assert ring.caller(f"Bearer {second}").scopes == {"chat", "admin"}
    assert ring.caller(f"Bearer {first}").scopes == {"chat"}
    with pytest.raises(ApiError) as caught:
        ring.caller(f"Bearer {first}").need("admin")
    assert caught.value.status == 403
    body = json.loads(path.read_text())
    path.write_text(json.dumps({"keys": body["keys"][1:]}))
    assert refused(ring, f"Bearer {first}").code == "invalid_api_key"
    path.write_text("{broken")
    assert ring.caller(f"Bearer {second}").name == "boss"  # a bad edit locks nobody out


def test_a_file_of_keys_whose_mode_was_mended_is_taken_over(tmp_path):
    path = tmp_path / "keys.json"
    revoked = add_key(path, "shop")
    ring = KeyRing(SecuritySettings(keys_file=path), {})
    path.chmod(0o664)
    path.write_text('{"keys": []}')
    assert ring.caller(f"Bearer {revoked}").name == "shop"
    path.chmod(0o600)  # which changes neither its time nor its size
    assert refused(ring, f"Bearer {revoked}").code == "invalid_api_key"


def test_a_file_of_keys_that_could_not_be_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    revoked = add_key(path, "shop")
    ring = KeyRing(SecuritySettings(keys_file=path), {})
    path.write_text('{"keys": []}')
    read, times = Path.read_bytes, []

    def failing(file):
        times.append(file)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", failing)
    for _ in range(3):
        assert ring.caller(f"Bearer {revoked}").name == "shop"
    assert len(times) == 1, "not at each request"
    monkeypatch.setattr(Path, "read_bytes", read)
    ring._again = time.monotonic()
    assert refused(ring, f"Bearer {revoked}").code == "invalid_api_key"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "wrong"),
        ('{"keys": [{"name": "a", "sha256": "x"}]}', "keys.0.sha256"),
        ('{"kyes": []}', "kyes"),
        ('{"keys": [{"name": "a", "sha256": "%s", "scopes": ["root"]}]}' % ("0" * 64), "scopes"),
        ('{"keys": [%s, %s]}' % ((f'{{"name": "a", "sha256": "{"0" * 64}"}}',) * 2), "twice"),
    ],
)  # fmt: skip
def test_a_bad_file_of_keys_is_refused(tmp_path, content, problem):
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=problem):
        KeyRing(SecuritySettings(keys_file=path), {})


def test_a_file_that_others_can_write_is_refused(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, "a")
    os.chmod(path, 0o620)
    with pytest.raises(ConfigError, match="written by others"):
        KeyRing(SecuritySettings(keys_file=path), {})
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="of this name"):
        add_key(path, "a")
    with pytest.raises(ConfigError, match="name may hold"):
        add_key(path, "../b")


def test_a_password_of_redis_comes_from_the_environment():
    given = {"STATESET_RAY_REDIS_PASSWORD": "p@/:"}
    assert with_password("redis://h:6379/0", given) == "redis://:p%40%2F%3A@h:6379/0"
    assert with_password("rediss://me@h/0", given) == "rediss://me:p%40%2F%3A@h/0"
    for url in ("redis://:own@h/0", "memory://", "sqlite:////kept.db"):
        assert with_password(url, given) == url
    assert with_password("redis://h/0", {}) == "redis://h/0"


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "", "10.0.0.1", "localhost.a.example", "127.0.0.1.a.example"))
    )


def test_rates_keep_callers_apart():
    async def play():
        rates = Rates(RateSettings(requests="2/minute"))
        await rates.count("a")
        await rates.count("a")
        await rates.count("b")
        with pytest.raises(ApiError) as caught:
            await rates.count("a")
        assert (caught.value.status, caught.value.code) == (429, "rate_limited")
        assert 1 <= int(caught.value.headers()["retry-after"]) <= 120

    asyncio.run(play())


def test_places_are_given_back():
    rates = Rates(RateSettings(concurrent=1))
    with (
        rates.running("a"), rates.running("b"), pytest.raises(ApiError, match="too_many_requests"),
        rates.running("a"),
    ):  # fmt: skip
        pass
    with pytest.raises(RuntimeError), rates.running("a"):
        raise RuntimeError
    with rates.running("a"):
        pass


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("jo.doe+x@mail.shop.example!", "[email]!"),
        ("card 4111-1111-1111-1111.", "card [card]."),
        ("no card 4111 1111 1111 1112", "no card 4111 1111 1111 1112"),
        ("call +49 30 1234567 now", "call [phone] now"),
        ("POST /v1/x 200 4223.7ms", "POST /v1/x 200 4223.7ms"),
        ("order 48213 of 2026", "order 48213 of 2026"),
        ("sk-ssr-AbCdEf0123456789", "[key]"),
        ("Authorization: Bearer abc.def-ghi_jkl", "Authorization: [key]"),
        ("took 0.123456789 s", "took 0.123456789 s"),
    ],
)
def test_redaction(text, clean):
    assert redact(text) == clean


@given(st.from_regex(r"[a-z]{1,10}@[a-z]{1,10}\.(com|de|example)", fullmatch=True), st.text(), st.text())
def test_no_address_gets_through(address, before, after):
    assert address not in redact(f"{before} {address} {after}")


def test_a_record_and_its_traceback_are_redacted():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.Logger("redacted")
    log.addFilter(RedactingFilter())
    log.addHandler(handler)
    log.info("%s wrote", "jo@shop.example")
    try:
        raise ValueError("jo@shop.example")
    except ValueError:
        log.exception("failed")
    assert stream.getvalue().startswith("[email] wrote\nfailed\nTraceback")
    assert stream.getvalue().endswith("ValueError: [email]\n")
