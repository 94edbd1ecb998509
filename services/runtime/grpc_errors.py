"""The error tree on the wire: ``google.rpc.Status`` with one ``ErrorInfo``, there and back.

A service raises an error of ``services.core.errors``; the server's interceptor sends its status code, its message and
``ErrorInfo(reason, domain)`` in the trailing metadata. The caller turns the ``AioRpcError`` back into the same class.
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from services.core.errors import (
    InfiniteLLMError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    QueueFullError,
    SessionRevokedError,
    TransferTimeoutError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedModelError,
    all_errors,
)

ERROR_DOMAIN = "infinitellm"
# gRPC's own name for a serialized google.rpc.Status in the trailing metadata.
STATUS_DETAILS_KEY = "grpc-status-details-bin"
# A client refuses metadata beyond 8 KiB by default, and with it the whole status.
MAX_MESSAGE_CHARS = 2000

# What a status without ErrorInfo means: gRPC itself or a foreign server said it.
_CLASS_BY_STATUS: dict[grpc.StatusCode, type[InfiniteLLMError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.FAILED_PRECONDITION: UnsupportedModelError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFullError,
    grpc.StatusCode.ABORTED: SessionRevokedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TransferTimeoutError,
}


def status_code(error: InfiniteLLMError) -> grpc.StatusCode:
    """The gRPC status code of an error."""
    return grpc.StatusCode[error.grpc_status]


def error_message(error: InfiniteLLMError) -> str:
    """The error's message, short enough for metadata."""
    return str(error)[:MAX_MESSAGE_CHARS]


def error_metadata(error: InfiniteLLMError) -> aio.Metadata:
    """Trailing metadata that carries the error's reason."""
    code: int = status_code(error).value[0]
    detail = AnyMessage()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))
    status = status_pb2.Status(code=code, message=error_message(error), details=[detail])
    return aio.Metadata((STATUS_DETAILS_KEY, status.SerializeToString()))


def error_from_rpc(exc: aio.AioRpcError) -> InfiniteLLMError:
    """The error that the other side raised; for what gRPC itself reports, the class that fits the status code."""
    message = exc.details() or exc.code().name
    for key, value in exc.trailing_metadata() or ():
        if key != STATUS_DETAILS_KEY or not isinstance(value, bytes):
            continue
        status = status_pb2.Status.FromString(value)
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                return all_errors().get(info.reason, InfiniteLLMError)(status.message)
    return _CLASS_BY_STATUS.get(exc.code(), InfiniteLLMError)(message)
