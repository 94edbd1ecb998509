"""The one place where a gRPC status becomes an error of ``infinitellm.errors``."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.rpc import error_details_pb2, status_pb2

from infinitellm import errors

_DOMAIN = "infinitellm"
# gRPC's own name for a serialized google.rpc.Status in the trailing metadata.
_STATUS_DETAILS_KEY = "grpc-status-details-bin"

# What a status without an ErrorInfo means: gRPC itself, or something between client and gateway, said it.
_CLASS_BY_STATUS: dict[grpc.StatusCode, type[errors.InfiniteLLMError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.CANCELLED: errors.PeerLostError,  # by a gateway that ends; the caller's own end never comes here
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
}


def error_from_status(
    code: grpc.StatusCode, message: str | None, trailing_metadata: Iterable[tuple[str, str | bytes]] | None
) -> errors.InfiniteLLMError:
    """The error that the gateway raised; for a reason that this version does not know, one that fits the status."""
    cls = _CLASS_BY_STATUS.get(code, errors.InfiniteLLMError)
    reason = _reason(trailing_metadata or ())
    if reason is not None:
        cls = errors.all_errors().get(reason, cls)
    return cls(message or code.name)


def _reason(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for key, value in trailing_metadata:
        if key == _STATUS_DETAILS_KEY and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == _DOMAIN:
                    return str(info.reason)
    return None
