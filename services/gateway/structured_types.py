"""What a request may say of its answer's form: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.core.structure import Structure
from services.gateway.openai_errors import ApiError

MAX_CHOICES = 1024
_ANY_OBJECT = {"type": "object"}
JsonSchema = dict[str, Any]


class NamedSchema(BaseModel):
    """OpenAI's wrapping of a schema. ``strict`` makes no difference: the answer always fits."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[JsonSchema, Field(alias="schema")]


class ResponseFormat(BaseModel):
    """Text, any JSON object, or JSON by a schema."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def structure(self) -> Structure | None:
        """Raises ApiError, InvalidRequestError."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ApiError(
                400, "response_format.json_schema: needed with type json_schema, and only there", "response_format"
            )
        if self.json_schema is not None:
            return _by_schema(self.json_schema.schema_, "response_format.json_schema.schema")
        return _by_schema(_ANY_OBJECT, "response_format") if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """Exactly one of these. ``json``: a schema, as JSON or as a text of it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    json_: Annotated[JsonSchema | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None

    def structure(self) -> Structure:
        """Raises ApiError, InvalidRequestError."""
        given = [value for value in (self.json_, self.regex, self.choice, self.grammar) if value is not None]
        if len(given) + bool(self.json_object) != 1:
            raise ApiError(
                400,
                "structured_outputs: exactly one of json, json_object, regex, choice and grammar is needed",
                "structured_outputs",
            )
        if self.regex is not None:
            return Structure("regex", self.regex, "structured_outputs.regex")
        if self.choice is not None:
            return Structure("regex", "|".join(map(_literally, self.choice)), "structured_outputs.choice")
        if self.grammar is not None:
            return Structure("grammar", self.grammar, "structured_outputs.grammar")
        if isinstance(self.json_, str):
            return Structure("json_schema", self.json_, "structured_outputs.json")
        return _by_schema(_ANY_OBJECT if self.json_ is None else self.json_, "structured_outputs.json")


def structure_of(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> Structure | None:
    """The form that either asks for. Raises ApiError where both do, InvalidRequestError."""
    asked = None if response_format is None else response_format.structure()
    if structured_outputs is None:
        return asked
    if asked is not None:
        raise ApiError(400, "structured_outputs: not together with a response_format", "structured_outputs")
    return structured_outputs.structure()


def _by_schema(schema: JsonSchema, asked_by: str) -> Structure:
    return Structure("json_schema", json.dumps(schema), asked_by)


def _literally(text: str) -> str:
    """A regular expression for one text."""
    return re.sub(r"[^\w\s]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)
