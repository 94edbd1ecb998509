"""What the engine tells the outside: the outputs of a step, and a snapshot of what runs where."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import InfiniteLLMError
from services.core.placement import RunningRequest, WaitingRequest
from services.core.sequence import RequestAge
from services.instance.logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """A token was drawn for a request, of which ``cached_tokens`` were attached to and not computed."""

    request_id: str
    stream_id: int
    token_id: int
    logprobs: TokenLogprobs | None
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class PromptOutput:
    """Log-probabilities of the prompt's tokens number ``first``, ``first + 1``, ..."""

    request_id: str
    stream_id: int
    first: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class ProgressOutput:
    request_id: str
    stream_id: int
    computed_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class FinishOutput:
    """A request ended with its last token, or its prompt where none is drawn: reason "stop" or "length"."""

    request_id: str
    stream_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class FailOutput:
    """A request that cannot be served."""

    request_id: str
    stream_id: int
    error: InfiniteLLMError


Output = TokenOutput | PromptOutput | ProgressOutput | FinishOutput | FailOutput


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What the outside may know of the engine.

    Attributes:
        placement: for each running request, its blocks on each daemon.
        oldest_starving: the oldest request that cannot go on for want of blocks.
        progress: of the running requests.
        queue: the waiting requests, oldest first, MOST_WAITING_TOLD of them.
    """

    running: int = 0
    waiting: int = 0
    placement: tuple[tuple[str, dict[str, int]], ...] = ()
    oldest_starving: RequestAge | None = None
    progress: tuple[RunningRequest, ...] = ()
    queue: tuple[WaitingRequest, ...] = ()
