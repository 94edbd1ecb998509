"""A checkpoint's chat template: messages to the text that its model was trained on.

Templates are Jinja, in the dialect that transformers gives them: blocks leave no empty lines behind,
``raise_exception``, ``strftime_now``, a ``tojson`` that leaves non-ASCII letters and HTML alone, loops with ``break``,
and ``{% generation %}`` around what the model says itself. They come from the checkpoint and run in a sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.core.errors import ConfigError, InvalidRequestError
from services.gateway.openai_chat import ChatMessage, Tool

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled template.

    Args:
        source: in Jinja.
        special_tokens: their texts, by the names that templates know them by.

    Raises:
        ConfigError: it is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"chat template: line {getattr(error, 'lineno', '?')}: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt, up to where the assistant's next message begins.

        Raises:
            InvalidRequestError: the template does not take these messages, or no tools.
        """
        if tools and not self._takes_tools:
            raise InvalidRequestError("tools: the model's chat template has no place for them; leave them out")
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=list(tools) or None,
                documents=None,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequestError(f"messages: the model's chat template refuses them: {error}") from error


def render_chat(template: ChatTemplate | None, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> str:
    """The prompt that messages make.

    Raises:
        InvalidRequestError: the model has no template, or refuses these messages.
    """
    if template is None:
        raise InvalidRequestError(
            "this model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja): "
            "use /v1/completions"
        )
    return template.render(
        [message.for_template() for message in messages], [tool.model_dump(exclude_none=True) for tool in tools]
    )


def load_chat_template(directory: Path) -> ChatTemplate | None:
    """A checkpoint's own template; None where it has none.

    Raises:
        ConfigError: it cannot be read.
    """
    config_file, template_file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
        source = template_file.read_text(encoding="utf-8") if template_file.exists() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}: the chat template cannot be read: {error}") from error
    if isinstance(source, list):  # several, by name
        source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}.get(
            "default"
        )
    if not isinstance(source, str):
        return None
    tokens = {name: _text_of(config.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text is not None})


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what is trained on, and means nothing here."""

    tags = {"generation"}  # noqa: RUF012 as Jinja has it

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, indent: int | None = None, **_: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _text_of(token: object) -> str | None:
    """A token's text, which older files wrap in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
