"""Ports of this machine."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

from services.core.errors import ConfigError

HOST = "127.0.0.1"
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")  # what the kernel gives to connections going out
_LOWEST = 10_000


def claim_port(option: str, port: int) -> int:
    """``port`` itself if nobody listens there; any free one for 0.

    Raises:
        ConfigError: the port is taken.
    """
    if not port:
        return free_ports(1)[0]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            raise ConfigError(
                f"{option} {port}: the port is taken or not allowed ({exc.strerror}); give another"
            ) from exc
        return int(probe.getsockname()[1])


def free_ports(count: int) -> list[int]:
    """Different free ports. Nothing keeps them free: use them at once.

    They are none that the kernel may give to an outgoing connection before their server is up, where there are others.
    """
    ports: list[int] = []
    for port in _candidates():
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            port = int(probe.getsockname()[1])
            if port not in ports:
                ports.append(port)
        if len(ports) == count:
            break
    return ports


def _candidates() -> Iterator[int]:
    """Ports to try, in random order; 0, any, at last and again and again."""
    try:
        end = int(_OUTGOING.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        end = 0
    listening = range(_LOWEST, end)
    yield from random.sample(listening, len(listening))
    while True:
        yield 0
