"""TLS contexts of the data plane: TLS 1.3, mutual, made anew when the files have changed.

Sessions are never resumed: every handshake verifies both certificates, and a listener sends nothing behind it that a
reader would have to expect between its messages.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

from services.core.errors import ConfigError
from services.runtime.tls import MutualTls, RotatedFiles


class RotatedContext:
    """The context for the next handshake. It is asked for by one thread.

    Args:
        make: ``listener_context`` or ``client_context``.

    Raises:
        ConfigError: a file cannot be read, or they do not go together.
    """

    def __init__(self, tls: MutualTls, make: Callable[[MutualTls], ssl.SSLContext]) -> None:
        self._files = RotatedFiles(tls, make)
        self._context = self._files.load()

    def current(self) -> ssl.SSLContext:
        """Of the files as they are now, or as they were while they are not fit for use."""
        self._context = self._files.reload() or self._context
        return self._context


def listener_context(tls: MutualTls) -> ssl.SSLContext:
    """For accepted connections: the other side must show a certificate of the authority. Whose, is not asked here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    return _with_files(context, tls)


def client_context(tls: MutualTls) -> ssl.SSLContext:
    """For opened connections: the certificate must be the authority's, and for the name that the handshake is given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False  # the role stands in a DNS name
    return _with_files(context, tls)


def _with_files(context: ssl.SSLContext, tls: MutualTls) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.load_identity(context)
    try:
        context.load_verify_locations(tls.ca)
    except (ssl.SSLError, OSError) as exc:
        raise ConfigError(f"tls: {tls.ca} is no file of trusted certificates: {exc}") from exc
    return context
