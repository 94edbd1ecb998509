"""Several choices, echo, structured answers and calls of tools, over HTTP to a real gateway."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_rig import BYTES, EOS, expected_tokens, until
from http_rig import HttpRig, events, instance

pytestmark = pytest.mark.cluster

CHAT = {"messages": [{"role": "user", "content": "né?"}], "temperature": 0}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL = b'Well. <tool_call>\n{"name": "clock", "arguments": {"zone": "\xc3\xa9"}}\n</tool_call>'


def test_choices_have_streams_of_their_own(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (played, client):
            body = {"prompt": "hi", "max_tokens": 6, "temperature": 1, "seed": 7, "n": 3, "return_token_ids": True}
            answer = (await client.post("/v1/completions", json=body)).json()
            assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
            seeds = [submit.seed for submit in played.submitted]
            assert seeds[0] == 7, "the first choice is what it would be alone"
            assert len(set(seeds)) == 3
            assert len({submit.request_id for submit in played.submitted}) == 3
            for choice, seed in zip(answer["choices"], seeds, strict=True):
                assert choice["token_ids"] == expected_tokens(6, 1, seed)
                assert choice["prompt_token_ids"] == list(b"hi")
            usage = answer["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 18, 20)

            body |= {"stream": True, "stream_options": {"include_usage": True}}
            *chunks, last = events((await client.post("/v1/completions", json=body)).text)
            assert {chunk["id"] for chunk in chunks} == {last["id"]}
            assert last["usage"] == usage
            for index, choice in enumerate(answer["choices"]):
                own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
                assert [token for part in own for token in part["token_ids"]] == choice["token_ids"]
                assert "".join(part["text"] for part in own) == choice["text"]
                assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + ["length"]
            assert [submit.seed for submit in played.submitted[3:]] == seeds

            # More than the gateway has in work: refused before anything is begun, and nothing stays behind.
            for _ in range(2):
                assert (await client.post("/v1/completions", json=body | {"n": 4})).status_code == 429
            assert len(played.submitted) == 6
            assert (await client.post("/v1/completions", json=body)).status_code == 200

            chat = CHAT | {"n": 2, "max_tokens": 20, "stream": True}
            chunks = events((await client.post("/v1/chat/completions", json=chat)).text)
            for index in (0, 1):
                deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
                assert deltas[0]["role"] == "assistant"
                assert "".join(delta["content"] for delta in deltas) == BYTES.decode()

    asyncio.run(scenario())


def test_the_others_begin_when_the_first_has_computed_the_prompt(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig, delay_s=0.3) as (played, client):
            body = {"prompt": "hi", "max_tokens": 100, "n": 3}
            asked = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: played.submitted, "the first choice is in work")
            assert len(played.submitted) == 1
            await until(lambda: len(played.submitted) == 3, "so are the others")
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await until(lambda: len(played.aborted) == 3, "a client that hangs up ends all of them")
        async with instance(http_rig, fail=("UNAVAILABLE", "no, because")) as (played, client):
            response = await client.post("/v1/completions", json={"prompt": "hi", "n": 3})
            assert (response.status_code, len(played.submitted)) == (503, 1)

    asyncio.run(scenario())


def test_echo(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (_, client):
            for prompt in ("né ", list("né ".encode())):
                body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "echo": True, "n": 2}
                answer = (await client.post("/v1/completions", json=body)).json()
                assert [choice["text"] for choice in answer["choices"]] == ["né " + BYTES.decode()] * 2
                chunks = events((await client.post("/v1/completions", json=body | {"stream": True})).text)
                for index in (0, 1):
                    texts = [c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index]
                    assert "".join(texts) == "né " + BYTES.decode()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1]}}}},
            "json_schema",
            '{"enum": [1]}',
        ),
        ({"structured_outputs": {"json": {"enum": [1]}}}, "json_schema", '{"enum": [1]}'),
        ({"structured_outputs": {"json": '{"enum":[1]}'}}, "json_schema", '{"enum":[1]}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a.b", "c"]}}, "regex", r"a\x{2e}b|c"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar", 'root ::= "a"'),
        ({"response_format": {"type": "text"}}, None, ""),
    ],
)
def test_the_instance_is_told_the_structure(
    http_rig: HttpRig, fields: dict[str, object], kind: str | None, text: str
) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (played, client):
            for path, body in (("completions", {"prompt": "a"}), ("chat/completions", CHAT)):
                response = await client.post(f"/v1/{path}", json={**body, **fields, "max_tokens": 2})
                assert response.status_code == 200, response.text
                submit = played.submitted[-1]
                assert submit.HasField("structure") == (kind is not None)
                assert (submit.structure.kind, submit.structure.text) == (kind or "", text)
                assert EOS in submit.stop_token_ids

    asyncio.run(scenario())


def test_calls_of_tools(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig, text=CALL) as (played, client):
            body = CHAT | {"tools": [TOOL], "max_tokens": 200}
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            (choice,) = answer["choices"]
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] == "Well. "
            (call,) = choice["message"]["tool_calls"]
            assert call["type"] == "function"
            assert call["id"].startswith("call_")
            assert call["function"] == {"name": "clock", "arguments": '{"zone": "é"}'}
            sent = bytes(played.submitted[-1].token_ids).decode()
            assert json.loads(sent.partition("tools: ")[2].partition("\n")[0]) == [TOOL]
            assert not played.submitted[-1].HasField("structure")

            chunks = events((await client.post("/v1/chat/completions", json=body | {"stream": True})).text)
            choices = [chunk["choices"][0] for chunk in chunks]
            assert "".join(part["delta"]["content"] for part in choices) == "Well. "
            (streamed,) = [call for part in choices for call in part["delta"].get("tool_calls", [])]
            assert streamed["index"] == 0
            assert streamed["function"] == call["function"]
            assert choices[-1]["finish_reason"] == "tool_calls"

            # Nothing is looked for where no tool may be called.
            answer = (await client.post("/v1/chat/completions", json=body | {"tool_choice": "none"})).json()
            assert answer["choices"][0]["message"]["content"] == CALL.decode()
            assert "tools: " not in bytes(played.submitted[-1].token_ids).decode()

            await client.post("/v1/chat/completions", json=body | {"tool_choice": "required"})
            assert played.submitted[-1].structure.kind == "grammar"

            # What comes back to the model are objects again.
            history = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": "12:00"},
            ]
            response = await client.post("/v1/chat/completions", json=body | {"messages": history})
            assert response.status_code == 200, response.text

    asyncio.run(scenario())
