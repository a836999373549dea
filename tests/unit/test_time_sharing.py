"""Engines that fall asleep for the learner, without Ray: futures stand for its answers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from stateset_ray.actors import time_sharing
from stateset_ray.errors import WaitTimeout


def answers(refs: Sequence[Future[None]], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
    wait(refs, timeout=timeout, return_when=FIRST_EXCEPTION)
    return [ref for ref in refs if ref.done()], [ref for ref in refs if not ref.done()]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Future[None]]:
    calls = SimpleNamespace(wait=answers, get=lambda ref, timeout: ref.result(timeout))
    monkeypatch.setattr(time_sharing, "ray", calls)
    monkeypatch.setattr(time_sharing, "_SLICE", 0.01)
    return [Future(), Future()]


def asked(engines: list[Future[None]]) -> list[Any]:
    return [SimpleNamespace(sleep=SimpleNamespace(remote=lambda f=f: f)) for f in engines]


def test_an_engine_that_is_stopped_is_restarted_and_holds_up_nothing(engines: list[Future[None]]) -> None:
    engines[0].set_result(None)
    beats = []

    def beat() -> None:
        beats.append(1)
        if len(beats) == 3:  # it has been silent for too long: it is killed
            engines[1].set_exception(RayActorError())

    time_sharing.fall_asleep(asked(engines), 60, beat)
    assert len(beats) == 3


def test_an_engine_that_lives_and_does_not_end_its_turns_is_not_waited_for_for_ever(
    engines: list[Future[None]],
) -> None:
    with pytest.raises(WaitTimeout, match="2 of 2 engines did not fall asleep"):
        time_sharing.fall_asleep(asked(engines), 0.05, lambda: None)
