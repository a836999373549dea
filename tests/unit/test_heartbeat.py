"""Who is asked whether it is alive, who is told to have missed it, and who has time to come back."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from stateset_ray.actors import heartbeat as module
from stateset_ray.actors.heartbeat import Heartbeat
from stateset_ray.actors.inference_pool import InferencePool
from stateset_ray.config import load_config

LIMIT = 8.0


class Answer:
    """Stands for a reference."""

    def __init__(self) -> None:
        self.came = False
        self.error: Exception | None = None


class Actor:
    """Is asked, and answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Answer] = []
        self.patiently = 0
        self.ready = SimpleNamespace(remote=self._remote, options=self._options)

    def _remote(self) -> Answer:
        self.asked.append(Answer())
        return self.asked[-1]

    def _options(self, max_task_retries: int) -> Any:
        assert max_task_retries == -1  # also after a restart
        self.patiently += 1
        return SimpleNamespace(remote=self._remote)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test moves; Ray's looks at references are looks at `Answer`s."""
    clock = SimpleNamespace(seconds=1000.0, killed=[])

    def get(answer: Answer, timeout: float) -> None:
        if answer.error:
            raise answer.error

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([ref for ref in refs if ref.came], []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: clock.killed.append((actor, no_restart)))
    return clock


def test_who_answers_is_asked_again_four_times_within_the_limit(now: SimpleNamespace) -> None:
    actor, heart = Actor(), Heartbeat()
    for _ in range(80):
        assert not heart.missed(actor, LIMIT)
        actor.asked[-1].came = True
        now.seconds += LIMIT / 8 + 0.01
    assert 38 <= len(actor.asked) <= 41
    assert not actor.patiently


def test_who_is_silent_has_missed_it_once_and_then_all_the_time_it_needs(now: SimpleNamespace) -> None:
    actor, heart = Actor(), Heartbeat()
    missed = []
    for _ in range(100):
        missed.append(heart.missed(actor, LIMIT))
        now.seconds += 1.0
    assert missed.index(True) == 9  # the first whole second beyond the limit
    assert missed.count(True) == 1  # it is loading a model meanwhile
    assert actor.patiently == 1
    actor.asked[-1].came = True  # it is back, and falls silent again
    assert [heart.missed(actor, LIMIT) for _ in range(3)] == [False] * 3
    now.seconds += LIMIT + 1
    assert heart.missed(actor, LIMIT)


def test_whose_answer_came_while_nobody_looked_has_missed_nothing(now: SimpleNamespace) -> None:
    actor, heart = Actor(), Heartbeat()
    heart.missed(actor, LIMIT)
    actor.asked[-1].came = True
    now.seconds += 100 * LIMIT  # the controller was busy with a checkpoint, say
    assert not heart.missed(actor, LIMIT)


def test_who_died_has_all_the_time_it_needs_to_come_back(now: SimpleNamespace) -> None:
    actor, heart = Actor(), Heartbeat()
    heart.missed(actor, LIMIT)
    actor.asked[-1].came, actor.asked[-1].error = True, RayActorError()
    now.seconds += LIMIT
    assert not heart.missed(actor, LIMIT)
    assert actor.patiently == 1
    now.seconds += 100 * LIMIT
    assert not heart.missed(actor, LIMIT)


def test_a_silent_engine_is_killed_and_the_others_are_not(now: SimpleNamespace) -> None:
    engines = [Actor(), Actor(), Actor()]
    pool = InferencePool(load_config(None, [f"rollout.heartbeat_timeout={LIMIT}"]), engines)
    for _ in range(40):
        pool.beat()
        for engine in (engines[0], engines[2]):
            engine.asked[-1].came = True
        now.seconds += 1.0
    assert now.killed == [(engines[1], False)]
