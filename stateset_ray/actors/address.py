"""The address of a cluster, before Ray is asked to join it: Ray waits minutes where no cluster answers."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress

from stateset_ray.errors import ClusterError

__all__ = ["check_answers", "host_and_port"]

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


def check_answers(address: str, source: str) -> None:
    """Make sure that a cluster answers at its address: within seconds, or 20 where somebody is silent.

    Args:
        address: as Ray takes it; "", "auto" and "local" are left to Ray.
        source: the setting or variable that it comes from, for the error.

    Raises:
        ClusterError: nobody does, or what answers is no cluster.
    """
    found = host_and_port(address)
    if found is None:
        return
    try:
        with socket.create_connection(found, timeout=_SECONDS) as peer:
            speaks = _speaks_grpc(peer)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ClusterError(
            f"nothing answers at the address of the Ray cluster: {error}", given=f"{address} ({source})",
            mend=f"start that cluster, or correct {source}; without it, a cluster is started here",
        ) from error  # fmt: skip
    if not speaks:
        raise ClusterError(
            "what answers at this address is no Ray cluster: it does not speak gRPC",
            given=f"{address} ({source})",
            mend=f"correct {source}: HOST:6379, or ray://HOST:10001; a dashboard (8265) takes jobs only",
        )


def _speaks_grpc(peer: socket.socket) -> bool:
    """Whether it answers as gRPC does; taken for granted where Ray would speak TLS with it."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True
    peer.settimeout(_PATIENCE)
    frame = b""
    with suppress(OSError):  # silent, or gone at the first words
        peer.sendall(_HELLO)
        while len(frame) < 4 and (more := peer.recv(4 - len(frame))):  # three bytes of length, one of type
            frame += more
    return len(frame) == 4 and frame[3] == _SETTINGS
