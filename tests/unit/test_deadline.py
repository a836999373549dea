"""A limit on what is awaited: it passes, it does not pass, and the work never notices that it was watched."""

import asyncio

import pytest

from stateset_ray.deadline import DeadlinePassed, within

pytestmark = pytest.mark.timeout(20)


async def forever():
    await asyncio.Event().wait()


def test_work_that_does_not_wait_sets_no_timer():
    timers = []

    async def answer():
        return 42

    async def main():
        loop = asyncio.get_running_loop()
        at, loop.call_at = loop.call_at, lambda *a, **k: timers.append(a) or at(*a, **k)
        found = await within(0.0, answer())
        assert not timers
        await within(60.0, asyncio.sleep(0.001))
        return found

    assert asyncio.run(main()) == 42
    assert len(timers) == 2  # the sleep's, and the limit's


def test_a_passed_limit_cancels_the_work_and_says_so():
    ended = []

    async def work():
        try:
            await forever()
        finally:
            ended.append(True)

    with pytest.raises(DeadlinePassed, match=r"longer than 0.01 s"):
        asyncio.run(within(0.01, work()))
    assert ended == [True]


def test_time_before_the_first_wait_counts():
    async def main():
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        async def work():
            end = loop.time() + 0.05
            while loop.time() < end:
                pass
            await done

        await within(0.02, work())

    with pytest.raises(DeadlinePassed):
        asyncio.run(main())


def test_a_timeout_that_the_work_raises_is_its_own():
    async def work(waits):
        await asyncio.sleep(0.001 if waits else 0)
        raise TimeoutError("the database is away")

    for waits in (False, True):
        with pytest.raises(TimeoutError, match="the database is away") as caught:
            asyncio.run(within(5, work(waits)))
        assert not isinstance(caught.value, DeadlinePassed)


def test_of_two_limits_the_one_that_passes_speaks():
    async def nested(outer, inner):
        await within(outer, within(inner, forever()))

    with pytest.raises(DeadlinePassed, match=r"longer than 0.01 s"):
        asyncio.run(nested(5, 0.01))
    with pytest.raises(DeadlinePassed, match=r"longer than 0.02 s"):
        asyncio.run(nested(0.02, 5))


def test_a_cancellation_reaches_the_work_which_may_finish_its_own_way():
    async def main():
        begun, seen = asyncio.Event(), []

        async def work():
            try:
                begun.set()
                await forever()
            except asyncio.CancelledError:
                await asyncio.sleep(0)  # waits again while it ends
                seen.append("cancelled")
                raise

        task = asyncio.create_task(within(60, work()), name="work")
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen

    assert asyncio.run(main()) == ["cancelled"]


def test_what_is_sent_between_waits_arrives():
    async def main():
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()

        async def work():
            return [await first, await asyncio.wait_for(second, 5), await asyncio.to_thread(lambda: 3)]

        loop.call_soon(first.set_result, 1)
        loop.call_later(0.001, second.set_result, 2)
        return await within(10, work())

    assert asyncio.run(main()) == [1, 2, 3]
