"""The one error tree of the project.

    InfiniteLLMError                      reason               gRPC status
    ├── InvalidRequestError               INVALID_REQUEST      INVALID_ARGUMENT
    │   └── ContextTooLongError           CONTEXT_TOO_LONG     INVALID_ARGUMENT
    ├── UnauthenticatedError              UNAUTHENTICATED      UNAUTHENTICATED
    ├── PermissionDeniedError             PERMISSION_DENIED    PERMISSION_DENIED
    ├── ModelNotFoundError                MODEL_NOT_FOUND      NOT_FOUND
    ├── RequestNotFoundError              REQUEST_NOT_FOUND    NOT_FOUND
    ├── ConfigError                       CONFIG               INVALID_ARGUMENT
    ├── UnsupportedModelError             UNSUPPORTED_MODEL    FAILED_PRECONDITION
    ├── GeometryMismatchError             GEOMETRY_MISMATCH    FAILED_PRECONDITION
    ├── ResyncRequiredError               RESYNC_REQUIRED      FAILED_PRECONDITION
    ├── PoolExhaustedError                POOL_EXHAUSTED       RESOURCE_EXHAUSTED
    ├── QueueFullError                    QUEUE_FULL           RESOURCE_EXHAUSTED
    ├── SessionRevokedError               SESSION_REVOKED      ABORTED
    ├── StaleGenerationError              STALE_GENERATION     ABORTED
    ├── TakenOverError                    TAKEN_OVER           ABORTED
    ├── UnavailableError                  UNAVAILABLE          UNAVAILABLE
    │   ├── NoInstanceError               NO_INSTANCE          UNAVAILABLE
    │   ├── JournalUnavailableError       JOURNAL_UNAVAILABLE  UNAVAILABLE
    │   ├── NotLeaderError                NOT_LEADER           UNAVAILABLE
    │   ├── PeerLostError                 PEER_LOST            UNAVAILABLE
    │   └── ShuttingDownError             SHUTTING_DOWN        UNAVAILABLE
    └── TransferTimeoutError              TRANSFER_TIMEOUT     DEADLINE_EXCEEDED

``runtime.grpc_errors`` maps the tree to ``google.rpc.Status`` with an ``ErrorInfo`` and back. A message names what was
wrong and what to do. ``assert`` is kept for the project's own bugs.
"""


class InfiniteLLMError(Exception):
    """Base of every error a service answers on purpose."""

    reason = "INTERNAL"
    grpc_status = "INTERNAL"


class InvalidRequestError(InfiniteLLMError):
    """The request cannot be served as it is written."""

    reason = "INVALID_REQUEST"
    grpc_status = "INVALID_ARGUMENT"


class ContextTooLongError(InvalidRequestError):
    """The request needs more context than the model or the cluster's memory has."""

    reason = "CONTEXT_TOO_LONG"


class UnauthenticatedError(InfiniteLLMError):
    """The caller has shown no API key, or none that is known."""

    reason = "UNAUTHENTICATED"
    grpc_status = "UNAUTHENTICATED"


class PermissionDeniedError(InfiniteLLMError):
    """The caller's certificate does not allow it this call."""

    reason = "PERMISSION_DENIED"
    grpc_status = "PERMISSION_DENIED"


class ModelNotFoundError(InfiniteLLMError):
    """No instance serves the named model."""

    reason = "MODEL_NOT_FOUND"
    grpc_status = "NOT_FOUND"


class RequestNotFoundError(InfiniteLLMError):
    """No journal knows the request: it never was, or is forgotten by now."""

    reason = "REQUEST_NOT_FOUND"
    grpc_status = "NOT_FOUND"


class ConfigError(InfiniteLLMError):
    """A configuration file has an unknown key or an impossible value."""

    reason = "CONFIG"
    grpc_status = "INVALID_ARGUMENT"


class UnsupportedModelError(InfiniteLLMError):
    """The checkpoint cannot be served exactly."""

    reason = "UNSUPPORTED_MODEL"
    grpc_status = "FAILED_PRECONDITION"


class GeometryMismatchError(InfiniteLLMError):
    """A pool holds blocks of another shape."""

    reason = "GEOMETRY_MISMATCH"
    grpc_status = "FAILED_PRECONDITION"


class ResyncRequiredError(InfiniteLLMError):
    """A stream of changes has a gap; send everything again."""

    reason = "RESYNC_REQUIRED"
    grpc_status = "FAILED_PRECONDITION"


class PoolExhaustedError(InfiniteLLMError):
    """A pool has fewer free blocks than were asked for."""

    reason = "POOL_EXHAUSTED"
    grpc_status = "RESOURCE_EXHAUSTED"


class QueueFullError(InfiniteLLMError):
    """Too many requests wait already; try again later."""

    reason = "QUEUE_FULL"
    grpc_status = "RESOURCE_EXHAUSTED"


class SessionRevokedError(InfiniteLLMError):
    """The session with the daemon is over; its holds are gone."""

    reason = "SESSION_REVOKED"
    grpc_status = "ABORTED"


class StaleGenerationError(InfiniteLLMError):
    """A message names a block that has been given to somebody else since."""

    reason = "STALE_GENERATION"
    grpc_status = "ABORTED"


class TakenOverError(InfiniteLLMError):
    """The client has resumed the request's stream elsewhere; this one has ended."""

    reason = "TAKEN_OVER"
    grpc_status = "ABORTED"


class UnavailableError(InfiniteLLMError):
    """Something needed is away for the moment."""

    reason = "UNAVAILABLE"
    grpc_status = "UNAVAILABLE"


class NoInstanceError(UnavailableError):
    """No instance is ready to compute the request."""

    reason = "NO_INSTANCE"


class JournalUnavailableError(UnavailableError):
    """The request journal cannot be read for the moment."""

    reason = "JOURNAL_UNAVAILABLE"


class NotLeaderError(UnavailableError):
    """This gManager stands by; the leader is another one."""

    reason = "NOT_LEADER"


class PeerLostError(UnavailableError):
    """The connection to a peer is gone, and with it everything in flight."""

    reason = "PEER_LOST"


class ShuttingDownError(UnavailableError):
    """The service is ending and takes no more work."""

    reason = "SHUTTING_DOWN"


class TransferTimeoutError(InfiniteLLMError):
    """A peer did not answer within the deadline."""

    reason = "TRANSFER_TIMEOUT"
    grpc_status = "DEADLINE_EXCEEDED"


def all_errors() -> dict[str, type[InfiniteLLMError]]:
    """Every class of the tree by its reason; a subclass that shares its parent's reason is not listed twice."""
    found: dict[str, type[InfiniteLLMError]] = {}
    todo: list[type[InfiniteLLMError]] = [InfiniteLLMError]
    while todo:
        cls = todo.pop()
        found.setdefault(cls.reason, cls)
        todo.extend(cls.__subclasses__())
    return found
