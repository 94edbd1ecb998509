"""What a call can raise. The reasons are those of the services; a client tells errors apart by class.

InfiniteLLMError
├── InvalidRequestError               the request cannot be served as it is written
│   └── ContextTooLongError           it needs more context than the model or the cluster's memory has
├── UnauthenticatedError              no API key was sent, or none that is known
├── PermissionDeniedError             the certificate shown does not allow the call
├── ModelNotFoundError                no instance serves the named model
├── RequestNotFoundError              no journal knows the request that was to be resumed
├── ConfigError                       a configuration is impossible
├── UnsupportedModelError             the checkpoint cannot be served exactly
├── GeometryMismatchError             a pool holds blocks of another shape
├── ResyncRequiredError               a stream of changes has a gap
├── PoolExhaustedError                a pool has too few free blocks
├── QueueFullError                    too many requests wait already; try again later
├── SessionRevokedError               a session with a KV daemon is over
├── StaleGenerationError              a block has been given to somebody else
├── TakenOverError                    the request's stream was resumed elsewhere
├── UnavailableError                  something needed is away for the moment; try again
│   ├── NoInstanceError               no instance is ready
│   ├── JournalUnavailableError       the request journal cannot be read
│   ├── NotLeaderError                this gManager stands by
│   ├── PeerLostError                 a connection between services is gone
│   └── ShuttingDownError             the service is ending
├── TransferTimeoutError              a service did not answer another in time
└── DeadlineExceededError             the call's own timeout_s has passed
"""


class InfiniteLLMError(Exception):
    """Base of every error of a call."""

    reason = "INTERNAL"


class InvalidRequestError(InfiniteLLMError):
    """The request cannot be served as it is written."""

    reason = "INVALID_REQUEST"


class ContextTooLongError(InvalidRequestError):
    """The request needs more context than the model or the cluster's memory has."""

    reason = "CONTEXT_TOO_LONG"


class UnauthenticatedError(InfiniteLLMError):
    """No API key was sent, or none that is known."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(InfiniteLLMError):
    """The certificate shown does not allow the call."""

    reason = "PERMISSION_DENIED"


class ModelNotFoundError(InfiniteLLMError):
    """No instance serves the named model."""

    reason = "MODEL_NOT_FOUND"


class RequestNotFoundError(InfiniteLLMError):
    """No journal knows the request: it never was, or is forgotten by now."""

    reason = "REQUEST_NOT_FOUND"


class ConfigError(InfiniteLLMError):
    """A configuration has an unknown key or an impossible value."""

    reason = "CONFIG"


class UnsupportedModelError(InfiniteLLMError):
    """The checkpoint cannot be served exactly."""

    reason = "UNSUPPORTED_MODEL"


class GeometryMismatchError(InfiniteLLMError):
    """A pool holds blocks of another shape."""

    reason = "GEOMETRY_MISMATCH"


class ResyncRequiredError(InfiniteLLMError):
    """A stream of changes has a gap."""

    reason = "RESYNC_REQUIRED"


class PoolExhaustedError(InfiniteLLMError):
    """A pool has fewer free blocks than were asked for."""

    reason = "POOL_EXHAUSTED"


class QueueFullError(InfiniteLLMError):
    """Too many requests wait already; try again later."""

    reason = "QUEUE_FULL"


class SessionRevokedError(InfiniteLLMError):
    """A session with a KV daemon is over."""

    reason = "SESSION_REVOKED"


class StaleGenerationError(InfiniteLLMError):
    """A message named a block that has been given to somebody else since."""

    reason = "STALE_GENERATION"


class TakenOverError(InfiniteLLMError):
    """The request's stream was resumed elsewhere; this one has ended."""

    reason = "TAKEN_OVER"


class UnavailableError(InfiniteLLMError):
    """Something needed is away for the moment; try again."""

    reason = "UNAVAILABLE"


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
    """A connection between services is gone."""

    reason = "PEER_LOST"


class ShuttingDownError(UnavailableError):
    """The service is ending and takes no more work."""

    reason = "SHUTTING_DOWN"


class TransferTimeoutError(InfiniteLLMError):
    """A service did not answer another within its deadline."""

    reason = "TRANSFER_TIMEOUT"


class DeadlineExceededError(InfiniteLLMError):
    """The call's own ``timeout_s`` has passed. Raised here, never sent."""

    reason = "DEADLINE_EXCEEDED"


def all_errors() -> dict[str, type[InfiniteLLMError]]:
    """Every class of the tree by its reason."""
    found: dict[str, type[InfiniteLLMError]] = {}
    todo: list[type[InfiniteLLMError]] = [InfiniteLLMError]
    while todo:
        cls = todo.pop()
        found[cls.reason] = cls
        todo.extend(cls.__subclasses__())
    return found
