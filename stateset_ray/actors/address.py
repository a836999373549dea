"""The address of a cluster, before Ray is asked to join it: Ray waits minutes where nobody answers."""

from __future__ import annotations

import re
import socket

from stateset_ray.errors import ClusterError

__all__ = ["check_answers", "host_and_port"]

_SECONDS = 5.0
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
    """Make sure that somebody answers at the address of a cluster, within seconds.

    Args:
        address: as Ray takes it; "", "auto" and "local" are left to Ray.
        source: the setting or variable that it comes from, for the error.

    Raises:
        ClusterError: nobody does.
    """
    found = host_and_port(address)
    if found is None:
        return
    try:
        socket.create_connection(found, timeout=_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ClusterError(
            f"nothing answers at the address of the Ray cluster: {error}", given=f"{address} ({source})",
            mend=f"start that cluster, or correct {source}; without it, a cluster is started here",
        ) from error  # fmt: skip
