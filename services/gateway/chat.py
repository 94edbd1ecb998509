"""A generation as OpenAI's chat completion object."""

from __future__ import annotations

from typing import Any

from services.gateway.openai_chat import ChatRequest
from services.gateway.rendering import Renderer, finite
from services.gateway.requests import GenerationRequest, NewTokens
from services.gateway.tokenizer import Tokenizer


class ChatRenderer(Renderer):
    """Renders one generation as the assistant's message."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, asked: ChatRequest, request: GenerationRequest, model: str, tokenizer: Tokenizer) -> None:
        self._top = asked.shown_logprobs
        self._shows_ids = bool(asked.return_token_ids)
        super().__init__(asked, request, model, tokenizer, self._top is not None or self._shows_ids)

    def chunk_choice(self, tokens: NewTokens, text: str, finish_reason: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text}
        if self.chunks == 0:
            delta = {"role": "assistant", **delta}
        return self._choice("delta", delta, tokens, finish_reason)

    def whole_choice(self, tokens: NewTokens, text: str, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._choice("message", message, tokens, finish_reason)

    def _choice(
        self, kind: str, content: dict[str, Any], tokens: NewTokens, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            kind: content,
            "logprobs": self._logprobs(tokens) if self._top is not None and tokens.ids else None,
            "finish_reason": finish_reason,
        }
        if self._shows_ids:
            choice["token_ids"] = list(tokens.ids)
        return choice

    def _logprobs(self, tokens: NewTokens) -> dict[str, Any]:
        positions = []
        for token_id, position in zip(tokens.ids, tokens.logprobs, strict=True):
            top = zip(position.top_ids[: self._top], position.top_logprobs[: self._top], strict=True)
            positions.append(
                {
                    **self._token(token_id, position.logprob),
                    "top_logprobs": [self._token(other, logprob) for other, logprob in top],
                }
            )
        return {"content": positions}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.token_text(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}
