"""The address of a cluster, before Ray is asked to join it: Ray waits minutes where no cluster answers."""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress

from stateset_ray.config import Config
from stateset_ray.errors import ClusterError

__all__ = ["address_of", "check_answers", "host_and_port"]

_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the command of a job, beside RAY_ADDRESS
_SECONDS = 5.0
_PATIENCE = 20.0  # seconds for the first words of a cluster that is busy
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of HTTP/2, and so of gRPC, begins with (RFC 9113, 3.4): its preface, and empty settings."""
_SETTINGS = 4  # the type of the frame that the other side begins with
_HOST_AND_PORT = re.compile(r"(?:[\w+.-]+://)?(?:\[([0-9A-Fa-f:.%]+)\]|([\w.-]+)):(\d{1,5})/?")


def host_and_port(address: str) -> tuple[str, int] | None:
    """What an address of a cluster names; None where that is Ray's to find out.

    Example:
        >>> host_and_port("ray://head.example:10001"), host_and_port("auto")
        (('head.example', 10001), None)
    """
    match = _HOST_AND_PORT.fullmatch(address.strip())
    return (match[1] or match[2], int(match[3])) if match else None


def address_of(config: Config) -> tuple[str, str]:
    """The cluster that a run joins ("": it starts its own), and the setting or variable that names it.

    A Ray job joins the one that runs it, wherever its configuration comes from.
    """
    given, ours = os.environ.get("RAY_ADDRESS", ""), config.cluster.address
    if given and (_IN_A_JOB in os.environ or not ours):
        return given, "RAY_ADDRESS"
    return ours, "cluster.address"


def check_answers(address: str, source: str) -> bool:
    """Make sure that a cluster answers at its address: within seconds, or 20 where somebody is silent.

    Of the addresses of a name, one has to.

    Args:
        address: as Ray takes it; "", "auto" and "local" are left to Ray, and all where it uses a proxy.
        source: the setting or variable that it comes from, for the error.

    Returns:
        Whether anybody was asked.

    Raises:
        ClusterError: nobody does, or what answers is no cluster.
    """
    found = host_and_port(address)
    if found is None or _set("RAY_grpc_enable_http_proxy"):
        return False
    answered, fault = False, ""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(*found, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind, protocol) as peer:
                    peer.settimeout(_SECONDS)
                    peer.connect(place)
                    answered = True
                    if _speaks_grpc(peer):
                        return True
            except OSError as error:
                fault = str(error)
    except (OSError, OverflowError, UnicodeError) as error:
        fault = str(error)
    if not answered:
        raise ClusterError(
            f"nothing answers at the address of the Ray cluster: {fault}", given=f"{address} ({source})",
            mend=f"start that cluster, or correct {source}; without it, a cluster is started here",
        )  # fmt: skip
    raise ClusterError(
        "what answers at this address is no Ray cluster: it does not speak gRPC",
        given=f"{address} ({source})",
        mend=f"correct {source}: HOST:6379, or ray://HOST:10001; a dashboard (8265) takes jobs only",
    )


def _speaks_grpc(peer: socket.socket) -> bool:
    """Whether it answers as gRPC does; taken for granted where Ray would speak TLS with it."""
    if _set("RAY_USE_TLS"):
        return True
    deadline = time.monotonic() + _PATIENCE
    frame = b""
    with suppress(OSError):  # silent, or gone at the first words
        peer.sendall(_HELLO)
        while len(frame) < 4:  # three bytes of length, one of type
            peer.settimeout(max(0.0, deadline - time.monotonic()))
            if not (more := peer.recv(4 - len(frame))):
                break
            frame += more
    return len(frame) == 4 and frame[3] == _SETTINGS


def _set(variable: str) -> bool:
    """Whether a switch of Ray's is on."""
    return os.environ.get(variable, "0").lower() in ("1", "true")
