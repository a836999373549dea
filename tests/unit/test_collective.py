"""Weights by broadcast, in one process: all at once, who comes late, who comes back, and who falls silent."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from stateset_ray.actors.publishing.collective import CollectiveReceiver, CollectiveSender, Meeting
from stateset_ray.actors.publishing.group import BroadcastGroup
from stateset_ray.config import Config, load_config
from stateset_ray.errors import InfrastructureFault
from stateset_ray.policies.flat_weights import FlatWeights, places

pytestmark = pytest.mark.timeout(60)

SHAPES = {"a": (700, 500), "b": (3,), "c": (400_000,)}  # 3 MB: several pieces of 1 MiB


@pytest.fixture
def made() -> Iterator[list[Any]]:
    """Senders and receivers of a test, which are closed after it."""
    both: list[Any] = []
    yield both
    for one in both:
        one.close()


@pytest.fixture
def new_sender(made: list[Any]) -> Callable[..., CollectiveSender]:
    def make(engines: int, timeout: float = 20.0) -> CollectiveSender:
        made.append(CollectiveSender(config(engines, timeout)))
        return made[-1]

    return make


@pytest.fixture
def new_receiver(made: list[Any]) -> Callable[..., CollectiveReceiver]:
    def make(timeout: float = 20.0) -> CollectiveReceiver:
        made.append(CollectiveReceiver(config(1, timeout)))
        return made[-1]

    return make


def config(engines: int, timeout: float = 20.0) -> Config:
    return load_config(
        None,
        [
            "publish.transport=collective", f"rollout.engines={engines}", "publish.bucket_mib=1",
            f"publish.timeout={timeout}", "model.device=cpu",
        ],
    )  # fmt: skip


def publish(sender: CollectiveSender, version: int, lineage: int = 0, rank: int = 0) -> Any:
    """The handle of a version whose every number is its version."""
    arrays = {name: np.full(shape, version, np.float32) for name, shape in SHAPES.items()}
    learner = SimpleNamespace(rank=rank, export_weights=lambda copy: arrays if rank == 0 else {})
    [handle] = sender.send(learner, version, lineage, "")  # type: ignore[arg-type]
    return handle


async def gather(
    receivers: list[CollectiveReceiver], version: int, handle: Any, lineage: int = 0
) -> list[int]:
    arrived = await asyncio.gather(*[r.fetch(version, lineage, handle) for r in receivers])
    for one in arrived:
        assert {name: tuple(t.shape) for name, t in one.tensors.items()} == SHAPES
        assert all((tensor == one.version).all() for tensor in one.tensors.values())
    return [one.version for one in arrived]


def test_a_version_comes_to_all_engines_in_one_broadcast(new_sender, new_receiver) -> None:
    sender = new_sender(2)
    receivers = [new_receiver() for _ in range(2)]

    async def main() -> list[list[int]]:
        return [await gather(receivers, version, publish(sender, version)) for version in (1, 2, 3)]

    assert asyncio.run(main()) == [[1, 1], [2, 2], [3, 3]]
    assert sender._epoch == 1  # one group for all three


def test_only_rank_0_keeps_weights(new_sender) -> None:
    sender = new_sender(1)
    assert publish(sender, 1, rank=1) is None
    assert sender._weights is None


def test_an_engine_that_comes_back_gets_the_version_alone_and_at_once(new_sender, new_receiver) -> None:
    sender = new_sender(2)
    receivers = [new_receiver() for _ in range(2)]

    async def main() -> list[list[int]]:
        found = [await gather(receivers, 1, publish(sender, 1))]
        receivers[0] = new_receiver()  # as after a restart: it knows nothing
        started = time.monotonic()
        found.append(await gather(receivers[:1], 1, handle_of(sender)))
        assert time.monotonic() - started < 4  # nobody was waited for
        return [*found, await gather(receivers, 2, publish(sender, 2))]

    assert asyncio.run(main()) == [[1, 1], [1], [2, 2]]
    assert sender._epoch == 3


def handle_of(sender: CollectiveSender) -> Meeting:
    return Meeting(sender._address, sender._store.port)


def test_who_asks_late_gets_the_newest(new_sender, new_receiver) -> None:
    sender = new_sender(1)

    async def main() -> list[int]:
        publish(sender, 1)
        return await gather([new_receiver()], 1, publish(sender, 2))

    assert asyncio.run(main()) == [2]


def test_engines_go_on_without_one_that_is_dead(new_sender, new_receiver) -> None:
    """It asks for a seat and never takes it, as if it had died in between: the others do not hang."""
    sender = new_sender(3, timeout=2)
    receivers = [new_receiver(timeout=2) for _ in range(2)]

    async def main() -> list[int]:
        handle = publish(sender, 1)
        ghost = TCPStore(handle.host, handle.port, is_master=False)
        ghost.append("asks", json.dumps({"member": "ghost", "epoch": 0, "seat": "seat/ghost"}) + "\n")
        return await gather(receivers, 1, handle)

    started = time.monotonic()
    assert asyncio.run(main()) == [1, 1]
    assert time.monotonic() - started < 30


def test_a_learner_that_died_is_an_infrastructure_fault_with_its_address(new_receiver) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=1))
    receiver = new_receiver(timeout=0.5)
    with pytest.raises(InfrastructureFault, match="did not come by broadcast") as caught:
        asyncio.run(receiver.fetch(1, 0, Meeting("127.0.0.1", store.port)))  # nobody answers there
    assert caught.value.given == f"127.0.0.1:{store.port}"


def test_weights_of_another_lineage_are_refused(new_sender, new_receiver) -> None:
    sender = new_sender(1)
    handle = publish(sender, 5, lineage=1)
    with pytest.raises(InfrastructureFault, match="version 5 of lineage 1 came"):
        asyncio.run(new_receiver().fetch(5, 0, handle))


def test_a_fetch_whose_caller_gave_up_disturbs_no_other(new_sender, new_receiver) -> None:
    sender = new_sender(1)
    receiver = new_receiver()

    async def main() -> list[int]:
        first = asyncio.ensure_future(receiver.fetch(1, 0, publish(sender, 1)))
        await asyncio.sleep(0)
        first.cancel()
        return await gather([receiver], 2, publish(sender, 2))

    assert asyncio.run(main()) == [2]


def test_a_member_that_falls_silent_breaks_the_group_within_the_limit() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    laid = places({"a": torch.zeros(1 << 20)})
    groups: dict[int, BroadcastGroup] = {}

    def join(rank: int) -> None:
        mine = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=20))
        groups[rank] = BroadcastGroup(mine, 1, rank, 3, "gloo", "127.0.0.1", timeout=2)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed: list[int] = []

    def take_part(rank: int) -> None:
        try:
            groups[rank].broadcast(FlatWeights(laid), 1 << 18)
        except RuntimeError:
            failed.append(rank)
        groups[rank].close()

    started = time.monotonic()
    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in (0, 1)]  # 2 says nothing
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 20
    assert failed  # the sender, or who depends on the silent one
