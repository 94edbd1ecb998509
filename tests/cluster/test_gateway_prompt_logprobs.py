"""Log-probabilities of prompts, from real gateways and a played instance: over HTTP and by the SDK, each told once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_pair import Pair, Stream, running_pair
from gateway_rig import EOS, PLAYED_CHUNK, PlayedInstance, Script, expected_tokens, until
from http_rig import HttpRig, events, instance

from infinitellm import AsyncClient, PromptLogprobs, Tokens
from infinitellm.errors import InvalidRequestError
from services.gateway.generation_service import MOST_PROMPT_LOGPROBS
from services.runtime.etcd import EtcdClient

pytestmark = pytest.mark.cluster

PROMPT = list(b"seven b")
SCORED = {"prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 0}


def expected_logprobs(prompt: list[int], answer: list[int]) -> dict[str, object]:
    """As OpenAI writes them, of what a played instance says; all tokens are ASCII."""
    whole = [*prompt, *answer]
    own = [None, *(float(-index) for index in range(1, len(prompt))), *[-0.5] * len(answer)]
    return {
        "tokens": [chr(token) for token in whole],
        "token_logprobs": own,
        "top_logprobs": [
            None if logprob is None else {chr(token): logprob, chr(token + 1): logprob - 1}
            for token, logprob in zip(whole, own, strict=True)
        ],
        "text_offset": [*range(len(whole))],
    }


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_and_its_log_probabilities_come_before_the_answer(http_rig: HttpRig, max_tokens: int) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (played, client):
            body = SCORED | {"max_tokens": max_tokens, "n": 2}
            expected = expected_logprobs(PROMPT, expected_tokens(max_tokens))
            answer = (await client.post("/v1/completions", json=body)).json()
            for choice in answer["choices"]:
                assert choice["text"] == bytes(PROMPT + expected_tokens(max_tokens)).decode()
                assert choice["finish_reason"] == "length"
                assert choice["logprobs"] == expected
            assert answer["usage"]["prompt_tokens"] == len(PROMPT)
            assert answer["usage"]["completion_tokens"] == 2 * max_tokens
            assert [submit.prompt_logprobs for submit in played.submitted] == [2, 2]
            too_long = {"prompt": [1] * 200, "logprobs": 20, "n": 128}
            refused = await client.post("/v1/completions", json=body | too_long)
            assert refused.status_code == 400
            assert "fewer choices" in refused.json()["error"]["message"]

            chunks = events((await client.post("/v1/completions", json=body | {"stream": True})).text)
            for index in (0, 1):
                first, *rest = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
                assert first["text"] == bytes(PROMPT + expected_tokens(max_tokens)).decode()
                assert first["logprobs"] == expected
                assert len(rest) == max_tokens
                assert not any(chunk["logprobs"] for chunk in rest)

    asyncio.run(scenario())


def test_prompts_with_special_tokens_of_one_token_and_without_any_words(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig) as (played, client):
            special = [*b"a", EOS, *b"\xc3\xa9b"]
            asked = SCORED | {"prompt": special, "max_tokens": 0}
            choice = (await client.post("/v1/completions", json=asked)).json()["choices"][0]
            assert choice["text"] == "a<|end|>éb"
            assert choice["logprobs"]["text_offset"] == [0, 1, 8, 8, 9]
            # There is nothing to compute for these.
            computed = len(played.submitted)
            one = (await client.post("/v1/completions", json=SCORED | {"prompt": "a", "max_tokens": 0})).json()
            assert one["choices"][0]["logprobs"] == expected_logprobs([ord("a")], [])
            plain = {"prompt": "abc", "echo": True, "max_tokens": 0}
            assert (await client.post("/v1/completions", json=plain)).json()["choices"][0]["text"] == "abc"
            assert len(played.submitted) == computed
            async with httpx.AsyncClient(base_url=http_rig.bare.http, timeout=20) as bare:
                await until(lambda: _healthy(bare), "the gateway is ready")
                choice = (await bare.post("/v1/completions", json=SCORED | {"max_tokens": 0})).json()["choices"][0]
            assert choice["text"] == ""
            assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in PROMPT]
            assert choice["logprobs"]["token_logprobs"] == expected_logprobs(PROMPT, [])["token_logprobs"]

    asyncio.run(scenario())


async def _healthy(client: httpx.AsyncClient) -> bool:
    return (await client.get("/health")).status_code == 200


def test_the_sdk(http_rig: HttpRig) -> None:
    async def scenario() -> None:
        async with instance(http_rig), AsyncClient(http_rig.gateway.grpc) as client:
            told = [event async for event in client.generate(PROMPT, max_tokens=2, prompt_logprobs=2)]
            parts = [event for event in told if isinstance(event, PromptLogprobs)]
            assert told[: len(parts)] == parts
            assert [part.first for part in parts] == [1, 1 + PLAYED_CHUNK]
            answer = await client.complete(PROMPT, max_tokens=0, prompt_logprobs=2)
            assert (answer.token_ids, answer.reason) == ((), "length")
            assert answer.prompt_logprobs == tuple(one for part in parts for one in part.logprobs)
            own = [None, *(position.logprob for position in answer.prompt_logprobs)]
            assert own == expected_logprobs(PROMPT, [])["token_logprobs"]
            for refused in (
                {"max_tokens": 0},
                {"max_tokens": 1, "prompt_logprobs": 21},
                {"max_tokens": 1, "prompt_logprobs": 20, "prompt": [1] * (MOST_PROMPT_LOGPROBS // 21 + 1)},
            ):
                with pytest.raises(InvalidRequestError):
                    await client.complete(**{"prompt": PROMPT, **refused})

    asyncio.run(scenario())


def test_a_lost_instance_costs_no_part_and_doubles_none(http_rig: HttpRig) -> None:
    """The next one computes the prompt from its beginning, unless all has been told."""
    prompt = [1 + index for index in range(40)]

    async def scenario() -> None:
        async with instance(http_rig, delay_s=0.1) as (played, _), AsyncClient(http_rig.gateway.grpc) as client:
            etcd = EtcdClient([http_rig.etcd])
            other = PlayedInstance("instance-1", Script(delay_s=0.01))
            told: list[PromptLogprobs] = []
            tokens: list[int] = []
            async for event in client.generate(prompt, max_tokens=4, prompt_logprobs=1):
                if isinstance(event, PromptLogprobs):
                    assert not tokens
                    told.append(event)
                    if len(told) == 3:
                        await other.start(etcd)
                        await played.die()
                elif isinstance(event, Tokens):
                    tokens += event.ids
            assert [position.logprob for part in told for position in part.logprobs] == [-i for i in range(1, 40)]
            assert tokens == expected_tokens(4)
            assert [submit.prompt_logprobs for submit in (*played.submitted, *other.submitted)] == [1, 1]
            await other.close()
            await etcd.close()

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("pair")) as running:
        yield running


def test_resumed_streams(pair: Pair) -> None:
    async def scenario() -> None:
        async with pair.instance(delay_s=0.02) as played:
            body = SCORED | {"max_tokens": 6, "stream": True, "return_token_ids": True}
            whole = await pair.begin("/v1/completions", body)
            for count in (0, 1, 3):
                begun = await pair.begin("/v1/completions", body, stop_after=count or 1)
                stream = begun if count else Stream(request_id=begun.request_id)
                assert await stream.resume(pair.second) == 200
                assert stream.done
                assert [choice["logprobs"] for choice in stream.choices] == [c["logprobs"] for c in whole.choices]
                assert [choice["text"] for choice in stream.choices] == [c["text"] for c in whole.choices]
                # Who has a token has been told of the prompt.
                assert played.submitted[-1].prompt_logprobs == (0 if count else 2)
            begun = await pair.begin("/v1/completions", body | {"max_tokens": 0}, stop_after=1)
            assert await begun.resume(pair.second) == 200
            assert begun.done
            assert len(begun.choices) == 1

    asyncio.run(scenario())


def test_the_sdk_is_told_once_whatever_is_lost(tmp_path: Path) -> None:
    prompt = [1 + index for index in range(60)]

    async def scenario() -> None:
        told: list[float] = []
        async with (
            running.instance(delay_s=0.05) as played,
            AsyncClient([running.first.grpc, running.second.grpc]) as client,
        ):
            async for event in client.generate(prompt, max_tokens=3, prompt_logprobs=1):
                if isinstance(event, PromptLogprobs):
                    assert event.first == 1 + len(told)
                    told += [position.logprob for position in event.logprobs]
                    if event.first == 1 + 3 * PLAYED_CHUNK:
                        running.first.process.kill()
            assert told == [-index for index in range(1, 60)]
            assert len(played.submitted) == 2

    with running_pair(tmp_path) as running:
        asyncio.run(scenario())
