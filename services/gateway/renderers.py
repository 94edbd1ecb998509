"""Which renderers write an answer, in a form that the journal can keep: another gateway goes on writing in its way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.chat import ChatRenderer
from services.gateway.completion import CompletionRenderer
from services.gateway.completion_logprobs import Echo
from services.gateway.openai_chat import ChatRequest
from services.gateway.openai_types import CompletionRequest
from services.gateway.rendering import Frame, Renderer
from services.gateway.requests import GenerationRequest
from services.gateway.tokenizer import Tokenizer

# Stand for what is not kept a second time, beside the prompt's token ids.
_NO_PROMPT = {"prompt": ""}
_NO_MESSAGES = {"messages": [{"role": "user"}]}


def rendering_of(asked: CompletionRequest | ChatRequest) -> str:
    """What ``Renderers.of`` needs, as JSON."""
    kind, apart = ("chat", "messages") if isinstance(asked, ChatRequest) else ("completion", "prompt")
    # Token ids would not tell exactly how the text of a prompt was written that is to be shown.
    echoed = isinstance(asked, CompletionRequest) and asked.echo and isinstance(asked.the_prompt(), str)
    exclude = set() if echoed else {apart}
    return json.dumps({kind: asked.model_dump(mode="json", by_alias=True, exclude=exclude, exclude_unset=True)})


@dataclass(frozen=True, slots=True)
class Renderers:
    """Of one answer: of each of its choices, and what is around them."""

    frame: Frame
    choices: Sequence[Renderer]

    @classmethod
    async def of(cls, requests: Sequence[GenerationRequest], model: str, tokenizer: Tokenizer) -> Renderers:
        """For requests of either API, one for each choice.

        One that came over gRPC is written as a completion that shows its token ids.
        """
        first = requests[0]
        kept = json.loads(first.rendering) if first.rendering else {"completion": {"return_token_ids": True}}
        if "chat" in kept:
            chat = ChatRequest.model_validate(kept["chat"] | _NO_MESSAGES)
            frame, calls_tools = Frame(chat, first, model), bool(chat.offered_tools)
            return cls(
                frame,
                [ChatRenderer(chat, frame, index, one, tokenizer, calls_tools) for index, one in enumerate(requests)],
            )
        asked = CompletionRequest.model_validate(_NO_PROMPT | kept["completion"])
        frame, text = Frame(asked, first, model), ""
        if asked.echo and "prompt" in kept["completion"]:
            text = str(asked.the_prompt())
        elif asked.echo and tokenizer.has_text:
            text = await tokenizer.decode(first.prompt_ids)

        def echo() -> Echo | None:
            return Echo(text, first.prompt_ids, tokenizer, asked.logprobs or 0) if asked.echo else None

        return cls(
            frame,
            [CompletionRenderer(asked, frame, index, one, tokenizer, echo()) for index, one in enumerate(requests)],
        )
