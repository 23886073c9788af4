"""Where the processes of a set listen, and how they reach each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mixquant.serve.description import Deployment
from mixquant.servers.ports import free_ports

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """Where a process listens.

    Attributes:
        listen: address that it listens on.
        host: name or address by which the others reach it.
        port: of its HTTP server.
        side_channel: of an engine: the port of NIXL's handshake.
        metrics: of a router or front: the port of its metrics; of a front, of what the routers ask, too.
        private: address that this port is on, and by which the others reach it, where that is another
            one than clients'.
    """

    listen: str
    host: str
    port: int
    side_channel: int
    metrics: int
    private: str | None = None

    @property
    def url(self) -> str:
        return f"http://{bracketed(self.host)}:{self.port}"

    @property
    def metrics_listen(self) -> str:
        return f"{bracketed(self.private or self.listen)}:{self.metrics}"

    @property
    def metrics_url(self) -> str:
        return f"http://{bracketed(self.private or self.host)}:{self.metrics}"


def local_addresses(deployment: Deployment) -> Callable[[str], Address]:
    """Addresses on this machine, by process name: the public one as described, the others on free
    loopback ports."""
    public = "front" if deployment.disaggregated else "engine"
    names = 4 + (deployment.prefill or 0) + (deployment.decode or 0)
    free = free_ports(3 * names + 1, deployment.port)
    ports = iter([port for port in free if port != deployment.metrics_port])

    def address(name: str) -> Address:
        one = Address(LOOPBACK, LOOPBACK, next(ports), next(ports), next(ports))
        if name != public:
            return one
        return replace(
            one,
            listen=deployment.host,
            host=_reached(deployment.host),
            port=deployment.port,
            metrics=deployment.metrics_port or one.metrics,
            private=LOOPBACK,
        )

    return address


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reached(host: str) -> str:
    """An address by which a server that listens on ``host`` can be reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
