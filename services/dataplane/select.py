"""Builds a process's data plane from its configuration.

A configuration names schemes, or ``auto`` for all that are worthwhile here, best first: shared memory; RDMA where there
is an adapter for it; TCP. RDMA has no TLS, so with an identity it is not among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from services.core.errors import ConfigError
from services.dataplane import nixl
from services.dataplane.collective import CollectiveTransport
from services.dataplane.collective_group import GlooBackend, NcclBackend, PairBackend
from services.dataplane.composite import CompositeTransport
from services.dataplane.link import EmulatedLink
from services.dataplane.link_spec import parse_link
from services.dataplane.negotiation import Offers, socket_identity
from services.dataplane.rdma import RdmaTransport
from services.dataplane.shm import ShmTransport
from services.dataplane.socket_transport import WaitableTransport
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_tls import TlsTcpTransport
from services.dataplane.transport import Transport
from services.runtime.tls import MutualTls

Scheme = Literal["shm", "tcp", "rdma", "gloo", "nccl"]
Choice = Literal["auto", "shm", "tcp", "rdma", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Where a daemon's data planes listen.

    Attributes:
        shm_socket: path of the shm transport's Unix socket.
        tcp_address: host:port of the transports between hosts; port 0 takes a free one for each. Otherwise tcp has this
            port, if it is among them, and each other one the next.
        tcp_advertise: host that peers are told, where it is another than that of ``tcp_address``.
        allow_insecure: whether ``tcp_address`` may be reachable from other hosts without TLS.
        tls: the own identity on the tcp transport; None: it is in plain text.
    """

    shm_socket: Path
    tcp_address: str
    tcp_advertise: str | None
    allow_insecure: bool
    tls: MutualTls | None = None


@dataclass(frozen=True, slots=True)
class Listening:
    """A transport, and how others reach it."""

    transport: Transport
    offers: Offers


def connecting_transport(choice: Choice, link: str | None, tls: MutualTls | None = None) -> Transport:
    """A transport that only connects; with ``auto``, over every scheme that is worthwhile here.

    Args:
        link: emulates such a link, as in "25gbit,50us".
        tls: the own identity on the tcp transport; None: it is in plain text.

    Raises:
        ConfigError: a file of ``tls`` is of no use, or the transport has no TLS, no NIXL, or no GPU.
    """
    return _over_link(_together([_connecting(scheme, tls) for scheme in _resolve([choice], tls)]), link)


def listening_transport(choices: Iterable[Choice], options: ListenOptions, link: str | None) -> Listening:
    """Listens on one data plane for each scheme, and connects over all of them, the first one being best.

    Raises:
        ConfigError: an address is impossible or taken, or a file of the identity is of no use, or a transport has no
            TLS, no NIXL, or no GPU.
    """
    schemes = _resolve(choices, options.tls)
    between_hosts = sorted((scheme for scheme in schemes if scheme != "shm"), key=lambda scheme: scheme != "tcp")
    transports = [
        ShmTransport(options.shm_socket)
        if scheme == "shm"
        else _listening(scheme, options, _with_later_port(options.tcp_address, between_hosts.index(scheme)))
        for scheme in schemes
    ]
    addresses = tuple(transport.listen() for transport in transports)
    identity = socket_identity(options.shm_socket) if "shm" in schemes else ""
    return Listening(_over_link(_together(transports), link), Offers(addresses, identity))


def _resolve(choices: Iterable[Choice], tls: MutualTls | None) -> list[Scheme]:
    """What ``auto`` stands for in its place; each scheme once."""
    rdma: list[Scheme] = ["rdma"] if tls is None and nixl.is_worthwhile() else []
    automatic: list[Scheme] = ["shm", *rdma, "tcp"]
    schemes: dict[Scheme, None] = {}
    for choice in choices:
        schemes.update(dict.fromkeys(automatic if choice == "auto" else [choice]))
    return list(schemes)


def _together(transports: Sequence[WaitableTransport]) -> Transport:
    return transports[0] if len(transports) == 1 else CompositeTransport(transports)


def _with_later_port(address: str, by: int) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + by}" if by and port.isdecimal() and int(port) else address


def _connecting(scheme: Scheme, tls: MutualTls | None) -> WaitableTransport:
    match scheme:
        case "shm":
            return ShmTransport()
        case "tcp":
            return TcpTransport() if tls is None else TlsTcpTransport(tls)
        case "rdma":
            _refuse_tls(scheme, tls)
            return RdmaTransport()
        case "gloo" | "nccl":
            _refuse_tls(scheme, tls)
            return CollectiveTransport(_pair_backend(scheme))


def _listening(scheme: Literal["tcp", "rdma", "gloo", "nccl"], options: ListenOptions, at: str) -> WaitableTransport:
    place = (at, options.tcp_advertise, options.allow_insecure)
    match scheme:
        case "tcp" if options.tls is not None:
            return TlsTcpTransport(options.tls, at, options.tcp_advertise)
        case "tcp":
            return TcpTransport(*place)
        case "rdma":
            _refuse_tls(scheme, options.tls)
            return RdmaTransport(*place)
        case "gloo" | "nccl":
            _refuse_tls(scheme, options.tls)
            return CollectiveTransport(_pair_backend(scheme), *place)


def _refuse_tls(scheme: Scheme, tls: MutualTls | None) -> None:
    if tls is not None:
        raise ConfigError(f"the {scheme} data plane has no TLS: use tcp, or take the identity (tls) away")


def _pair_backend(scheme: Literal["gloo", "nccl"]) -> PairBackend:
    return GlooBackend() if scheme == "gloo" else NcclBackend(torch.device("cuda"))


def _over_link(transport: Transport, link: str | None) -> Transport:
    return transport if link is None else EmulatedLink(transport, parse_link(link))
