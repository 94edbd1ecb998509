"""Chats, stop strings and the shaping of the distribution, over HTTP to a real gateway."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from gateway_rig import (
    BYTES,
    MAX_MODEL_LEN,
    VOCAB,
    expected_tokens,
    until,
)
from http_rig import HttpRig, events, instance

pytestmark = pytest.mark.cluster


def test_a_stop_string_ends_the_answer_at_the_instance_too(http_rig: HttpRig) -> None:
    before, stop = "né ", "🦙 你"  # of eight tokens
    tokens = len((before + stop).encode())

    async def scenario() -> None:
        async with instance(http_rig, delay_s=0.02) as (played, client):
            body = {"prompt": [1], "max_tokens": 200, "temperature": 0, "return_token_ids": True, "stop": stop}
            answer = (await client.post("/v1/completions", json=body)).json()
            (choice,) = answer["choices"]
            assert (choice["text"], choice["finish_reason"]) == (before, "stop")
            assert choice["token_ids"] == expected_tokens(tokens)
            assert answer["usage"]["completion_tokens"] == tokens
            await until(lambda: played.aborted == [played.submitted[0].request_id], "the instance computes no more")

            body |= {"stop": ["never", stop], "include_stop_str_in_output": True, "stream": True}
            chunks = events((await client.post("/v1/completions", json=body)).text)
            assert "".join(str(chunk["choices"][0]["text"]) for chunk in chunks) == before + stop
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

            body |= {"stream": False, "min_tokens": tokens, "max_tokens": len(BYTES)}
            answer = (await client.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["text"] == BYTES.decode()

    asyncio.run(scenario())


CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "né?"}], "temperature": 0}
CHAT_PROMPT = "system: Be brief.\nuser: né?\nassistant:"


def test_a_chat(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (played, client):
            answer = (await client.post("/v1/chat/completions", json=CHAT | {"max_completion_tokens": 20})).json()
            assert answer["object"] == "chat.completion"
            (choice,) = answer["choices"]
            assert choice["message"] == {"role": "assistant", "content": BYTES.decode(), "refusal": None}
            assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
            assert answer["usage"]["prompt_tokens"] == len(CHAT_PROMPT.encode())
            assert bytes(played.submitted[0].token_ids).decode() == CHAT_PROMPT, "no special tokens but the template's"

            await client.post("/v1/chat/completions", json=CHAT)
            assert played.submitted[1].max_tokens == 1024

            body = CHAT | {"max_tokens": 3, "logprobs": True, "top_logprobs": 2}
            (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
            for position, token in zip(choice["logprobs"]["content"], expected_tokens(3), strict=True):
                assert len(position["top_logprobs"]) == 2
                assert position["top_logprobs"][0]["logprob"] >= position["top_logprobs"][1]["logprob"]
                assert position["logprob"] <= 0
                assert bytes(position["bytes"]).decode() == position["token"]
                assert token < VOCAB

    asyncio.run(scenario())


@pytest.mark.parametrize("more", [{}, {"logprobs": True}, {"return_token_ids": True}])
def test_a_streamed_chat(http_rig: HttpRig, more: dict[str, object]) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (_, client):
            body = CHAT | {"max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}} | more
            *chunks, usage = events((await client.post("/v1/chat/completions", json=body)).text)
            assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            assert deltas[0]["role"] == "assistant"
            assert all("role" not in delta for delta in deltas[1:])
            assert "".join(delta["content"] for delta in deltas) == BYTES.decode()
            assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
            assert usage["choices"] == []
            assert usage["usage"]["completion_tokens"] == 20
            if "return_token_ids" in more:
                assert [t for chunk in chunks for t in chunk["choices"][0]["token_ids"]] == expected_tokens(20)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"content": "x"}]}, "messages", "messages.0.role: Field required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, None, "no robots"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools", "tools"),
        (CHAT | {"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        (CHAT | {"prompt": "x"}, "prompt", "prompt"),
    ],
)
def test_chats_that_are_refused(http_rig: HttpRig, body: dict[str, object], param: str | None, words: str) -> None:
    response = httpx.post(f"{http_rig.gateway.http}/v1/chat/completions", json=body, timeout=20)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_tokenize_and_detokenize(http_rig: HttpRig) -> None:
    def post(path: str, body: dict[str, object]) -> httpx.Response:
        return httpx.post(f"{http_rig.gateway.http}/{path}", json=body, timeout=20)

    text = "né 🦙"
    answer = post("tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"]) == (list(text.encode()), len(text.encode()))
    assert (len(answer["token_strs"]), answer["max_model_len"]) == (answer["count"], MAX_MODEL_LEN)
    assert post("detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert post("tokenize", {"messages": CHAT["messages"]}).json()["tokens"] == list(CHAT_PROMPT.encode())
    for path, body in (
        ("tokenize", {}),
        ("tokenize", {"prompt": "a", "messages": CHAT["messages"]}),
        ("detokenize", {"tokens": [VOCAB]}),
        ("detokenize", {"tokens": "a"}),
    ):
        assert post(path, body).status_code == 400
    assert post("tokenize", {"prompt": "a", "model": "other"}).status_code == 404


def test_the_instance_is_told_how_to_shape_the_distribution(http_rig: HttpRig) -> None:
    asked = {
        "logit_bias": {"7": -100, "0": 2.5},
        "min_tokens": 2,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "top_k": 40,
        "top_p": 0.5,
        "min_p": 0.25,
    }

    async def scenario() -> None:
        async with instance(http_rig) as (played, client):
            body = {"prompt": "a", "max_tokens": 4, "stop_token_ids": [3]}
            assert (await client.post("/v1/completions", json={**body, **asked})).status_code == 200
            assert (await client.post("/v1/completions", json={**body, "top_k": -1})).status_code == 200
            shaped, plain = played.submitted[-2:]
            shaping = shaped.shaping
            assert dict(shaping.logit_bias) == {7: -100, 0: 2.5}
            assert all(getattr(shaping, name) == value for name, value in asked.items() if name != "logit_bias")
            assert 3 in shaped.stop_token_ids
            assert not plain.HasField("shaping")

    asyncio.run(scenario())
