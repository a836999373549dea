"""A proxy is looked up once, and again when it was started again."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import StreamingHTTPRequest

from stateset_ray.serving import proxies
from stateset_ray.serving.proxies import Proxies, remember_proxies


class Proxy:
    def __init__(self, life):
        self.life, self.dead, self.made = life, False, 0

    @property
    def receive_asgi_messages(self):
        self.made += 1
        return self

    async def remote(self, metadata):
        if self.dead:
            raise ActorDiedError
        return f"{metadata} from life {self.life}".encode()


class Found:
    """The GCS: each look-up is counted."""

    def __init__(self):
        self.asked = []
        self.proxy = Proxy(1)

    def __call__(self, name):
        self.asked.append(name)
        if self.proxy is None:
            raise ValueError("no such actor")
        return self.proxy


def test_a_proxy_is_looked_up_once():
    found = Found()
    known = Proxies(found)
    for number in range(5):
        assert asyncio.run(known.receiving("p")(number)) == f"{number} from life 1".encode()
    assert found.proxy.made == 1, "its method too"
    asyncio.run(known.receiving("q")(0))
    assert found.asked == ["p", "q"]


def test_a_proxy_that_was_started_again_is_looked_up_again():
    found = Found()
    known = Proxies(found)
    receive = known.receiving("p")
    assert asyncio.run(receive(1)) == b"1 from life 1"
    found.proxy.dead, found.proxy = True, Proxy(2)
    assert asyncio.run(receive(2)) == b"2 from life 2"
    assert asyncio.run(known.receiving("p")(3)) == b"3 from life 2"
    assert found.asked == ["p", "p"]


def test_a_proxy_that_is_gone_is_an_error_and_not_a_wait():
    found = Found()
    receive = Proxies(found).receiving("p")
    found.proxy.dead = True
    with pytest.raises(ActorDiedError):
        asyncio.run(receive(1))
    found.proxy = None
    with pytest.raises(ValueError, match="no such actor"):
        Proxies(found).receiving("p")


def test_serves_requests_find_their_proxy_there(monkeypatch):
    found = Found()
    monkeypatch.setattr(StreamingHTTPRequest, "receive_asgi_messages", None)  # and back afterwards
    monkeypatch.setattr(proxies.ray, "get_actor", lambda name, namespace: found(f"{namespace}/{name}"))
    remember_proxies()
    for number in range(3):  # each request is unpickled, as in a replica
        request = pickle.loads(pickle.dumps(StreamingHTTPRequest({}, proxy_actor_name="p")))
        assert asyncio.run(request.receive_asgi_messages(number)) == f"{number} from life 1".encode()
    assert found.asked == ["serve/p"]
    own = StreamingHTTPRequest({}, receive_asgi_messages=str)
    assert own.receive_asgi_messages is str
