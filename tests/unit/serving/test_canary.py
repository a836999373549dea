"""A second version in a replica: who is answered by it, and what its failures change for clients."""

from __future__ import annotations

import asyncio
import runpy
import threading
from pathlib import Path

import pytest

from stateset_ray.errors import InfrastructureFault
from stateset_ray.policies.nucleus import Sampled
from stateset_ray.serving import release
from stateset_ray.serving.dispatch import PolicyLost, answered
from stateset_ray.serving.events import Ask, Began, Ended
from stateset_ray.serving.held_policy import load_policy
from stateset_ray.serving.replica import PolicyReplica
from stateset_ray.serving.settings import PolicySettings, ServeSettings, SwapSettings
from stateset_ray.types import Message

support = runpy.run_path(str(Path(__file__).with_name("support_checkpoints.py")))
save = support["save"]
ONE, TWO = "step-00000001", "step-00000002"


@pytest.fixture
def start(run, meters):
    """A replica of a run that is held at its first checkpoint, with another beside it."""
    release.pin(run, ONE)

    async def started(scale=1.1, share=0.5, poll=0.0, failures=2):
        save(run, 2, scale)
        release.start_canary(run, TWO, share)
        replica = PolicyReplica(
            ServeSettings(
                source=str(run), policy=PolicySettings(slots=4, threads=1),
                swap=SwapSettings(poll_seconds=poll, canary_failures=failures),
            ),
            meters,
        )  # fmt: skip
        await replica.start()
        return replica

    return started


def asked(session="", id="a", **more):
    fields = {"tenant": "t", "messages": (Message("user", "hi"),), "max_tokens": 3, "temperature": 0.0,
              "seed": 1, "stream": True}  # fmt: skip
    return Ask(id=id, session=session, **fields | more)


async def version(replica, ask):
    events = [e async for part in replica.answer(ask) for e in part]
    return next(e.version for e in events if isinstance(e, Began))[: len(ONE)]


def session_of(canary, share=0.5):
    """A conversation that falls to the canary, or one that does not."""
    names = (f"session-{number}" for number in range(1000))
    return next(name for name in names if release.falls_to(TWO, share, name) == canary)


async def reaches(wanted):
    async with asyncio.timeout(30):
        while not await wanted():
            await asyncio.sleep(0.01)


def test_conversations_stay_with_their_version_and_are_counted_by_it(start, recorders):
    async def play():
        replica = await start()
        sessions = [f"session-{number}" for number in range(20)]
        first = {session: await version(replica, asked(session)) for session in sessions}
        assert set(first.values()) == {ONE, TWO}
        for session in sessions:
            assert first[session] == (TWO if release.falls_to(TWO, 0.5, session) else ONE)
            assert await version(replica, asked(session, id="another")) == first[session]
        single = {await version(replica, asked(id=f"r{number}")) for number in range(20)}
        assert single == {ONE, TWO}  # without a name each request is drawn for itself
        status = await replica.status()
        assert status["canary"]["share"] == 0.5
        assert sum(v["answered"] for v in status["versions"].values()) == 60
        for label, role in ((ONE, "stable"), (TWO, "canary")):
            [tally] = [v for k, v in status["versions"].items() if k.startswith(label)]
            assert recorders["version_requests"].counted[(role, "answered")] == tally["answered"] > 10
            assert recorders["version_tokens"].counted[(role,)] == tally["tokens"] == 3 * tally["answered"]
            assert tally["seconds"] > tally["first_token_seconds"] > 0
        assert recorders["canary_step"].values[-1] == 2
        assert recorders["canary_share"].values[-1] == 0.5

    asyncio.run(play())


def test_the_prompts_of_one_request_are_of_one_version(start, meters, endpoint):
    class One:
        """The replica as `Policies`."""

        def __init__(self, replica):
            self.ask, self.status = replica.answer, replica.status

        statuses = None

    async def play():
        policies, seen = One(await start()), set()
        for seed in range(8):
            more = {} if seed % 2 else {"extra_headers": {"x-session-id": str(seed)}}
            gate = endpoint.gate(policies, meters, endpoint.SETTINGS)
            labels = set()
            ask = policies.ask

            async def noted(asked, ask=ask, labels=labels):
                async for events in ask(asked):
                    labels.update(e.version for e in events if isinstance(e, Began))
                    yield events

            policies.ask = noted
            await endpoint.client(gate).completions.create(
                model="tiny", prompt=list("abcdef"), max_tokens=1, **more
            )
            policies.ask = ask
            assert len(labels) == 1
            seen |= labels
        assert len(seen) == 2

    asyncio.run(play())


def test_tokens_of_answers_side_by_side_are_counted_once(start, recorders):
    async def play():
        replica = await start()
        answers = [
            version(replica, asked(f"s{number}", id=f"r{number}", max_tokens=20)) for number in range(6)
        ]
        await asyncio.gather(*answers)
        status = await replica.status()
        assert recorders["sampled_tokens"].counted[()] == status["sampled"] == 6 * 20

    asyncio.run(play())


def test_what_a_session_was_asked_before_is_not_computed_again(start, recorders):
    async def play():
        replica = await start()
        await version(replica, asked("one", id="r1"))
        first, counted = await replica.status(), recorders["read_tokens"].counted[()]
        await version(replica, asked("one", id="r2"))
        again = await replica.status()
        assert again["prompt_tokens"] - first["prompt_tokens"] > 1
        assert again["prefill_tokens"] - first["prefill_tokens"] == 1, "the last token has to be computed"
        assert recorders["read_tokens"].counted[()] - counted == 1

    asyncio.run(play())


def test_a_version_is_loaded_by_a_thread_that_ends(start, monkeypatch):
    """While it lives its OpenMP team does, and answers take a quarter longer."""
    threads = []

    def noted(*args):
        threads.append(threading.current_thread())
        return load_policy(*args)

    monkeypatch.setattr("stateset_ray.serving.replica.load_policy", noted)

    async def play():
        await start()
        for thread in threads:
            await asyncio.to_thread(thread.join, 10)
        assert threads
        assert not any(thread.is_alive() for thread in threads)

    asyncio.run(play())


def test_promoted_without_being_loaded_again_and_taken_back(start, run, monkeypatch):
    async def play():
        replica = await start(poll=0.01)
        tried = replica._canary.held
        ordinary, special = session_of(canary=False), session_of(canary=True)
        stream = replica.answer(asked(ordinary, max_tokens=40))
        (began,) = await anext(stream)
        release.promote(run)

        async def at(step):
            return (await replica.status())["step"] == step

        await reaches(lambda: at(2))
        assert replica._held is tried
        assert (await replica.status())["canary"] is None
        assert await version(replica, asked(ordinary)) == await version(replica, asked(special)) == TWO
        assert began.version.startswith(ONE)
        assert [e async for part in stream for e in part][-1].tokens  # to its end, by what it began with
        assert release.rollback(run) == ONE
        await reaches(lambda: at(1))
        assert await version(replica, asked(special)) == ONE
        replica._watch.cancel()

    asyncio.run(play())


def test_a_canary_comes_and_goes_while_it_answers(start, run):
    async def play():
        replica = await start(poll=0.01)
        special = session_of(canary=True)
        stream = replica.answer(asked(special, max_tokens=40))
        await anext(stream)
        tried = replica._canary.held
        release.rollback(run)

        async def without():
            return (await replica.status())["canary"] is None

        await reaches(without)
        assert await version(replica, asked(special)) == ONE
        assert not tried.engine._task.done()
        assert [e async for part in stream for e in part][-1].tokens
        await reaches(lambda: _done(tried))
        replica._watch.cancel()

    async def _done(held):
        return held.engine._task.done()

    asyncio.run(play())


@pytest.mark.parametrize("wrong", ["nan", "byte"])
def test_a_bad_canary_changes_nothing(start, run, recorders, wrong):
    async def play():
        replica = await start(scale=float("nan") if wrong == "nan" else 1.0, share=0.9)
        if wrong == "byte":
            path = run / "checkpoints" / TWO / "tokenizer.json"
            await replica._end_canary(replica._canary)
            path.write_bytes(path.read_bytes() + b" ")
            await replica._follow_canary()
        status = await replica.status()
        assert (status["step"], status["canary"], status["problem"]) == (1, None, "")
        assert TWO in status["canary_problem"]
        assert {await version(replica, asked(f"s{number}")) for number in range(8)} == {ONE}
        assert recorders["swaps"].counted[("refused",)] == 1
        await replica._follow_canary()
        assert recorders["swaps"].counted[("refused",)] == 1  # not tried again
        assert recorders["canary_step"].values[-1] == -1

    asyncio.run(play())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InfrastructureFault("no finite probabilities"), "no finite probabilities"),
        (ValueError("what a client said"), "ValueError"),
    ],
)
def test_a_canary_that_fails_is_noticed_by_nobody_and_ends(start, recorders, error, told):
    async def play():
        replica = await start(failures=2)
        special = session_of(canary=True)

        async def broken(*_, **__):
            raise error

        replica._canary.held.engine.reply = broken
        for left in (True, False):
            assert await version(replica, asked(special)) == ONE
            assert ((await replica.status())["canary"] is not None) == left
        assert await version(replica, asked(special)) == ONE
        assert recorders["version_requests"].counted[("canary", "failed")] == 2
        status = await replica.status()
        assert told in status["canary_problem"]
        assert "client" not in status["canary_problem"]
        await replica._follow_canary()
        assert (await replica.status())["canary"] is None  # not tried again, as long as it is the canary

    asyncio.run(play())


def test_one_that_was_refused_is_tried_when_it_is_started_again(start, run):
    async def play():
        replica = await start(failures=1)

        async def broken(*_, **__):
            raise InfrastructureFault("no finite probabilities")

        replica._canary.held.engine.reply = broken
        assert await version(replica, asked(session_of(canary=True))) == ONE
        await replica._follow_canary()
        assert replica._canary is None
        release.rollback(run)  # between two looks of the replica
        release.start_canary(run, TWO, 0.5)
        await replica._follow_canary()
        assert await version(replica, asked(session_of(canary=True))) == TWO

    asyncio.run(play())


def test_promoted_between_two_looks_it_is_taken_over_as_it_is(start, run):
    async def play():
        replica = await start()
        tried = replica._canary.held
        release.promote(run)
        await replica._follow_canary()  # the replica had looked at what is stable just before
        assert replica._canary.held is tried
        await replica._follow_stable()
        assert (replica._held, replica._canary) == (tried, None)

    asyncio.run(play())


def test_a_canary_is_ended_before_a_third_version_is_loaded(start, run):
    async def play():
        replica = await start(poll=0.01)
        load, beside = replica._load, []

        async def noted(candidate):
            beside.append(replica._canary)
            return await load(candidate)

        replica._load = noted
        save(run, 3, 0.9)
        release.pin(run, "step-00000003")

        async def there():
            return (await replica.status())["step"] == 3

        await reaches(there)
        assert beside == [None]
        replica._watch.cancel()

    asyncio.run(play())


def test_one_that_breaks_off_is_sent_elsewhere_to_no_canary(start):
    async def play():
        replica = await start()
        special = session_of(canary=True)

        async def breaking(request, notice, **_):
            notice(Sampled(5, -1.0))
            await asyncio.sleep(0)
            raise InfrastructureFault("broken")

        replica._canary.held.engine.reply = breaking
        with pytest.raises(InfrastructureFault):
            await version(replica, asked(special))
        assert await version(replica, asked(special, canary=False)) == ONE

    asyncio.run(play())


def test_a_request_that_is_sent_again_falls_to_no_canary(meters):
    """The canary may be what the replica died of."""
    seen = []

    class Dying:
        async def ask(self, ask):
            seen.append(ask.canary)
            if len(seen) < 3:
                raise PolicyLost
            yield (Began("v", 1), Ended(0, "stop", 1))

    async def play():
        settings = ServeSettings(source="tiny")
        return [events async for events in answered(Dying(), asked(), settings, meters)]

    assert asyncio.run(play())
    assert seen == [True, False, False]
