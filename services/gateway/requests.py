"""A generation request and its events, as the gateway knows them inside: neither HTTP nor gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from services.core.shaping import UNSHAPED, LogitShaping
from services.core.structure import Structure

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int]
Operation = Literal["text_completion", "chat"]  # as OpenTelemetry's gen_ai.operation.name has them


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; ``seed`` None draws a random one, ``logprobs`` 0 asks for none.

    Attributes:
        stop_token_ids: end the answer, besides the model's own, which ``ignore_eos`` leaves out.
        stop: end the answer where the text contains one of them, not counted before ``min_tokens``.
        include_stop: that string is the end of the text; otherwise what comes before it.
        structure: what the answer must look like; tokens that end it are drawn only where it is complete.
        prompt_logprobs: as ``logprobs``, of the prompt's tokens.
    """

    max_tokens: int
    temperature: float
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int = 0
    shaping: LogitShaping = UNSHAPED
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    structure: Structure | None = None
    prompt_logprobs: int = 0


class Tenure(NamedTuple):
    """One gateway's time with one request: it ends when another gateway, or the same one again, takes it over."""

    request_id: str
    takeovers: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """An admitted request: tokenized, checked against the model's limits, with a seed of its own.

    Attributes:
        request_id: "cmpl-..."; every log line and every service names it.
        prompt_ids: at least one id, each below the model's vocabulary size.
        seed: token i is drawn by (seed, i); a continuation elsewhere draws the same numbers.
        stop_token_ids: all tokens that end the answer.
        stop, include_stop, structure, prompt_logprobs: see ``Sampling``.
        progress: prefill progress is wanted.
        arrival_time: Unix time in seconds.
        traceparent: of its span, as W3C's Trace Context writes it; empty where it is not traced.
        model: the name of the model that it was admitted for.
        rendering: how its API writes the answer, as renderers.py takes it; "" says nothing.
        key_name: name of the API key that it came with; "" where none is asked for.
        operation: what its API calls it.
        choices: answers that were asked for to this prompt, where this is the first one of them.
        takeovers: how often it went from one gateway to another.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float
    seed: int
    stop_token_ids: tuple[int, ...]
    logprobs: int
    progress: bool
    arrival_time: float
    shaping: LogitShaping = UNSHAPED
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    traceparent: str = ""
    structure: Structure | None = None
    prompt_logprobs: int = 0
    model: str = ""
    rendering: str = ""
    key_name: str = ""
    operation: Operation = "text_completion"
    choices: int = 1
    takeovers: int = 0

    @property
    def tenure(self) -> Tenure:
        return Tenure(self.request_id, self.takeovers)

    @property
    def instance_request_id(self) -> str:
        """Its name at instances: one that was taken over may still be computed there for the gateway before."""
        return f"{self.request_id}.{self.takeovers}" if self.takeovers else self.request_id


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Natural log-probabilities at one position: those of the token there, and the ``k`` largest, descending."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


# What an instance says of a request.


@dataclass(frozen=True, slots=True)
class TokensDrawn:
    """``logprobs`` has one element for each id, or none; so many tokens of the request were found cached there."""

    ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the prompt's tokens number ``first``, ``first + 1``, ...; number 0 has none, as nothing predicts it.

    A prompt's parts follow one another without gap, before its first token.
    """

    first: int
    logprobs: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Prefill: tokens computed so far, of how many."""

    computed: int
    total: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The instance's last word on a request."""

    reason: FinishReason


InstanceEvent = TokensDrawn | PromptLogprobs | Progress | Ended


# What a client is told of a request; Progress is passed on, and PromptLogprobs are once.


@dataclass(frozen=True, slots=True)
class NewTokens:
    """New tokens; ``texts`` is what each of them added to the text (a character held back adds nothing yet)."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    logprobs: tuple[PositionLogprobs, ...]

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Repeated:
    """What tokens that the client has already added to the text: not sent again, but a renderer must know of it."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end. ``text`` is what was held back until now and never became a whole character."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    text: str


Event = NewTokens | Repeated | PromptLogprobs | Progress | Finished
