"""Events of a generation as the JSON of OpenAI's API, whole or in chunks: what its objects have in common."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from services.gateway.openai_types import SamplingRequest
from services.gateway.requests import Finished, GenerationRequest, NewTokens, PromptLogprobs
from services.gateway.tokenizer import Tokenizer

# JSON has no -inf; this is what other servers answer for an impossible token.
MIN_LOGPROB = -9999.0
NO_TOKENS = NewTokens((), (), ())
_PLACEHOLDER = "\0"
# As ``to_json`` writes a text, without what it costs to find out that it is one.
_quote = json.encoder.encode_basestring


class Frame:
    """What is around the choices of one answer.

    Args:
        first: the request of its first choice, whose id is the client's name for the answer.
    """

    def __init__(self, asked: SamplingRequest, first: GenerationRequest, model: str) -> None:
        self.asks_for_usage = asked.asks_for_usage
        self._answer_id = first.request_id
        self._model = model
        self._created = int(first.arrival_time)  # at every gateway the same

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._answer_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


class Renderer(ABC):
    """Renders one choice of an answer as JSON.

    Args:
        shows_tokens: whether chunks differ in more than their text.
    """

    whole_object: str
    chunk_object: str

    def __init__(
        self, frame: Frame, index: int, request: GenerationRequest, tokenizer: Tokenizer, shows_tokens: bool
    ) -> None:
        self.index = index
        self.request = request
        self.tokenizer = tokenizer
        self.chunks = 0
        self._frame = frame
        self._shows_tokens = shows_tokens
        self._around: tuple[str, str] | None = None  # of the second chunk's text, and of all chunks behind it

    @abstractmethod
    def chunk_choice(self, tokens: NewTokens, text: str, finish_reason: str | None) -> dict[str, Any]:
        """The choice in a chunk."""

    @abstractmethod
    def whole_choice(self, tokens: NewTokens, text: str, finish_reason: str) -> dict[str, Any]:
        """The choice in the whole answer."""

    def take_prompt(self, told: PromptLogprobs) -> None:
        """A part of what the first chunk tells of the prompt. It comes before that chunk, where it was asked for."""
        return

    def tokens_chunk(self, tokens: NewTokens) -> bytes:
        """A chunk of a stream."""
        if self._shows_tokens or self.chunks == 0:
            return to_json(self._chunk(tokens, tokens.text, None))
        if self._around is None:  # chunks differ in their text alone: everything around it is written once
            before, _, after = _text(self._chunk(NO_TOKENS, _PLACEHOLDER, None)).rpartition(_quote(_PLACEHOLDER))
            self._around = before, after
        before, after = self._around
        return f"{before}{_quote(tokens.text)}{after}".encode()

    def last_chunk(self, finished: Finished) -> bytes:
        """The end of this choice's chunks, with the reason."""
        return to_json(self._chunk(NO_TOKENS, finished.text, finished.reason))

    def whole(self, tokens: list[NewTokens], finished: Finished) -> dict[str, Any]:
        """The choice without a stream."""
        together = NewTokens(
            tuple(token for part in tokens for token in part.ids),
            tuple(text for part in tokens for text in part.texts),
            tuple(position for part in tokens for position in part.logprobs),
        )
        return self.whole_choice(together, together.text + finished.text, finished.reason)

    def _chunk(self, tokens: NewTokens, text: str, finish_reason: str | None) -> dict[str, Any]:
        chunk = self._frame.object(self.chunk_object, [self.chunk_choice(tokens, text, finish_reason)])
        self.chunks += 1
        return chunk | {"usage": None} if self._frame.asks_for_usage else chunk


def whole_answer(
    frame: Frame, renderers: Sequence[Renderer], tokens: Sequence[list[NewTokens]], ends: Sequence[Finished]
) -> bytes:
    """The answer without a stream, of one element for each choice."""
    choices = [
        renderer.whole(of_choice, finished)
        for renderer, of_choice, finished in zip(renderers, tokens, ends, strict=True)
    ]
    return to_json(frame.object(renderers[0].whole_object, choices) | {"usage": _usage(ends)})


def usage_chunk(frame: Frame, renderers: Sequence[Renderer], ends: Sequence[Finished]) -> bytes:
    """What ends a stream where it was asked for."""
    return to_json(frame.object(renderers[0].chunk_object, []) | {"usage": _usage(ends)})


def to_json(value: dict[str, Any]) -> bytes:
    """The one way in which answers are written."""
    return _text(value).encode()


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else MIN_LOGPROB


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _usage(ends: Sequence[Finished]) -> dict[str, Any]:
    """Of all choices; their one prompt counts once."""
    first = ends[0]
    completion_tokens = sum(finished.completion_tokens for finished in ends)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": first.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
    }
