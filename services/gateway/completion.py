"""A generation as OpenAI's (legacy) completion object."""

from __future__ import annotations

from typing import Any

from services.gateway.openai_types import CompletionRequest
from services.gateway.rendering import Frame, Renderer, finite
from services.gateway.requests import GenerationRequest, NewTokens, PositionLogprobs
from services.gateway.tokenizer import Tokenizer


class CompletionRenderer(Renderer):
    """Renders one choice; a chunk looks like the whole.

    Args:
        echo: comes before the answer's text.
    """

    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        asked: CompletionRequest,
        frame: Frame,
        index: int,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        echo: str,
    ) -> None:
        shows_tokens = asked.logprobs is not None or bool(asked.return_token_ids)
        super().__init__(frame, index, request, tokenizer, shows_tokens)
        self._asked = asked
        self._echo = echo
        self._text_length = 0

    def chunk_choice(self, tokens: NewTokens, text: str, finish_reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": self.index,
            "text": self._echo + text if self.chunks == 0 else text,
            "logprobs": self._logprobs(tokens) if self._asked.logprobs is not None and tokens.ids else None,
            "finish_reason": finish_reason,
        }
        if self._asked.return_token_ids:
            choice["token_ids"] = list(tokens.ids)
            if self.chunks == 0:
                choice["prompt_token_ids"] = list(self.request.prompt_ids)
        self._text_length += len(text)
        return choice

    def whole_choice(self, tokens: NewTokens, text: str, finish_reason: str) -> dict[str, Any]:
        return self.chunk_choice(tokens, text, finish_reason)

    def _logprobs(self, tokens: NewTokens) -> dict[str, Any]:
        """``text_offset`` counts characters of the answer; a token whose character is held back adds none."""
        offsets, offset = [], self._text_length
        for text in tokens.texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": [self.tokenizer.token_text(token_id) for token_id in tokens.ids],
            "token_logprobs": [finite(position.logprob) for position in tokens.logprobs],
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
            top.setdefault(self.tokenizer.token_text(other), finite(logprob))
        top.setdefault(self.tokenizer.token_text(token_id), finite(position.logprob))
        return top
