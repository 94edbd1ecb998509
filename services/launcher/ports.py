"""Ports of this machine."""

from __future__ import annotations

import socket

from services.core.errors import ConfigError

HOST = "127.0.0.1"


def claim_port(option: str, port: int) -> int:
    """``port`` itself if nobody listens there; any free one for 0.

    Raises:
        ConfigError: the port is taken.
    """
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
    """Different free ports. Nothing keeps them free: use them at once."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
