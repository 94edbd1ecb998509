"""TLS: which authority to trust, which identity to show, and how a certificate says whose it is.

Among the services TLS is mutual. A certificate carries its owner's role as a DNS name ``ROLE.DOMAIN``, for example
``kvdaemon.infinite-llm``, whatever the owner's address: pods come and go, what they may do stays. A client insists on
the name of the role that it means to reach; a server asks ``access.py`` what the client's role may do.

Certificates are rotated by replacing their files. A server looks at them at every handshake, a client whenever it makes
a channel, which it does after every failure; the data plane (``tls_context.py``) at every handshake on both sides.
Connections that stand go on as they are.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import grpc

from services.core.errors import ConfigError

log = logging.getLogger(__name__)

# Whose a certificate can be; "client" is whoever uses the public API.
Role = Literal["gateway", "gmanager", "instance", "kvdaemon", "client"]

Version = tuple[tuple[int, int, int], ...]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files towards a server of another project. ``cert`` and ``key`` are the own identity, both or neither.

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

    def version(self) -> Version | None:
        """Changes when a file does; None while one of them cannot be looked at."""
        return _version(path for path in (self.ca, self.cert, self.key) if path is not None)


@dataclass(frozen=True, slots=True)
class MutualTls:
    """PEM files of one service, for its server, for its channels to the others, and for its data plane.

    Attributes:
        ca: certificates trusted to sign the other services'.
        cert: own certificate chain; its DNS names say the own role.
        key: its private key.
        domain: what follows the role in those names. Clusters that share an authority have different ones.
    """

    ca: Path
    cert: Path
    key: Path
    domain: str = "infinite-llm"

    def name_of(self, role: Role) -> str:
        """The DNS name in the certificates of a role."""
        return f"{role}.{self.domain}"

    def roles_of(self, dns_names: Iterable[str]) -> frozenset[Role]:
        """The roles that a certificate's DNS names stand for."""
        names = frozenset(dns_names)
        return frozenset(role for role in get_args(Role) if self.name_of(role) in names)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a new channel.

        Raises:
            ConfigError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server: clients without a certificate of the authority are refused; files are reloaded.

        Raises:
            ConfigError: a file cannot be read, or the key is not the certificate's.
        """
        files = RotatedFiles(self, _server_configuration)
        reload: Any = files.reload  # answers None for "no change", which the stubs do not know
        return grpc.dynamic_ssl_server_credentials(files.load(), reload, require_client_authentication=True)

    def load_identity(self, context: ssl.SSLContext) -> None:
        """Lets a context show the own certificate.

        Raises:
            ConfigError: a file cannot be read, or the key is not the certificate's.
        """
        for path in (self.cert, self.key):
            _read(path)  # which says what is wrong with it
        try:
            context.load_cert_chain(self.cert, self.key)
        except (ssl.SSLError, OSError) as exc:
            raise ConfigError(f"tls: {self.cert} and {self.key} do not go together: {exc}") from exc

    def version(self) -> Version | None:
        """Changes when a file does; None while one of them cannot be looked at."""
        return _version((self.ca, self.cert, self.key))


class RotatedFiles(Generic[Made]):
    """What ``make`` makes of a service's files as they were read last. gRPC calls ``reload`` in any thread.

    Args:
        make: reads the files, and raises ConfigError where they are of no use.
    """

    def __init__(self, tls: MutualTls, make: Callable[[MutualTls], Made]) -> None:
        self._tls = tls
        self._make = make
        self._loaded: Version | None = None

    def load(self) -> Made:
        """Reads the files, all of one rotation: it is checked that they fit and did not change meanwhile.

        Raises:
            ConfigError: they do not, or cannot be read.
        """
        before = self._tls.version()
        made = self._make(self._tls)
        if before is None or before != self._tls.version():
            raise ConfigError(f"tls: {self._tls.cert} changed while it was read")
        self._loaded = before
        return made

    def reload(self) -> Made | None:
        """The files' new content; None where it is still the old, or is not fit for use yet."""
        if self._tls.version() in (None, self._loaded):
            return None
        try:
            made = self.load()
        except ConfigError as exc:
            log.warning("certificates not reloaded, the old ones stay in use: %s", exc)
            return None
        log.info("certificates reloaded", extra={"cert": str(self._tls.cert)})
        return made


def _server_configuration(tls: MutualTls) -> grpc.ServerCertificateConfiguration:
    pair, authority = [(_read(tls.key), _read(tls.cert))], _read(tls.ca)
    tls.load_identity(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # gRPC would take a key that is not the certificate's
    return grpc.ssl_server_certificate_configuration(pair, authority)


def _version(paths: Iterable[Path]) -> Version | None:
    try:
        return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in map(os.stat, paths))
    except OSError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"tls: {path} cannot be read: {exc.strerror}") from exc
