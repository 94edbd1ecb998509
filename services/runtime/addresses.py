"""Addresses of the form host:port, and which of them a process may listen on."""

from __future__ import annotations

import ipaddress

from services.core.errors import ConfigError


def split_address(address: str) -> tuple[str, int]:
    """``"127.0.0.1:80"`` -> ``("127.0.0.1", 80)``; an IPv6 host stands in brackets and keeps them.

    Raises:
        ConfigError: it is not host:port.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not an address of the form host:port")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_listen_address(address: str, allow_insecure: bool) -> tuple[str, int]:
    """``split_address`` of an address to listen on without TLS.

    Raises:
        ConfigError: it is not host:port, or not loopback and ``allow_insecure`` is not set. With TLS, ask
            ``split_address``.
    """
    host, port = split_address(address)
    if not allow_insecure and not is_loopback(host):
        raise ConfigError(
            f"refusing to listen on {address} without TLS: anybody who reaches it could use it; "
            "listen on 127.0.0.1, or set allow_insecure if the network is private"
        )
    return host, port
