"""Builds a process's data plane from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from services.core.errors import ConfigError
from services.dataplane.collective import CollectiveTransport
from services.dataplane.collective_group import GlooBackend, NcclBackend, PairBackend
from services.dataplane.composite import CompositeTransport
from services.dataplane.link import EmulatedLink
from services.dataplane.link_spec import parse_link
from services.dataplane.rdma import RdmaTransport
from services.dataplane.shm import ShmTransport
from services.dataplane.socket_transport import WaitableTransport
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_tls import TlsTcpTransport
from services.dataplane.transport import Transport
from services.runtime.tls import MutualTls

Scheme = Literal["shm", "tcp", "rdma", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Where a daemon's data planes listen.

    Attributes:
        shm_socket: path of the shm transport's Unix socket.
        tcp_address: host:port of the transports between hosts; port 0 takes a free one, and is needed for several.
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
    """A transport and all addresses that it listens at."""

    transport: Transport
    addresses: tuple[str, ...]


def connecting_transport(scheme: Scheme, link: str | None, tls: MutualTls | None = None) -> Transport:
    """A transport that only connects.

    Args:
        link: emulates such a link, as in "25gbit,50us".
        tls: the own identity on the tcp transport; None: it is in plain text.

    Raises:
        ConfigError: a file of ``tls`` is of no use, or the transport has no TLS, no NIXL, or no GPU.
    """
    return _over_link(_connecting(scheme, tls), link)


def listening_transport(schemes: tuple[Scheme, ...], options: ListenOptions, link: str | None) -> Listening:
    """Listens on one data plane for each scheme.

    Raises:
        ConfigError: an address is impossible or taken, or a file of the identity is of no use, or a transport has no
            TLS, no NIXL, or no GPU.
    """
    transports = [_listening(scheme, options) for scheme in schemes]
    addresses = tuple(transport.listen() for transport in transports)
    transport: Transport = transports[0] if len(transports) == 1 else CompositeTransport(transports)
    return Listening(_over_link(transport, link), addresses)


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


def _listening(scheme: Scheme, options: ListenOptions) -> WaitableTransport:
    place = (options.tcp_address, options.tcp_advertise, options.allow_insecure)
    match scheme:
        case "shm":
            return ShmTransport(options.shm_socket)
        case "tcp":
            if options.tls is not None:
                return TlsTcpTransport(options.tls, options.tcp_address, options.tcp_advertise)
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
