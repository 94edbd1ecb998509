"""One request as the engine sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from services.core.shaping import UNSHAPED, LogitShaping
from services.core.structure import Structure
from services.core.trace_context import TraceContext


class RequestAge(NamedTuple):
    """Orders requests, the same everywhere in the cluster: the smaller, the older.

    Attributes:
        arrival_time: Unix seconds, as the gateway saw it.
    """

    arrival_time: float
    request_id: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when they end.

    Attributes:
        temperature: 0 is greedy.
        seed: token i (counted from the end of the prompt) is drawn with random numbers keyed by (seed, i) alone.
        max_tokens: tokens to generate at most.
        stop_token_ids: drawing one of these ends the request; it is the last token of the answer.
        logprobs: report the log-probabilities of this many most probable tokens; 0 reports none. They are the model's
            own, before anything is done to them.
        structure: what the answer must look like. ``stop_token_ids`` are drawn only where it is complete.
        prompt_logprobs: likewise of the prompt's tokens, and then ``max_tokens`` may be 0: nothing is drawn.
    """

    temperature: float
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int = 0
    shaping: LogitShaping = UNSHAPED
    structure: Structure | None = None
    prompt_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What a gateway submits.

    Attributes:
        token_ids: the prompt, followed by what was generated already if the request is continued here.
        prompt_tokens: length of the prompt proper.
        arrival_time: Unix seconds; its age, which decides who is preempted.
        stream_id: the gateway stream that gets its tokens.
        cache_salt: separates tenants in the block keys.
        trace: the gateway's span; None where the request is not traced.
    """

    request_id: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    sampling: SamplingParams
    arrival_time: float
    stream_id: int
    progress: bool = False
    cache_salt: bytes = b""
    trace: TraceContext | None = None


class SequenceState(Enum):
    WAITING = "waiting"  # holds no memory
    RESERVING = "reserving"  # its blocks are being reserved
    RUNNING = "running"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way: its tokens and how many of them have their KV computed. Written by the engine thread only.

    Attributes:
        tokens: prompt and generated tokens; only grows.
        computed: tokens whose K and V stand in blocks, committed after a step's last layer.
        cached_tokens: tokens that were attached to and not computed, at the latest admission.
        computed_before: tokens whose KV had been computed, here or at another instance, when it was lost or given up.
        scored: the prompt's first tokens whose log-probabilities have been told or are not wanted. Nothing predicts the
            first one.
        keys: of its full blocks, as far as they were needed; they depend on the tokens alone.
        trace: the span that what is done for it elsewhere belongs to.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    cached_tokens: int = 0
    computed_before: int = 0
    scored: int = 1
    keys: list[bytes] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING
    trace: TraceContext | None = None

    def __post_init__(self) -> None:
        self.trace = self.request.trace
        self.tokens = list(self.request.token_ids)
        if self.generated:  # elsewhere; the last token is still to compute
            self.computed_before = len(self.tokens) - 1
        if not self.request.sampling.prompt_logprobs:
            self.scored = self.request.prompt_tokens

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def age(self) -> RequestAge:
        return RequestAge(self.request.arrival_time, self.request.request_id)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.request.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens still to compute: 1 in decode, more in prefill."""
        return len(self.tokens) - self.computed

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to be told."""
        return self.scored < self.request.prompt_tokens

    @property
    def cacheable(self) -> int:
        """How many of the first tokens need not be computed where they are cached: the others' logits are wanted."""
        return self.scored - 1 if self.scores else len(self.tokens) - 1

    def recomputed(self, count: int) -> int:
        """How many of the last ``count`` computed tokens had been computed before."""
        return max(0, min(self.computed, self.computed_before) - (self.computed - count))
