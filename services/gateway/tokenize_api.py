"""POST /tokenize and /detokenize, with the bodies that vLLM gives them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from services.core.errors import InvalidRequestError
from services.gateway.chat_template import ChatTemplate, render_chat
from services.gateway.generation_service import GenerationService
from services.gateway.openai_chat import MAX_MESSAGES, ChatMessage
from services.gateway.openai_errors import ApiError
from services.gateway.openai_types import TokenIds, parse_body


class TokenizeRequest(BaseModel):
    """A text or a chat.

    Attributes:
        add_special_tokens: those that the model expects in front of a prompt; a chat's template writes its own.
        return_token_strs: answer each token's text, too.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """Token ids to a text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: TokenIds


async def answer_tokenize(service: GenerationService, template: ChatTemplate | None, body: bytes) -> dict[str, Any]:
    """Raises ApiError, InfiniteLLMError."""
    asked = parse_body(TokenizeRequest, body)
    service.check_model(asked.model or "")
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "prompt, messages: exactly one of them is needed", "prompt")
    if asked.messages is not None:
        tokens = await service.tokenizer.encode(render_chat(template, asked.messages), add_special_tokens=False)
    else:
        tokens = await service.tokenizer.encode(asked.prompt or "", asked.add_special_tokens)
    answer = {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}
    if asked.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token_text(token) for token in tokens]
    return answer


async def answer_detokenize(service: GenerationService, body: bytes) -> dict[str, Any]:
    """Raises ApiError, InfiniteLLMError."""
    asked = parse_body(DetokenizeRequest, body)
    service.check_model(asked.model or "")
    size = service.checkpoint.vocab_size
    wrong = next((token for token in asked.tokens if token >= size), None)
    if wrong is not None:
        raise InvalidRequestError(f"tokens: token id {wrong} is not in the vocabulary of {size} tokens")
    return {"prompt": await service.tokenizer.decode(asked.tokens)}
