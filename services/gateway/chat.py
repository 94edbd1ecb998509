"""A generation as OpenAI's chat completion object."""

from __future__ import annotations

from typing import Any

from services.gateway.openai_chat import ChatRequest
from services.gateway.rendering import Frame, Renderer, finite
from services.gateway.requests import GenerationRequest, NewTokens
from services.gateway.tokenizer import Tokenizer
from services.gateway.tool_calls import ToolCall, ToolCallParser


class ChatRenderer(Renderer):
    """Renders one choice as the assistant's message.

    Args:
        calls_tools: whether calls of tools are taken out of the text.
    """

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        asked: ChatRequest,
        frame: Frame,
        index: int,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        calls_tools: bool,
    ) -> None:
        self._top = asked.shown_logprobs
        self._shows_ids = bool(asked.return_token_ids)
        self._parser = ToolCallParser() if calls_tools else None
        super().__init__(frame, index, request, tokenizer, self._top is not None or self._shows_ids or calls_tools)

    def chunk_choice(self, tokens: NewTokens, text: str, finish_reason: str | None) -> dict[str, Any]:
        content, calls = self._parse(text, finish_reason)
        delta: dict[str, Any] = {"content": content}
        if self.chunks == 0:
            delta = {"role": "assistant", **delta}
        if calls:
            delta["tool_calls"] = [{"index": call.index, **call.as_json()} for call in calls]
        return self._choice("delta", delta, tokens, finish_reason)

    def whole_choice(self, tokens: NewTokens, text: str, finish_reason: str) -> dict[str, Any]:
        content, calls = self._parse(text, finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [call.as_json() for call in calls]}
        return self._choice("message", message, tokens, finish_reason)

    def _parse(self, text: str, finish_reason: str | None) -> tuple[str, tuple[ToolCall, ...]]:
        """What a piece of the answer shows: text, and calls that became whole with it."""
        if self._parser is None:
            return text, ()
        parsed = self._parser.push(text)
        if finish_reason is None:
            return parsed.content, parsed.calls
        rest = self._parser.flush()
        return parsed.content + rest.content, parsed.calls + rest.calls

    def _choice(
        self, kind: str, content: dict[str, Any], tokens: NewTokens, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {
            "index": self.index,
            kind: content,
            "logprobs": self._logprobs(tokens) if self._top is not None and tokens.ids else None,
            "finish_reason": "tool_calls"
            if finish_reason == "stop" and self._parser is not None and self._parser.found
            else finish_reason,
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
