"""TCP sockets of the data plane: where they may listen, how they connect, and how they notice a host that vanished."""

from __future__ import annotations

import ipaddress
import select
import socket

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.stream import Stream
from services.runtime.addresses import split_address, split_listen_address

_BACKLOG = 1024
_SYN_RETRIES = 2  # about 7 s until a host that does not answer counts as lost
_CONNECT_GLANCE_MS = 10


def open_listener(address: str, allow_insecure: bool) -> socket.socket:
    """A non-blocking socket that listens on host:port; port 0 takes a free one.

    Raises:
        ConfigError: the address is malformed, not loopback without ``allow_insecure``, unknown or taken.
    """
    host, port = split_listen_address(address, allow_insecure)
    sock: socket.socket | None = None
    try:
        # At start only: a name may take a while.
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error
    return sock


def advertised_address(listener: socket.socket, host: str | None) -> str:
    """host:port that peers connect to: that of the listener, or its port on another ``host``.

    Raises:
        ConfigError: peers cannot connect to it, as the host is a name or means "any address".
    """
    own, port = listener.getsockname()[:2]
    try:
        chosen = ipaddress.ip_address((own if host is None else host).strip("[]"))
    except ValueError:
        raise ConfigError(f"the data plane's peers need a numeric address to connect to, not {host!r}") from None
    if chosen.is_unspecified:
        raise ConfigError(f"listening on {own}: set the address that the data plane's peers are to connect to")
    return f"[{chosen}]:{port}" if chosen.version == 6 else f"{chosen}:{port}"


def open_connection(address: str, peer_timeout_s: float) -> socket.socket:
    """A non-blocking socket that connects, or has connected, to host:port.

    It looks for the answer for a moment, so that "nobody listens" is known at once within a host or a rack.

    Raises:
        ConfigError: the address is malformed, or the host is a name: looking it up would block.
        PeerLostError: nobody listens there, or there is no way to it.
    """
    host, port = split_address(address)
    try:
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=flags
        )[0]
    except socket.gaierror:
        raise ConfigError(f"{address!r} is no address to connect to: the host must be numeric") from None
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    except OSError as error:
        raise PeerLostError(f"cannot open a socket to connect to {address}: {error.strerror}") from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _SYN_RETRIES)
        tune(sock, peer_timeout_s)
        try:
            sock.connect(place)
        except BlockingIOError:
            glance = select.poll()
            glance.register(sock, select.POLLOUT)
            glance.poll(_CONNECT_GLANCE_MS)
            failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failed:
                raise OSError(failed, _strerror(failed)) from None
    except OSError as error:
        sock.close()
        raise PeerLostError(f"nobody listens at {address}: {error.strerror}") from error
    return sock


def tune(sock: Stream, peer_timeout_s: float) -> None:
    """No delay of small messages, and an end to connections whose peer's host has been silent for ``peer_timeout_s``.

    Both are needed: keepalive notices the silence of a connection that is idle, the user timeout that of one which has
    sent something. A peer that is stopped and has let its buffers stay full for so long is ended by it, too.
    """
    probe_s = max(1, int(peer_timeout_s / 3))
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(peer_timeout_s * 1000)),
    ):
        sock.setsockopt(level, option, value)


def peer_of(sock: Stream) -> str:
    """host:port of the other end, for messages and logs."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "unknown"  # gone already
    return f"{host}:{port}"


def _strerror(number: int) -> str:
    return OSError(number, "").strerror or str(number)
