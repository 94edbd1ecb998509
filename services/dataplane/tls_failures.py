"""OpenSSL's errors in words that say what is to be put right."""

from __future__ import annotations

import errno
import ssl

# What a peer's first bytes are taken for where they are no TLS record.
_NO_TLS = frozenset(
    {
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "UNEXPECTED_MESSAGE",
        "UNEXPECTED_RECORD",
        "WRONG_VERSION_NUMBER",
    }
)


def tls_failure(error: OSError, in_handshake: bool) -> OSError:
    """An error whose ``strerror`` names what was wrong."""
    return OSError(error.errno or errno.EPROTO, _words(error, in_handshake))


def _words(error: OSError, in_handshake: bool) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return f"the peer's certificate is not accepted: {error.verify_message}"
        case ssl.SSLEOFError() | ConnectionResetError() | BrokenPipeError() if in_handshake:
            return "the peer hung up in the TLS handshake; is TLS configured there, too?"
        case ssl.SSLEOFError():
            return "the peer hung up without a farewell"
        case ssl.SSLError(reason="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            return "the peer shows no certificate"
        case ssl.SSLError(reason=str(reason)) if "_ALERT_" in reason:
            return f"the peer refuses the connection: {reason.partition('_ALERT_')[2].replace('_', ' ').lower()}"
        case ssl.SSLError(reason=str(reason)) if in_handshake and reason in _NO_TLS:
            return "the peer does not speak TLS"
        case ssl.SSLError(reason=str(reason)):
            return f"TLS failed: {reason.replace('_', ' ').lower()}"
        case _:
            return error.strerror or str(error)
