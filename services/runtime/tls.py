"""TLS: which authority to trust and which identity to show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from services.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files. ``cert`` and ``key`` are this side's own identity, both or neither.

    Attributes:
        ca: certificates trusted to sign the other side's.
        cert: own certificate chain.
        key: its private key.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("tls: cert and key go together; give both or neither")

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of the client's side.

        Raises:
            ConfigError: a file cannot be read.
        """
        key = None if self.key is None else _read(self.key)
        cert = None if self.cert is None else _read(self.cert)
        return grpc.ssl_channel_credentials(_read(self.ca), key, cert)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"tls: {path} cannot be read: {exc.strerror}") from exc
