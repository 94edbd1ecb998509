"""Which renderer writes an answer, in a form that the journal can keep: another gateway goes on writing in its way."""

from __future__ import annotations

import json

from services.gateway.chat import ChatRenderer
from services.gateway.completion import CompletionRenderer
from services.gateway.openai_chat import ChatRequest
from services.gateway.openai_types import CompletionRequest
from services.gateway.rendering import Renderer
from services.gateway.requests import GenerationRequest
from services.gateway.tokenizer import Tokenizer

# Stand for what is not kept a second time, beside the prompt's token ids.
_NO_PROMPT = {"prompt": ""}
_NO_MESSAGES = {"messages": [{"role": "user"}]}


def rendering_of(asked: CompletionRequest | ChatRequest) -> str:
    """What ``renderer_of`` needs, as JSON."""
    kind = "chat" if isinstance(asked, ChatRequest) else "completion"
    return json.dumps({kind: asked.model_dump(mode="json", exclude={"prompt", "messages"}, exclude_unset=True)})


def renderer_of(request: GenerationRequest, model: str, tokenizer: Tokenizer) -> Renderer:
    """Of a request of either API; one that came over gRPC is written as a completion that shows its token ids."""
    kept = json.loads(request.rendering) if request.rendering else {"completion": {"return_token_ids": True}}
    if "chat" in kept:
        return ChatRenderer(ChatRequest.model_validate(kept["chat"] | _NO_MESSAGES), request, model, tokenizer)
    asked = CompletionRequest.model_validate(kept["completion"] | _NO_PROMPT)
    return CompletionRenderer(asked, request, model, tokenizer)
