"""The OpenAI API of a real gateway, with a played instance behind it."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import pytest
from gateway_rig import (
    BYTES,
    EOS,
    MAX_MODEL_LEN,
    TEXT,
    expected_tokens,
    until,
)
from http_rig import HttpRig, events, instance

pytestmark = pytest.mark.cluster


def test_a_whole_answer(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (played, client):
            body = {"model": "tiny", "prompt": "hi", "max_tokens": 20, "temperature": 0, "return_token_ids": True}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200
            answer = response.json()
            assert answer["object"] == "text_completion"
            assert answer["model"] == "tiny"
            assert answer["id"] == response.headers["x-request-id"]
            (choice,) = answer["choices"]
            assert choice["token_ids"] == expected_tokens(20)
            assert choice["prompt_token_ids"] == list(b"hi")
            assert choice["text"] == BYTES[:20].decode(errors="replace")
            assert choice["finish_reason"] == "length"
            assert choice["logprobs"] is None
            assert answer["usage"]["prompt_tokens"] == 2
            assert answer["usage"]["completion_tokens"] == 20
            assert answer["usage"]["total_tokens"] == 22
            (submit,) = played.submitted
            assert submit.request_id == answer["id"]
            assert submit.stop_token_ids == [EOS, 255]
            assert answer["id"] in http_rig.gateway.log.read_text()

            # Defaults of the API.
            answer = (await client.post("/v1/completions", json={"prompt": [1, 2]})).json()
            assert answer["usage"]["completion_tokens"] == 16
            assert played.submitted[1].temperature == 1.0
            assert "token_ids" not in answer["choices"][0]

    asyncio.run(scenario())


def test_a_stream(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (_, client):
            body = {
                "prompt": [1],
                "max_tokens": 30,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
            response = await client.post("/v1/completions", json=body)
            assert response.headers["content-type"].startswith("text/event-stream")
            *chunks, usage = events(response.text)
            choices = [chunk["choices"][0] for chunk in chunks]
            assert "".join(choice["text"] for choice in choices) == (TEXT + TEXT).encode()[:30].decode(errors="replace")
            # No half character before the end.
            assert all("\ufffd" not in choice["text"] for choice in choices[:-1])
            assert [token for choice in choices for token in choice["token_ids"]] == expected_tokens(30)
            assert [choice.get("prompt_token_ids") for choice in choices[:2]] == [[1], None]
            assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
            assert all(chunk["usage"] is None for chunk in chunks)
            assert usage["choices"] == []
            assert usage["usage"]["total_tokens"] == 31

            response = await client.post("/v1/completions", json={"prompt": [1], "stream": True})
            assert all("usage" not in chunk for chunk in events(response.text))

    asyncio.run(scenario())


def test_the_end_token_and_ignoring_it(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig, eos_at=2) as (_, client):
            body = {"prompt": [1], "max_tokens": 9, "temperature": 0, "return_token_ids": True}
            choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
            assert choice["token_ids"] == [*expected_tokens(2), EOS]
            assert choice["finish_reason"] == "stop"
            assert choice["text"] == "n\ufffd"
            choice = (await client.post("/v1/completions", json=body | {"ignore_eos": True})).json()["choices"][0]
            assert choice["token_ids"] == expected_tokens(9)

    asyncio.run(scenario())


def test_seeds(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (played, client):
            body = {"prompt": [1], "temperature": 0.7, "return_token_ids": True}
            for seed, sent in ((5, 5), (2**64 - 1, 2**64 - 1), (-1, 2**64 - 1)):
                answer = (await client.post("/v1/completions", json=body | {"seed": seed})).json()
                assert played.submitted[-1].seed == sent
                assert answer["choices"][0]["token_ids"] == expected_tokens(16, 0.7, sent)
            for _ in range(2):
                await client.post("/v1/completions", json=body)
            assert played.submitted[-1].seed != played.submitted[-2].seed

    asyncio.run(scenario())


def test_logprobs(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (_, client):
            body = {"prompt": [1], "max_tokens": 4, "temperature": 0, "logprobs": 2}
            logprobs = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
            assert logprobs["tokens"] == ["n", "Ã", "©", " "]
            assert logprobs["token_logprobs"] == [-0.5] * 4
            assert logprobs["top_logprobs"][0] == {"n": -0.5, "o": -1.5}
            # "é" is held back until its second byte.
            assert logprobs["text_offset"] == [0, 1, 1, 2]
            body = body | {"logprobs": 0, "stream": True}
            chunks = events((await client.post("/v1/completions", json=body)).text)
            shown = [chunk["choices"][0]["logprobs"] for chunk in chunks]
            assert [one["top_logprobs"] for one in shown[:-1]] == [[{token: -0.5}] for token in logprobs["tokens"]]
            assert [one["text_offset"] for one in shown[:-1]] == [[0], [1], [1], [2]]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"{", 400, None, "not valid JSON"),
        (b"[1]", 400, None, "JSON object"),
        (b"{}", 400, "prompt", "required"),
        (b'{"prompt": 5}', 400, "prompt", "token ids"),
        (b'{"prompt": []}', 400, "prompt", "empty"),
        (b'{"prompt": ""}', 400, None, "at least one token"),
        (b'{"prompt": [1, -1]}', 400, "prompt", "prompt[1]"),
        (b'{"prompt": [257]}', 400, None, "token id 257"),
        (b'{"prompt": [[1], [2]]}', 400, "prompt", "one prompt"),
        (b'{"prompt": "a", "max_tokens": -1}', 400, "max_tokens", "greater"),
        (b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens", "at least 1"),
        (b'{"prompt": "a", "max_tokens": 1000000000000000000000}', 400, "max_tokens", "less"),
        (b'{"prompt": "a", "max_tokens": "5"}', 400, "max_tokens", "integer"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "finite"),
        (b'{"prompt": "a", "temperature": -1}', 400, "temperature", "greater"),
        (b'{"prompt": "a", "logprobs": 21}', 400, "logprobs", "20"),
        (b'{"prompt": "a", "n": 0}', 400, "n", "n:"),
        (b'{"prompt": "a", "n": 129}', 400, "n", "n:"),
        (b'{"prompt": "a", "structured_outputs": {"regex": "["}}', 400, None, "structured_outputs.regex: "),
        (b'{"prompt": "a", "structured_outputs": {"grammar": "start: x"}}', 400, None, "structured_outputs.grammar: "),
        (b'{"prompt": "a", "structured_outputs": {"json": "{"}}', 400, None, "structured_outputs.json: "),
        (
            b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}',
            400,
            None,
            "response_format.json_schema.schema: ",
        ),
        (b'{"prompt": "a", "structured_outputs": {"regex": "a"}, "ignore_eos": true}', 400, None, "ignore_eos"),
        (b'{"prompt": "a", "stop": [""]}', 400, "stop", "stop"),
        (b'{"prompt": "a", "stop": ["x", 5]}', 400, "stop", "stop"),
        (b'{"prompt": "a", "suffix": "x"}', 400, "suffix", "suffix:"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "logit_bias", "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"257": 1}}', 400, None, "token id 257"),
        (b'{"prompt": "a", "stop_token_ids": [257]}', 400, None, "token id 257"),
        (b'{"prompt": "a", "top_p": 0}', 400, "top_p", "greater"),
        (b'{"prompt": "a", "top_k": -2}', 400, "top_k", "greater"),
        (b'{"prompt": "a", "max_tokens": 4, "min_tokens": 5}', 400, None, "min_tokens: must be between 0 and 4"),
        (b'{"prompt": "a", "repetition_penalty": -1}', 400, "repetition_penalty", "greater"),
        (b'{"prompt": "a", "presence_penalty": 2.5}', 400, "presence_penalty", "less"),
        (b'{"prompt": "a", "no_such_field": 2}', 400, "no_such_field", "no_such_field"),
        (b'{"prompt": "a", "stream_options": {}}', 400, "stream_options", "stream"),
        (b'{"prompt": "a", "model": "other"}', 404, None, "'tiny'"),
        (b'{"prompt": "a", "max_tokens": 10000}', 400, None, "limit of 10000"),
    ],
)
def test_requests_that_are_refused(http_rig: HttpRig, body: bytes, status: int, param: str | None, words: str) -> None:
    response = httpx.post(f"{http_rig.gateway.http}/v1/completions", content=body, timeout=20)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


def test_neutral_fields_are_accepted(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (_, client):
            neutral = {"n": 1, "best_of": None, "echo": False, "stop": None, "presence_penalty": 0.0, "top_p": 1}
            response = await client.post("/v1/completions", json={"prompt": ["a"], "user": "me", **neutral})
            assert response.status_code == 200

    asyncio.run(scenario())


def test_other_paths(http_rig: HttpRig) -> None:
    base = http_rig.gateway.http
    (model,) = httpx.get(f"{base}/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", MAX_MODEL_LEN)
    assert httpx.get(f"{base}/v1/models/tiny").json() == model
    assert httpx.get(f"{base}/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert "version" in httpx.get(f"{base}/version").json()
    for response, status in (
        (httpx.get(f"{base}/nowhere"), 404),
        (httpx.get(f"{base}/v1/completions"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("CONTEXT_TOO_LONG", 400),
        ("INVALID_REQUEST", 400),
        ("QUEUE_FULL", 429),
        ("UNAVAILABLE", 503),
        ("NO_SUCH_REASON", 500),
    ],
)
def test_what_the_instance_refuses(http_rig: HttpRig, reason: str, status: int) -> None:
    async def scenario() -> None:
        async with instance(http_rig, fail=(reason, "no, because")) as (_, client):
            # A stream gets a real status as well: nothing has been sent yet.
            for stream in (False, True):
                response = await client.post("/v1/completions", json={"prompt": [1], "stream": stream})
                assert response.status_code == status
                assert response.json()["error"]["message"] == "no, because"

    asyncio.run(scenario())


def test_health_says_what_is_missing_and_requests_wait_for_an_instance(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=http_rig.gateway.http, timeout=20) as client:

            async def lost() -> bool:
                return (await client.get("/health")).status_code == 503

            await until(lost, "the last test's instance is gone")
            assert (await client.get("/health")).json()["missing"] == ["instances: 0 of 1 are connected"]
            response = await client.post("/v1/completions", json={"prompt": [1]})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "no_instance"
            assert response.headers["retry-after"] == "1"
        async with instance(http_rig):
            pass

    asyncio.run(scenario())


def test_too_many_requests(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig, delay_s=0.05) as (played, client):
            body = {"prompt": [1], "max_tokens": 40, "temperature": 0}
            slow = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(3)]
            await until(lambda: len(played.submitted) == 3, "three are in work")
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert {(await task).status_code for task in slow} == {200}

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("delay_s", [0.05, 30.0])  # while tokens flow, and before the first one
def test_a_client_that_hangs_up_ends_its_request(http_rig: HttpRig, stream: bool, delay_s: float) -> None:
    async def scenario() -> None:
        async with instance(http_rig, delay_s=delay_s) as (played, _):
            host, port = http_rig.gateway.http.removeprefix("http://").split(":")
            body = json.dumps({"prompt": [1], "max_tokens": 5000, "stream": stream}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(head + body)
                await until(lambda: played.submitted, "the request is in work")
                await asyncio.sleep(0.2)
                assert not played.aborted
            await until(lambda: played.aborted, "the request is aborted")
            assert played.aborted == [played.submitted[0].request_id]

    asyncio.run(scenario())


def test_no_tokenizer(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig), httpx.AsyncClient(base_url=http_rig.bare.http, timeout=20) as client:
            response = await client.post("/v1/completions", json={"prompt": "text"})
            assert response.status_code == 400
            assert "token ids" in response.json()["error"]["message"]
            body = {"prompt": [1], "temperature": 0, "return_token_ids": True, "logprobs": 1, "stream": True}
            chunks = [chunk["choices"][0] for chunk in events((await client.post("/v1/completions", json=body)).text)]
            assert [token for chunk in chunks for token in chunk["token_ids"]] == expected_tokens(16)
            assert {chunk["text"] for chunk in chunks} == {""}
            assert chunks[0]["logprobs"]["tokens"] == ["token_id:110"]

    asyncio.run(scenario())


def test_two_million_token_ids(http_rig: HttpRig) -> None:
    """A body of some megabytes is read; it is the model's limit that refuses it."""
    body = json.dumps({"prompt": [7] * 2_000_000}).encode()
    response = httpx.post(f"{http_rig.gateway.http}/v1/completions", content=body, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "2000000 tokens" in response.json()["error"]["message"]
