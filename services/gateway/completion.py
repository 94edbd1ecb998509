"""A generation as OpenAI's (legacy) completion object."""

from __future__ import annotations

from typing import Any

from services.gateway.completion_logprobs import CompletionLogprobs, Echo
from services.gateway.openai_types import CompletionRequest
from services.gateway.rendering import Frame, Renderer
from services.gateway.requests import GenerationRequest, NewTokens, PromptLogprobs
from services.gateway.tokenizer import Tokenizer


class CompletionRenderer(Renderer):
    """Renders one choice; a chunk looks like the whole.

    Args:
        echo: comes before the answer's text; None: nothing does.
    """

    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        asked: CompletionRequest,
        frame: Frame,
        index: int,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        echo: Echo | None,
    ) -> None:
        shows_tokens = asked.logprobs is not None or bool(asked.return_token_ids)
        super().__init__(frame, index, request, tokenizer, shows_tokens)
        self._asked = asked
        self._echo = echo
        self._text_length = len(echo.text) if echo is not None else 0

    def chunk_choice(self, tokens: NewTokens, text: str, finish_reason: str | None) -> dict[str, Any]:
        echo = self._echo if self.chunks == 0 else None
        choice: dict[str, Any] = {
            "index": self.index,
            "text": text if echo is None else echo.text + text,
            "logprobs": self._logprobs(tokens, echo),
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

    def take_prompt(self, told: PromptLogprobs) -> None:
        if self._echo is not None:
            self._echo.take(told)

    def _logprobs(self, tokens: NewTokens, echo: Echo | None) -> dict[str, Any] | None:
        """``text_offset`` counts characters of the choice's text; a token whose character is held back adds none."""
        if self._asked.logprobs is None or not (tokens.ids or echo):
            return None
        logprobs = CompletionLogprobs(self.tokenizer, self._asked.logprobs) if echo is None else echo.logprobs
        offset = self._text_length
        # What is repeated for a resumed stream has a text only, and is not shown.
        for token_id, text, position in zip(tokens.ids, tokens.texts, tokens.logprobs, strict=False):
            logprobs.add(token_id, position, offset)
            offset += len(text)
        return logprobs.as_json()
