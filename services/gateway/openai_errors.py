"""OpenAI's error shape: ``{"error": {"message", "type", "param", "code"}}``, whatever went wrong."""

from __future__ import annotations

import json

from services.core.errors import InfiniteLLMError

_STATUS = {
    "INVALID_REQUEST": 400,
    "UNAUTHENTICATED": 401,
    "CONTEXT_TOO_LONG": 400,
    "MODEL_NOT_FOUND": 404,
    "REQUEST_NOT_FOUND": 404,
    "TAKEN_OVER": 409,
    "RESYNC_REQUIRED": 409,
    "QUEUE_FULL": 429,
    "POOL_EXHAUSTED": 503,
    "UNAVAILABLE": 503,
    "NO_INSTANCE": 503,
    "JOURNAL_UNAVAILABLE": 503,
    "PEER_LOST": 503,
    "SHUTTING_DOWN": 503,
    "SESSION_REVOKED": 503,
    "TRANSFER_TIMEOUT": 503,
}
_CODE = {
    "CONTEXT_TOO_LONG": "context_length_exceeded",
    "QUEUE_FULL": "rate_limit_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
}
# What a client should do about load and outages: come back after so many seconds.
RETRY_AFTER_S = 1


class ApiError(Exception):
    """An answer other than the one asked for.

    Args:
        param: the request's field that was wrong.
        code: short name of the reason.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status == 503:
            return "service_unavailable"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> bytes:
        """The JSON object, in UTF-8."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode()

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}


def api_error(error: InfiniteLLMError) -> ApiError:
    """The answer for an error of the project's tree."""
    code = _CODE.get(error.reason, error.reason.lower())
    return ApiError(_STATUS.get(error.reason, 500), str(error), code=code)
