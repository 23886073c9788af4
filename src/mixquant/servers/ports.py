"""TCP ports of this machine on which child processes can listen later."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

LOWEST, END = 10240, 65536
_HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(number: int, without: int = 0) -> list[int]:
    """Different free ports of the loopback address, in random order.

    None of the ports that the system gives to connections, or to processes that ask for any port:
    an engine needs half a minute until it listens, and another process could get its port in the
    meantime.

    Args:
        without: a port that is not wanted.

    Raises:
        OSError: there are not as many.
    """
    handed_out = _handed_out()
    ports = [port for port in range(LOWEST, END) if port not in handed_out and port != without]
    if len(ports) < 100 * number:
        ports = [port for port in range(LOWEST, END) if port != without]
    found: list[int] = []
    with ExitStack() as open_ones:
        for port in random.sample(ports, len(ports)):
            if len(found) == number:
                return found
            one = open_ones.enter_context(socket.socket())
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
    raise OSError(f"no {number} ports are free")


def _handed_out() -> range:
    try:
        first, last = _HANDED_OUT.read_text().split()
    except OSError:
        return range(49152, 65536)  # IANA's, as outside Linux
    return range(int(first), int(last) + 1)
