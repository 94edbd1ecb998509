"""The HTTP API as an OpenAPI document, made of the classes that requests are checked with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.gateway.openai_chat import ChatRequest
from services.gateway.openai_types import CompletionRequest
from services.gateway.tokenize_api import DetokenizeRequest, TokenizeRequest

_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/completions": (CompletionRequest, "Continues a prompt."),
    "/v1/chat/completions": (ChatRequest, "Answers a chat."),
    "/tokenize": (TokenizeRequest, "Token ids of a text or a chat."),
    "/detokenize": (DetokenizeRequest, "The text of token ids."),
}
_READS = {
    "/v1/models": "The served model.",
    "/health": "Whether everything that is needed is there; 503 says what is missing.",
    "/version": "The project's version.",
}
_REF = "#/components/schemas/{model}"
_ANSWERS = {
    "200": {"description": "The answer; server-sent events where a stream was asked for."},
    "default": {
        "description": "An error.",
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
    },
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi(version: str) -> dict[str, Any]:
    """The document, of OpenAPI 3.1."""
    models = [model for model, _ in _BODIES.values()]
    names, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    paths: dict[str, Any] = {}
    for path, (model, summary) in _BODIES.items():
        content = {"application/json": {"schema": names[model, "validation"]}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _ANSWERS}}
    paths |= {path: {"get": {"summary": summary, "responses": _ANSWERS}} for path, summary in _READS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "infinite-llm", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": _ERROR}},
    }
