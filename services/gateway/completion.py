"""Events of a generation as OpenAI's (legacy) completion objects, whole or in chunks."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from services.gateway.openai_types import CompletionRequest
from services.gateway.requests import Finished, GenerationRequest, NewTokens, PositionLogprobs
from services.gateway.tokenizer import Tokenizer

# JSON has no -inf; this is what other servers answer for an impossible token.
MIN_LOGPROB = -9999.0
_NO_TOKENS = NewTokens((), (), ())
_PLACEHOLDER = "\0"
# As ``to_json`` writes a text, without what it costs to find out that it is one.
_quote = json.encoder.encode_basestring


class CompletionRenderer:
    """Renders one generation as JSON."""

    def __init__(self, asked: CompletionRequest, request: GenerationRequest, model: str, tokenizer: Tokenizer) -> None:
        self._asked = asked
        self._request = request
        self._model = model
        self._tokenizer = tokenizer
        self._created = int(time.time())
        self._text_length = 0
        self._chunks = 0
        self._include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        # Where chunks differ in their text alone, everything around it is written once.
        self._around: tuple[str, str] | None = None
        if asked.logprobs is None and not asked.return_token_ids:
            before, _, after = _text(self._chunk(_NO_TOKENS, _PLACEHOLDER, None)).rpartition(_quote(_PLACEHOLDER))
            self._around = before, after

    def tokens_chunk(self, tokens: NewTokens) -> bytes:
        """A chunk of a stream."""
        if self._around is not None:
            before, after = self._around
            return f"{before}{_quote(tokens.text)}{after}".encode()
        return to_json(self._chunk(tokens, tokens.text, None))

    def last_chunks(self, finished: Finished) -> list[bytes]:
        """The end of a stream: the reason, then the usage where it was asked for."""
        chunks = [to_json(self._chunk(_NO_TOKENS, finished.text, finished.reason))]
        if self._include_usage:
            chunks.append(to_json(self._completion([]) | {"usage": _usage(finished)}))
        return chunks

    def whole(self, tokens: list[NewTokens], finished: Finished) -> bytes:
        """The answer without a stream."""
        together = NewTokens(
            tuple(token for part in tokens for token in part.ids),
            tuple(text for part in tokens for text in part.texts),
            tuple(position for part in tokens for position in part.logprobs),
        )
        choice = self._choice(together, together.text + finished.text, finished.reason)
        return to_json(self._completion([choice]) | {"usage": _usage(finished)})

    def _chunk(self, tokens: NewTokens, text: str, finish_reason: str | None) -> dict[str, Any]:
        completion = self._completion([self._choice(tokens, text, finish_reason)])
        self._chunks += 1
        return completion | {"usage": None} if self._include_usage else completion

    def _completion(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._request.request_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, tokens: NewTokens, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "text": text,
            "logprobs": self._logprobs(tokens) if self._asked.logprobs is not None and tokens.ids else None,
            "finish_reason": finish_reason,
        }
        if self._asked.return_token_ids:
            choice["token_ids"] = list(tokens.ids)
            if self._chunks == 0:
                choice["prompt_token_ids"] = list(self._request.prompt_ids)
        self._text_length += len(text)
        return choice

    def _logprobs(self, tokens: NewTokens) -> dict[str, Any]:
        """``text_offset`` counts characters of the answer; a token whose character is held back adds none."""
        offsets, offset = [], self._text_length
        for text in tokens.texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in tokens.ids],
            "token_logprobs": [_finite(position.logprob) for position in tokens.logprobs],
            "top_logprobs": [
                self._top(token_id, position) for token_id, position in zip(tokens.ids, tokens.logprobs, strict=False)
            ],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, position: PositionLogprobs) -> dict[str, float]:
        """The most probable tokens, and the drawn one in any case."""
        top: dict[str, float] = {}
        wanted = self._asked.logprobs or 0
        for other, logprob in zip(position.top_ids[:wanted], position.top_logprobs[:wanted], strict=True):
            # Two tokens may look the same; the more probable one comes first.
            top.setdefault(self._tokenizer.token_text(other), _finite(logprob))
        top.setdefault(self._tokenizer.token_text(token_id), _finite(position.logprob))
        return top


def to_json(value: dict[str, Any]) -> bytes:
    """The one way in which answers are written."""
    return _text(value).encode()


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else MIN_LOGPROB
