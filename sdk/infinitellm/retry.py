"""When a call is made again, and where: the same rules for threads and for asyncio, without any I/O."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from infinitellm.errors import (
    DeadlineExceededError,
    InfiniteLLMError,
    JournalUnavailableError,
    PeerLostError,
    QueueFullError,
    RequestNotFoundError,
    ResyncRequiredError,
    UnavailableError,
)
from infinitellm.types import Event, Finished, PromptLogprobs, Tokens
from infinitellm.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a call is made again after an error that may pass: ``UnavailableError`` and its kinds, ``QueueFullError``.

    Every call of this API may be made again: it changes nothing but itself.

    Attributes:
        attempts: failed calls in a row, without a token between, after which the error is raised; 1 never tries again.
        first_backoff_s: pause before the second attempt, less a random part; doubled for each further one ...
        max_backoff_s: ... up to this.
    """

    attempts: int = 6
    first_backoff_s: float = 0.1
    max_backoff_s: float = 2.0


class Attempts:
    """The calls that one operation takes.

    Args:
        timeout_s: of all of them together.
    """

    def __init__(self, policy: RetryPolicy, timeout_s: float) -> None:
        self._policy = policy
        self._deadline = time.monotonic() + timeout_s
        self._failures = 0

    def timeout_s(self) -> float:
        """Of the next call. Raises DeadlineExceededError."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceededError("the call's timeout_s has passed")
        return left_s

    def succeeded(self) -> None:
        """Something new has come: failures are counted from here."""
        self._failures = 0

    def pause_s(self, error: InfiniteLLMError) -> float:
        """How long to wait before the next call. Raises the error where there is to be none."""
        self._failures += 1
        if not isinstance(error, UnavailableError | QueueFullError) or self._failures >= self._policy.attempts:
            raise error
        backoff_s = min(self._policy.first_backoff_s * 2.0 ** (self._failures - 1), self._policy.max_backoff_s)
        pause_s = backoff_s * random.uniform(0.5, 1.0)
        if time.monotonic() + pause_s >= self._deadline:
            raise error
        return pause_s


class GenerationStream:
    """One generation, over as many calls as it takes.

    A stream that breaks off is resumed by the request's id. Where the journal does not know it, or cannot be read, the
    request is sent again with the tokens that have come, and the answer goes on behind them all the same.
    """

    def __init__(self, request: inference_pb2.GenerateRequest, attempts: Attempts) -> None:
        self._request = request
        self._attempts = attempts
        self._request_id = ""
        self._received: list[int] = []
        self._scored = 1  # tokens of the prompt whose log-probabilities have come; the first one has none
        self._resumable = False
        self._has_last_text = False
        self.finished = False

    def next_request(self) -> inference_pb2.GenerateRequest | inference_pb2.ResumeRequest:
        """What to call next: Generate or Resume."""
        received = inference_pb2.TokenIds(ids=self._received)
        if self._resumable:
            return inference_pb2.ResumeRequest(request_id=self._request_id, received=received)
        if self._received:
            self._request.received.CopyFrom(received)
        return self._request

    def timeout_s(self) -> float:
        """Of the next call. Raises DeadlineExceededError."""
        return self._attempts.timeout_s()

    def take(self, event: Event) -> Event | None:
        """An event that came; None if the caller has had it."""
        if event.request_id != self._request_id:
            self._request_id, self._resumable = event.request_id, True
        if isinstance(event, Finished):
            self.finished = True
        elif isinstance(event, PromptLogprobs):
            untold = event.logprobs[max(0, self._scored - event.first) :]
            if not untold:
                return None  # a stream that broke off before the first token tells of the prompt from its beginning
            event = PromptLogprobs(event.request_id, event.first + len(event.logprobs) - len(untold), untold)
            self._scored += len(untold)
            self._attempts.succeeded()
        elif isinstance(event, Tokens):
            self._attempts.succeeded()
            self._received += event.ids
            if not event.ids:  # the text held back until the end, which a resumed stream tells again
                if self._has_last_text:
                    return None
                self._has_last_text = True
        elif self._received:
            return None  # how far a lost instance's work has been done again
        return event

    def pause_s(self, error: InfiniteLLMError) -> float:
        """How long to wait before the next call. Raises the error where there is to be none."""
        if self._resumable and isinstance(error, RequestNotFoundError | JournalUnavailableError | ResyncRequiredError):
            self._resumable = False
            return 0.0
        return self._attempts.pause_s(error)


def ended_early() -> PeerLostError:
    """For a stream that ended without an error and without ``Finished``."""
    return PeerLostError("the gateway ended the stream before the answer was complete")
