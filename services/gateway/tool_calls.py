"""Calls of tools in an answer's text, as Hermes, Qwen and others write them: ``<tool_call>{JSON}</tool_call>``."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.runtime.grammars import json_grammar

_BEGIN, _END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; ``arguments`` is JSON."""

    index: int
    call_id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """As in a message; a delta has the index as well."""
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a piece of text brought: plain text, then whole calls."""

    content: str
    calls: tuple[ToolCall, ...]


class ToolCallParser:
    """Splits a text that comes piece by piece. What is marked as a call and is none stays text.

    Attributes:
        found: calls so far.
    """

    def __init__(self) -> None:
        self.found = 0
        self._inside = False
        self._call = ""  # text of the call that has begun
        self._held = ""  # may be the beginning of a mark

    def push(self, piece: str) -> Parsed:
        content, calls = "", []
        while piece:
            if not self._inside:
                text, piece = self._before_mark(piece)
                # Between calls there are line breaks, which are no content.
                content += "" if self.found and not text.strip() else text
                continue
            before = len(self._call)
            self._call += piece
            at = self._call.find(_END, max(0, before - len(_END)))
            if at < 0:
                break
            call, piece = self._call[:at], self._call[at + len(_END) :]
            self._inside, self._call = False, ""
            parsed = self._parse(call)
            if parsed is None:
                content += _BEGIN + call + _END
            else:
                calls.append(parsed)
        return Parsed(content, tuple(calls))

    def flush(self) -> Parsed:
        """The end of the text; an unfinished call is one if its JSON is whole."""
        if not self._inside:
            text, self._held = self._held, ""
            return Parsed("" if self.found and not text.strip() else text, ())
        call, self._inside, self._call = self._call, False, ""
        parsed = self._parse(call)
        return Parsed(_BEGIN + call, ()) if parsed is None else Parsed("", (parsed,))

    def _before_mark(self, piece: str) -> tuple[str, str]:
        """The text that is no call for sure, and what follows a mark."""
        text, self._held = self._held + piece, ""
        at = text.find(_BEGIN)
        if at >= 0:
            self._inside = True
            return text[:at], text[at + len(_BEGIN) :]
        longest = min(len(text), len(_BEGIN) - 1)
        held = next((n for n in range(longest, 0, -1) if _BEGIN.startswith(text[len(text) - n :])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], ""

    def _parse(self, call: str) -> ToolCall | None:
        try:
            value = json.loads(call)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.found += 1
        return ToolCall(self.found - 1, f"call_{uuid.uuid4().hex[:24]}", value["name"], text)


def calls_grammar(
    parameters: Mapping[str, Mapping[str, Any]], several: bool, otherwise: Mapping[str, Any] | None = None
) -> str:
    """In Lark: calls of these tools, and nothing else.

    Args:
        parameters: the schema of each tool's arguments, by its name.
        several: calls may follow one another.
        otherwise: the schema of an answer that calls no tool; None: there must be a call.
    """
    rules = ["start: calls" if otherwise is None else "start: calls | answer"]
    if otherwise is not None:
        rules.append(f"answer: %json {json_grammar(dict(otherwise))}")
    rules.append('calls: call ("\\n" call)*' if several else "calls: call")
    rules.append("call: " + " | ".join(f"call{number}" for number in range(len(parameters))))
    for number, (name, schema) in enumerate(parameters.items()):
        before = f'{_BEGIN}\n{{"name": {json.dumps(name)}, "arguments": '
        rules.append(f"call{number}: {json.dumps(before)} arguments{number} {json.dumps('}' + chr(10) + _END)}")
        rules.append(f"arguments{number}: %json {json_grammar(dict(schema))}")
    return "\n".join(rules)
