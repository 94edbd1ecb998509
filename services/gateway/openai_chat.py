"""The request of OpenAI's ``POST /v1/chat/completions``, validated."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.core.structure import Structure
from services.gateway.openai_errors import ApiError
from services.gateway.openai_types import MAX_LOGPROBS, Neutral, SamplingRequest
from services.gateway.tool_calls import calls_grammar

MAX_MESSAGES = 65536
MAX_TOOLS = 128


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
        return {**(self.model_extra or {}), **self._calls(), "role": self.role, "content": text}

    def _calls(self) -> dict[str, Any]:
        """``tool_calls`` with arguments as objects, which templates write as JSON themselves."""
        calls = (self.model_extra or {}).get("tool_calls")
        return {"tool_calls": [_with_object(call) for call in calls]} if isinstance(calls, list) else {}


class FunctionDefinition(BaseModel):
    """``parameters``: a JSON schema; left out, there are none."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class NamedTool(BaseModel):
    """The one function to call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: FunctionName


class ChatRequest(SamplingRequest):
    """The body of a chat request."""

    neutral: ClassVar[Neutral] = {
        **SamplingRequest.neutral,
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
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

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

    @property
    def offered_tools(self) -> list[Tool]:
        """Tools that the model may call here.

        Raises: ApiError for a choice among tools that are not there.
        """
        tools = self.tools or []
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "tools: each function needs a name of its own", "tools")
        if self.tool_choice == "required" and not tools:
            raise ApiError(400, "tool_choice: required, but there are no tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ApiError(400, "tool_choice: no tool has this name", "tool_choice")
        return [] if self.tool_choice == "none" else tools

    def structure(self) -> Structure | None:
        """That of calls where tools must be called; calls or what is asked for otherwise where they may be."""
        otherwise = super().structure()
        tools, several = self.offered_tools, self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            tools, several = [tool for tool in tools if tool.function.name == name], False
        elif self.tool_choice != "required" and (otherwise is None or not tools):
            return otherwise
        if otherwise is not None and (otherwise.kind != "json_schema" or self.tool_choice not in (None, "auto")):
            raise ApiError(
                400,
                "tools: with a structured answer, only tool_choice none, or auto with a JSON schema, is possible",
                "tools",
            )
        schemas = {tool.function.name: tool.function.schema_of_arguments for tool in tools}
        try:
            answer = None if otherwise is None else json.loads(otherwise.text)
        except ValueError:
            raise ApiError(400, "structured_outputs.json: not JSON", "structured_outputs") from None
        if answer is not None and not isinstance(answer, dict):
            raise ApiError(400, "structured_outputs.json: a schema is a JSON object", "structured_outputs")
        return Structure("grammar", calls_grammar(schemas, several, answer), "tools")


def _with_object(call: Any) -> Any:
    """A call whose arguments are an object where they were a text of one."""
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call
    try:
        value = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": value}} if isinstance(value, dict) else call
