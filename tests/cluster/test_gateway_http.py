"""The OpenAI API of a real gateway, with a played instance behind it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from etcd_process import EtcdProcess
from gateway_rig import (
    BYTES,
    EOS,
    MAX_MODEL_LEN,
    TEXT,
    VOCAB,
    Gateway,
    PlayedInstance,
    expected_tokens,
    gateway,
    service,
    until,
    write_checkpoint,
)

from services.runtime.etcd import EtcdClient

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Rig:
    etcd: str
    gateway: Gateway
    bare: Gateway  # serves a checkpoint without a tokenizer


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    root = tmp_path_factory.mktemp("gateway")
    etcd = EtcdProcess(root)
    etcd.start()
    (root / "bare").mkdir()
    try:
        with (
            service("gmanager", root, listen="127.0.0.1:0", etcd=[etcd.endpoint]),
            gateway(root, etcd.endpoint, write_checkpoint(root / "tiny"), max_queue=3, instance_wait_s=1.0) as full,
            gateway(
                root / "bare", etcd.endpoint, write_checkpoint(root / "no-words", tokenizer=False), member_id="bare"
            ) as bare,
        ):
            yield Rig(etcd.endpoint, full, bare)
    finally:
        etcd.kill()


@asynccontextmanager
async def instance(rig: Rig, **script: object) -> AsyncIterator[tuple[PlayedInstance, httpx.AsyncClient]]:
    """A played instance that the gateway has connected to, and a client of the gateway."""
    etcd = EtcdClient([rig.etcd])
    played = PlayedInstance("instance-0")
    for name, value in script.items():
        setattr(played.script, name, value)
    await played.start(etcd)
    async with httpx.AsyncClient(base_url=rig.gateway.http, timeout=20) as client:

        async def ready() -> bool:
            return (await client.get("/health")).status_code == 200

        try:
            await until(ready, "the gateway is ready")
            yield played, client
        finally:
            await played.close()
            await etcd.close()


def events(body: str) -> list[dict[str, object]]:
    parts = body.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") for part in parts)
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def test_a_whole_answer(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig) as (played, client):
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
            assert answer["id"] in rig.gateway.log.read_text()

            # Defaults of the API.
            answer = (await client.post("/v1/completions", json={"prompt": [1, 2]})).json()
            assert answer["usage"]["completion_tokens"] == 16
            assert played.submitted[1].temperature == 1.0
            assert "token_ids" not in answer["choices"][0]

    asyncio.run(scenario())


def test_a_stream(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig) as (_, client):
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


def test_the_end_token_and_ignoring_it(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig, eos_at=2) as (_, client):
            body = {"prompt": [1], "max_tokens": 9, "temperature": 0, "return_token_ids": True}
            choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
            assert choice["token_ids"] == [*expected_tokens(2), EOS]
            assert choice["finish_reason"] == "stop"
            assert choice["text"] == "n\ufffd"
            choice = (await client.post("/v1/completions", json=body | {"ignore_eos": True})).json()["choices"][0]
            assert choice["token_ids"] == expected_tokens(9)

    asyncio.run(scenario())


def test_seeds(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig) as (played, client):
            body = {"prompt": [1], "temperature": 0.7, "return_token_ids": True}
            for seed, sent in ((5, 5), (2**64 - 1, 2**64 - 1), (-1, 2**64 - 1)):
                answer = (await client.post("/v1/completions", json=body | {"seed": seed})).json()
                assert played.submitted[-1].seed == sent
                assert answer["choices"][0]["token_ids"] == expected_tokens(16, 0.7, sent)
            for _ in range(2):
                await client.post("/v1/completions", json=body)
            assert played.submitted[-1].seed != played.submitted[-2].seed

    asyncio.run(scenario())


def test_logprobs(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig) as (_, client):
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
        (b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens", "greater"),
        (b'{"prompt": "a", "max_tokens": 1000000000000000000000}', 400, "max_tokens", "less"),
        (b'{"prompt": "a", "max_tokens": "5"}', 400, "max_tokens", "integer"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "finite"),
        (b'{"prompt": "a", "temperature": -1}', 400, "temperature", "greater"),
        (b'{"prompt": "a", "logprobs": 21}', 400, "logprobs", "20"),
        (b'{"prompt": "a", "n": 2}', 400, "n", "n:"),
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
def test_requests_that_are_refused(rig: Rig, body: bytes, status: int, param: str | None, words: str) -> None:
    response = httpx.post(f"{rig.gateway.http}/v1/completions", content=body, timeout=20)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


def test_neutral_fields_are_accepted(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig) as (_, client):
            neutral = {"n": 1, "best_of": None, "echo": False, "stop": None, "presence_penalty": 0.0, "top_p": 1}
            response = await client.post("/v1/completions", json={"prompt": ["a"], "user": "me", **neutral})
            assert response.status_code == 200

    asyncio.run(scenario())


def test_a_stop_string_ends_the_answer_at_the_instance_too(rig: Rig) -> None:
    before, stop = "né ", "🦙 你"  # of eight tokens
    tokens = len((before + stop).encode())

    async def scenario() -> None:
        async with instance(rig, delay_s=0.02) as (played, client):
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


def test_a_chat(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig) as (played, client):
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
def test_a_streamed_chat(rig: Rig, more: dict[str, object]) -> None:
    async def scenario() -> None:
        async with instance(rig) as (_, client):
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
def test_chats_that_are_refused(rig: Rig, body: dict[str, object], param: str | None, words: str) -> None:
    response = httpx.post(f"{rig.gateway.http}/v1/chat/completions", json=body, timeout=20)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_tokenize_and_detokenize(rig: Rig) -> None:
    def post(path: str, body: dict[str, object]) -> httpx.Response:
        return httpx.post(f"{rig.gateway.http}/{path}", json=body, timeout=20)

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


def test_the_instance_is_told_how_to_shape_the_distribution(rig: Rig) -> None:
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
        async with instance(rig) as (played, client):
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


def test_other_paths(rig: Rig) -> None:
    base = rig.gateway.http
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
def test_what_the_instance_refuses(rig: Rig, reason: str, status: int) -> None:
    async def scenario() -> None:
        async with instance(rig, fail=(reason, "no, because")) as (_, client):
            # A stream gets a real status as well: nothing has been sent yet.
            for stream in (False, True):
                response = await client.post("/v1/completions", json={"prompt": [1], "stream": stream})
                assert response.status_code == status
                assert response.json()["error"]["message"] == "no, because"

    asyncio.run(scenario())


def test_health_says_what_is_missing_and_requests_wait_for_an_instance(rig: Rig) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=rig.gateway.http, timeout=20) as client:

            async def lost() -> bool:
                return (await client.get("/health")).status_code == 503

            await until(lost, "the last test's instance is gone")
            assert (await client.get("/health")).json()["missing"] == ["instances: 0 of 1 are connected"]
            response = await client.post("/v1/completions", json={"prompt": [1]})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "no_instance"
            assert response.headers["retry-after"] == "1"
        async with instance(rig):
            pass

    asyncio.run(scenario())


def test_too_many_requests(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig, delay_s=0.05) as (played, client):
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
def test_a_client_that_hangs_up_ends_its_request(rig: Rig, stream: bool, delay_s: float) -> None:
    async def scenario() -> None:
        async with instance(rig, delay_s=delay_s) as (played, _):
            host, port = rig.gateway.http.removeprefix("http://").split(":")
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


def test_no_tokenizer(rig: Rig) -> None:
    async def scenario() -> None:
        async with instance(rig), httpx.AsyncClient(base_url=rig.bare.http, timeout=20) as client:
            response = await client.post("/v1/completions", json={"prompt": "text"})
            assert response.status_code == 400
            assert "token ids" in response.json()["error"]["message"]
            body = {"prompt": [1], "temperature": 0, "return_token_ids": True, "logprobs": 1, "stream": True}
            chunks = [chunk["choices"][0] for chunk in events((await client.post("/v1/completions", json=body)).text)]
            assert [token for chunk in chunks for token in chunk["token_ids"]] == expected_tokens(16)
            assert {chunk["text"] for chunk in chunks} == {""}
            assert chunks[0]["logprobs"]["tokens"] == ["token_id:110"]

    asyncio.run(scenario())


def test_two_million_token_ids(rig: Rig) -> None:
    """A body of some megabytes is read; it is the model's limit that refuses it."""
    body = json.dumps({"prompt": [7] * 2_000_000}).encode()
    response = httpx.post(f"{rig.gateway.http}/v1/completions", content=body, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "2000000 tokens" in response.json()["error"]["message"]
