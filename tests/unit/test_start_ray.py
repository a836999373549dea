"""Ray's own start on a busy machine, and addresses that nobody answers at; without Ray."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import grpc
import pytest
import ray

from stateset_ray.actors import placement
from stateset_ray.actors.address import _speaks_grpc, address_of, check_answers, host_and_port
from stateset_ray.actors.placement import cluster, start_ray
from stateset_ray.config import load_config
from stateset_ray.errors import ClusterError

SLOW = Exception(
    "The current node timed out during startup. This could happen because some of the raylet ..."
)


@pytest.fixture
def starts(monkeypatch):
    """What each start raises, to be filled in; and what it was asked for."""
    outcomes, asked = [], []

    def init(**options):
        asked.append(options)
        if outcomes and (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    return outcomes, asked


def test_a_start_that_took_too_long_is_tried_once_more(starts):
    outcomes, asked = starts
    outcomes[:] = [SLOW, None]
    start_ray(num_cpus=3)
    assert asked == [{"address": "local", "num_cpus": 3}] * 2


def test_a_second_time_is_enough(starts):
    outcomes, asked = starts
    outcomes[:] = [SLOW, SLOW, None]
    with pytest.raises(Exception, match="timed out during startup"):
        start_ray()
    assert len(asked) == 2


def test_any_other_error_is_final(starts):
    outcomes, asked = starts
    outcomes[:] = [ValueError("no such option"), None]
    with pytest.raises(ValueError, match="no such option"):
        start_ray()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("given", "in_turn", "wanted"),
    [
        ({}, True, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}),
        ({}, False, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"GOMP_SPINCOUNT": "5"}, True, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, True, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_idle_threads_sleep_and_sooner_where_others_compute(monkeypatch, given, in_turn, wanted):
    monkeypatch.setattr(placement.os, "environ", dict(given))
    placement._let_idle_threads_sleep(in_turn)
    assert placement.os.environ == wanted


@pytest.fixture
def nobody(monkeypatch):
    """A port at which nobody listens."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound, so that nobody else takes it


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
@pytest.mark.parametrize("source", ["cluster.address", "RAY_ADDRESS"])
def test_an_address_that_nobody_answers_at_is_refused_in_seconds(starts, monkeypatch, nobody, form, source):
    address, settings = form.format(nobody), []
    if source == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        settings = [f"cluster.address={address}"]
    began = time.monotonic()
    with pytest.raises(ClusterError, match="nothing answers") as caught, cluster(load_config(None, settings)):
        pass
    assert time.monotonic() - began < 10
    assert (source in caught.value.given, starts[1]) == (True, [])


@contextmanager
def answering(says):
    """A port where who connects is told this, and no more."""

    def answer():
        with suppress(OSError):  # closed: nobody asks any more
            while True:
                with server.accept()[0] as peer:
                    peer.sendall(says)
                    peer.shutdown(socket.SHUT_WR)
                    peer.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_an_address_that_is_answered_at_is_joined(starts, monkeypatch, nobody):
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    server = grpc.server(ThreadPoolExecutor(1))  # as GCS and Ray's server for clients are
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto"):
        with cluster(load_config(None, [f"cluster.address={address}"])):
            assert starts[1][-1]["address"] == address
    server.stop(None)


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"\0\0", b""])
def test_what_answers_and_is_no_cluster_is_refused(says):
    with answering(says) as port, pytest.raises(ClusterError, match="no Ray cluster") as caught:
        check_answers(f"127.0.0.1:{port}", "cluster.address")
    assert "6379" in caught.value.mend


def test_who_is_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("stateset_ray.actors.address._PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match="no Ray cluster"):
            check_answers(place, "cluster.address")
        monkeypatch.setenv("RAY_USE_TLS", "1")
        check_answers(place, "cluster.address")


@pytest.fixture
def resolving(monkeypatch):
    """Lets every name have the ports of this machine that are given here for its addresses."""
    ports = []

    def getaddrinfo(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return ports


@pytest.mark.parametrize("first", ["nobody", "no cluster"])
def test_a_name_with_several_addresses_is_a_cluster_if_one_of_them_is(resolving, nobody, first):
    settings = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    with answering(settings) as cluster, answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as other:
        resolving[:] = [nobody if first == "nobody" else other, cluster]
        assert check_answers("head:6379", "cluster.address")
        resolving[:] = [other, nobody]
        with pytest.raises(ClusterError, match="no Ray cluster"):
            check_answers("head:6379", "cluster.address")
    resolving[:] = [nobody, nobody]
    with pytest.raises(ClusterError, match="nothing answers"):
        check_answers("head:6379", "cluster.address")


def test_who_trickles_has_no_more_time_than_who_is_silent(monkeypatch):
    clock = [0.0]

    class Trickles:
        def settimeout(self, seconds):
            self.left = seconds

        def sendall(self, _):
            pass

        def recv(self, _):
            clock[0] += min(self.left, 15.0)
            if self.left < 15:
                raise TimeoutError
            return b"\0"

    monkeypatch.setattr("stateset_ray.actors.address.time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert not _speaks_grpc(Trickles())
    assert clock == [20.0]


def test_behind_a_proxy_ray_finds_out_itself(monkeypatch, nobody):
    monkeypatch.setenv("RAY_grpc_enable_http_proxy", "1")
    assert not check_answers(f"127.0.0.1:{nobody}", "cluster.address")


def test_a_job_joins_the_cluster_that_runs_it(monkeypatch, nobody):
    theirs = load_config(None, ["cluster.address=head:6379"])
    assert (address_of(theirs), address_of(load_config())[0]) == (("head:6379", "cluster.address"), "")
    monkeypatch.setenv("RAY_ADDRESS", "here:6379")
    assert address_of(load_config()) == ("here:6379", "RAY_ADDRESS")
    assert address_of(theirs) == ("head:6379", "cluster.address")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert address_of(theirs) == ("here:6379", "RAY_ADDRESS")


def test_a_start_that_fails_here_blames_no_address(starts, nobody):
    starts[0][:] = [SLOW, SLOW]
    failed = pytest.raises(ClusterError, match="did not start on this machine")
    with failed as caught, cluster(load_config()):
        pass
    assert caught.value.given is None
    assert "/tmp" in caught.value.mend and "address" not in caught.value.mend


@pytest.mark.parametrize(
    ("address", "wanted"),
    [("auto", None), ("local", None), ("", None), ("anyscale://x", None), ("[::1]:6379", ("::1", 6379)),
     ("ray://head:10001", ("head", 10001)), ("10.0.0.1:6379", ("10.0.0.1", 6379))],
)  # fmt: skip
def test_the_forms_of_an_address(address, wanted):
    assert host_and_port(address) == wanted
