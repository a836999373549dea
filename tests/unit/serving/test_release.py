"""Which checkpoints of a run answer: the files in its folder, and who may change them."""

from __future__ import annotations

import asyncio
import runpy
import shutil
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stateset_ray.cli import app
from stateset_ray.errors import CheckpointError, ConfigError
from stateset_ray.serving import release
from stateset_ray.serving.gate import Gate
from stateset_ray.serving.rates import Rates
from stateset_ray.serving.routes import routes
from stateset_ray.serving.security import KeyRing, digest
from stateset_ray.serving.settings import KeyEntry, SecuritySettings, ServeSettings
from stateset_ray.serving.source import Source

support = runpy.run_path(str(Path(__file__).with_name("support_checkpoints.py")))
save = support["save"]
ONE, TWO, THREE, FOUR = (f"step-0000000{step}" for step in range(1, 5))


@pytest.fixture
def released(run):
    """A run with three checkpoints."""
    save(run, 2)
    save(run, 3)
    return run


def test_a_canary_holds_its_run_and_is_promoted(released):
    release.pin(released, ONE)
    assert release.start_canary(released, THREE, 0.25) == ONE
    source = Source(str(released))
    candidate, share = source.canary()
    assert (candidate.step, share, source.wanted().step) == (3, 0.25, 1)
    assert release.start_canary(released, THREE, 0.5) == ONE  # another share
    assert source.canary()[1] == 0.5
    assert release.promote(released) == THREE
    assert source.wanted().step == 3
    assert source.canary() is None
    save(released, 4)
    assert source.wanted().step == 3  # still held
    assert release.rollback(released) == ONE
    assert source.wanted().step == 1


def test_a_run_that_follows_its_newest_is_held_by_a_canary(released):
    assert release.start_canary(released, TWO, 0.1) == THREE
    save(released, 4)
    source = Source(str(released))
    assert (source.wanted().step, source.canary()[0].step) == (3, 2)
    assert release.rollback(released) == THREE  # the canary ends, nobody else notices
    assert (source.wanted().step, source.canary()) == (3, None)


def test_the_way_back(released):
    release.pin(released, TWO)
    release.pin(released, ONE)
    assert [release.rollback(released) for _ in range(2)] == [TWO, THREE]
    release.pin(released, None)
    save(released, 4)
    assert release.rollback(released) == THREE  # nothing is known of before: the one before the newest
    release.pin(released, ONE)
    shutil.rmtree(released / "checkpoints" / THREE)
    with pytest.raises(ConfigError, match="no version to go back to"):
        release.rollback(released)
    assert release.pinned(released) == ONE


def test_a_pin_ends_a_canary(released):
    release.pin(released, ONE)
    release.start_canary(released, THREE, 0.1)
    release.pin(released, None)
    assert (Source(str(released)).canary(), Source(str(released)).wanted().step) == (None, 3)


def test_what_cannot_be_a_canary_changes_nothing(released):
    for share in (0.0, 1.0, -1.0, 2.0, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            release.start_canary(released, TWO, share)
    with pytest.raises(ConfigError, match="everybody already"):
        release.start_canary(released, THREE, 0.1)
    for name in ("../../etc", "/etc", "step-2", f"{TWO}/..", f"{TWO} 0.9", f"{TWO}\n", "", "latest", "..%2f"):
        with pytest.raises(ConfigError):
            release.start_canary(released, name, 0.1)
    with (released / "checkpoints" / TWO / "model.safetensors").open("ab") as file:
        file.write(b"x")
    for name in (TWO, FOUR):
        with pytest.raises(CheckpointError):
            release.start_canary(released, name, 0.1)
    with pytest.raises(ConfigError, match="no canary"):
        release.promote(released)
    assert not list(released.glob("serve-*"))


@pytest.mark.parametrize("text", ["", "../x 0.1", f"{TWO}", f"{TWO} 7", f"{TWO} nan", f"{TWO} x", "\xff"])
def test_a_damaged_canary_is_said_and_ended(released, text):
    (released / "serve-canary").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="canary"):
        Source(str(released)).canary()
    assert Source(str(released)).wanted().step == 3
    assert release.rollback(released) == THREE
    assert Source(str(released)).canary() is None


@given(st.text(), st.floats(0.01, 0.98), st.floats(0, 0.01))
def test_a_larger_share_keeps_every_conversation_of_a_smaller(key, share, more):
    assert not release.falls_to(TWO, share, key) or release.falls_to(TWO, share + more, key)


def test_the_share_is_what_was_asked_for_and_each_canary_has_others():
    keys = [f"session-{number}" for number in range(4000)]
    chosen = {name: {key for key in keys if release.falls_to(name, 0.2, key)} for name in (TWO, THREE)}
    for found in chosen.values():
        assert 0.17 < len(found) / len(keys) < 0.23  # five standard deviations
    assert len(chosen[TWO] & chosen[THREE]) < 0.08 * len(keys)


def told(*arguments, code=0):
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command(released):
    assert "only a run" in told("tiny", "--canary", TWO, code=2)
    assert "share" in told(released, "--canary", TWO, "--share", "3", code=2)
    assert "choose one" in told(released, "--canary", TWO, "--promote", code=2)
    assert f"{TWO} answers 10.0%" in told(released, "--canary", TWO)
    assert release.tried(released) == (TWO, 0.1)
    assert TWO in told(released, "--promote")
    assert THREE in told(released, "--rollback")
    assert release.pinned(released) == THREE


def test_the_routes(released, meters):
    key, admin = "k" * 32, "a" * 32
    settings = ServeSettings(
        source=str(released),
        security=SecuritySettings(
            keys=(
                KeyEntry(name="shop", sha256=digest(key)),
                KeyEntry(name="boss", sha256=digest(admin), scopes=("admin",)),
            )
        ),
    )
    gate = Gate(
        routes(settings, None, meters),
        KeyRing(settings.security, {}),
        Rates(settings.rates),
        settings,
        meters,
    )

    async def play():
        transport = httpx2.ASGITransport(app=gate)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as web:
            web.headers["authorization"] = f"Bearer {key}"
            for path in ("canary", "promote", "rollback"):
                assert (await web.post(f"/admin/{path}", json={})).status_code == 403
            web.headers["authorization"] = f"Bearer {admin}"
            assert (await web.get("/admin/release")).json() == {
                "checkpoint": THREE, "pinned": False, "canary": None,
            }  # fmt: skip
            for body in ({}, {"checkpoint": TWO}, {"checkpoint": TWO, "share": True}, {"checkpoint": 2}):
                answer = await web.post("/admin/canary", json=body)
                assert answer.json()["error"]["code"] == "invalid_parameter", body
            endless = f"step-{'1' * 300}"  # longer than a name of a file may be
            answer = await web.post("/admin/weights", json={"checkpoint": endless})
            assert answer.json()["error"]["code"] == "invalid_checkpoint"
            wrong = ({"checkpoint": name, "share": 0.1} for name in ("../x", endless))
            for body in (*wrong, {"checkpoint": TWO, "share": 1.5}):
                answer = await web.post("/admin/canary", json=body)
                assert answer.json()["error"]["code"] == "invalid_release"
                assert str(released) not in answer.text
            started = await web.post("/admin/canary", json={"checkpoint": TWO, "share": 0.3})
            assert started.json() == {
                "checkpoint": THREE, "pinned": True, "canary": {"checkpoint": TWO, "share": 0.3},
            }  # fmt: skip
            assert (await web.post("/admin/promote", json={})).json()["checkpoint"] == TWO
            assert (await web.post("/admin/promote", json={})).status_code == 400
            assert (await web.post("/admin/rollback", json={})).json()["checkpoint"] == THREE

    asyncio.run(play())
