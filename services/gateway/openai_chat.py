"""The request of OpenAI's ``POST /v1/chat/completions``, validated."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.openai_errors import ApiError
from services.gateway.openai_types import MAX_LOGPROBS, Neutral, SamplingRequest

MAX_MESSAGES = 65536


class TextPart(BaseModel):
    """A piece of a message. There are no others: a model of this server reads text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. The model's template decides which roles there are and what it does with further fields."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        text = "\n".join(part.text for part in content) if isinstance(content, list) else content
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatRequest(SamplingRequest):
    """The body of a chat request."""

    neutral: ClassVar[Neutral] = {
        **SamplingRequest.neutral,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def model_post_init(self, _: object) -> None:
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens

    @property
    def shown_logprobs(self) -> int | None:
        """Of how many of the most probable tokens; None: none were asked for.

        Raises: ApiError for ``top_logprobs`` alone.
        """
        if not self.logprobs:
            if self.top_logprobs:
                raise ApiError(400, "top_logprobs: only with logprobs: true", "top_logprobs")
            return None
        return self.top_logprobs or 0
