"""Calls of tools: taken out of a text however it comes in pieces, and all that can be said where they must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_tokenizer import EOS, write_byte_tokenizer
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import InvalidRequestError
from services.core.structure import Structure
from services.gateway.chat_template import ChatTemplate
from services.gateway.openai_chat import ChatMessage, ChatRequest
from services.gateway.openai_errors import ApiError
from services.gateway.openai_types import parse_request
from services.gateway.tool_calls import ToolCallParser
from services.runtime.grammars import Grammars

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "start: ::= none of the grammar's business",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Köln", "Bonn"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
MESSAGES = [{"role": "user", "content": "?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def parse(pieces: list[str]) -> tuple[str, list[tuple[int, str, str]]]:
    parser = ToolCallParser()
    parts = [*(parser.push(piece) for piece in pieces), parser.flush()]
    calls = [(call.index, call.name, call.arguments) for part in parts for call in part.calls]
    assert parser.found == len(calls)
    return "".join(part.content for part in parts), calls


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call < at all <tool", "no call < at all <tool", []),
        (CALL, "", [(0, "get_weather", '{"city": "Bonn"}')]),
        (
            f"Let me see.\n{CALL}\n{CLOCK_CALL}\n",
            "Let me see.\n",
            [(0, "get_weather", '{"city": "Bonn"}'), (1, "clock", "{}")],
        ),
        ("<tool_call>{broken}</tool_call> and on", "<tool_call>{broken}</tool_call> and on", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": "f", "arguments": "{}"}', "", [(0, "f", "{}")]),
        ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ],
)
def test_calls_are_taken_out_of_a_text(text: str, content: str, calls: list[tuple[int, str, str]]) -> None:
    assert parse([text]) == (content, calls)
    assert parse(list(text)) == (content, calls)


@cases(200)
@given(
    st.lists(st.sampled_from([CALL, CLOCK_CALL, "<tool_call>", "</tool_call>", "<", "a", "\n", "{}"]), max_size=6),
    st.data(),
)
def test_pieces_make_no_difference(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    (content, calls), (whole, whole_calls) = parse(pieces), parse([text])
    assert calls == whole_calls
    # White space between calls is dropped where a piece of it comes alone.
    assert "".join(content.split()) == "".join(whole.split())


def structure_of(**fields: object) -> Structure | None:
    return parse_request(ChatRequest, json.dumps({"messages": MESSAGES, **fields}).encode()).structure()


def accepts(grammars: Grammars, structure: Structure | None, text: str) -> bool:
    assert structure is not None
    state = grammars.start(structure)
    try:
        state.take(list(text.encode()))
    except InvalidRequestError:
        return False
    return state.complete


def test_what_must_be_called_is_all_that_can_be_said(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    grammars = Grammars(tmp_path, EOS + 1)
    tools = [WEATHER, CLOCK]
    required = structure_of(tools=tools, tool_choice="required")
    assert accepts(grammars, required, CALL)
    assert accepts(grammars, required, f"{CALL}\n{CLOCK_CALL}")
    assert not accepts(grammars, required, "")
    assert not accepts(grammars, required, "Hello")
    assert not accepts(grammars, required, CALL.replace("Bonn", "Rome"))
    assert not accepts(grammars, required, CLOCK_CALL.replace("{}", '{"a": 1}'))
    one = structure_of(tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert accepts(grammars, one, CLOCK_CALL)
    assert not accepts(grammars, one, f"{CALL}\n{CLOCK_CALL}")
    named = structure_of(tools=tools, tool_choice={"type": "function", "function": {"name": "clock"}})
    assert accepts(grammars, named, CLOCK_CALL)
    assert not accepts(grammars, named, CALL)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1]}}}
    either = structure_of(tools=tools, response_format=form)
    assert accepts(grammars, either, "1")
    assert accepts(grammars, either, CALL)
    assert not accepts(grammars, either, "2")
    assert structure_of(tools=tools) is None
    assert structure_of(tools=tools, tool_choice="none") is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": [CLOCK], "structured_outputs": {"regex": "a"}}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)
def test_what_is_refused_names_its_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        structure_of(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_templates_get_tools_and_calls() -> None:
    template = ChatTemplate("{{ tools[0].function.name }}{{ messages[0].tool_calls[0].function.arguments.city }}", {})
    asked = parse_request(ChatRequest, json.dumps({"messages": MESSAGES, "tools": [WEATHER]}).encode())
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
    message = ChatMessage.model_validate({"role": "assistant", "tool_calls": [call]})
    tools = [tool.model_dump(exclude_none=True) for tool in asked.offered_tools]
    assert template.render([message.for_template()], tools) == "get_weatherKöln"
    with pytest.raises(InvalidRequestError, match="tools: "):
        ChatTemplate("{{ messages }}", {}).render([message.for_template()], tools)
