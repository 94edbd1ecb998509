"""Streams of several choices that go on at another gateway: of each choice no token is lost, and none comes twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_pair import Pair, Stream, running_pair
from gateway_rig import expected_tokens, until

pytestmark = pytest.mark.cluster

TOKENS = 80
N = 3
SAMPLED = {"n": N, "temperature": 1, "seed": 5, "max_tokens": TOKENS, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
BODY = SAMPLED | USAGE | {"prompt": [1, 2], "return_token_ids": True}
CHAT = SAMPLED | USAGE | {"messages": [{"role": "user", "content": "?"}]}
LETTERS = [chr(code) for code in range(ord("a"), ord("q"))]  # as stop strings, they end the choices at different times


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("pair")) as running:
        yield running


def of_choice(stream: Stream, index: int) -> list[dict[str, object]]:
    """What has come of one choice, in its order."""
    return [choice for choice in stream.choices if choice["index"] == index]


def tokens_of(stream: Stream, index: int) -> list[int]:
    return [token for choice in of_choice(stream, index) for token in choice["token_ids"]]


def texts_of(stream: Stream, index: int) -> list[str]:
    return [choice["text"] if "text" in choice else choice["delta"]["content"] for choice in of_choice(stream, index)]


def check_ends(stream: Stream) -> None:
    """Each choice has ended once, and so has the stream."""
    assert stream.done
    for index in range(N):
        reasons = [choice["finish_reason"] for choice in of_choice(stream, index)]
        assert [reason is not None for reason in reasons] == [False] * (len(reasons) - 1) + [True]
    assert [bool(chunk["usage"]) for chunk in stream.chunks] == [False] * (len(stream.chunks) - 1) + [True]


def test_a_killed_gateways_streams_go_on_at_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running.instance(delay_s=0.04) as played:
            streams = [
                asyncio.create_task(running.begin("/v1/completions", BODY)),
                asyncio.create_task(running.begin("/v1/chat/completions", CHAT)),
            ]
            await until(
                lambda: (
                    len(played.submitted) == 2 * N
                    and all(running.journalled(submit.request_id) > 3 for submit in played.submitted)
                ),
                "all have tokens in the journal",
            )
            running.first.process.kill()
            completion, chatting = [await stream for stream in streams]
            for stream in (completion, chatting):
                assert not stream.done
                assert await stream.resume(running.second) == 200
                check_ends(stream)
                assert len({(chunk["id"], chunk["created"]) for chunk in stream.chunks}) == 1
                assert stream.chunks[-1]["usage"]["completion_tokens"] == N * TOKENS
            seeds = {submit.request_id: submit.seed for submit in played.submitted}
            for index in range(N):
                ending = f"-{index}" if index else ""
                expected = expected_tokens(TOKENS, 1, seeds[completion.request_id + ending])
                assert tokens_of(completion, index) == expected
                assert "".join(texts_of(completion, index)) == bytes(expected).decode(errors="replace")
                again = [s for s in played.submitted if s.request_id == f"{completion.request_id}{ending}.1"]
                assert len(again) == 1
                assert len(again[0].token_ids) > 2 + 3, "what was journalled is not drawn again"
                expected = expected_tokens(TOKENS, 1, seeds[chatting.request_id + ending])
                assert "".join(texts_of(chatting, index)) == bytes(expected).decode(errors="replace")
                roles = [choice["delta"].get("role") for choice in of_choice(chatting, index)]
                assert roles == ["assistant"] + [None] * (len(roles) - 1)

    with running_pair(tmp_path) as running:
        asyncio.run(scenario())


@pytest.mark.parametrize("fields", [{"stop": LETTERS}, {"stop": LETTERS, "logprobs": 2}, {"echo": True, "logprobs": 1}])
def test_from_any_event_of_a_stream_the_rest_comes(pair: Pair, fields: dict[str, object]) -> None:
    async def scenario() -> None:
        async with pair.instance(delay_s=0.005):
            whole = await pair.begin("/v1/completions", BODY | fields)
            check_ends(whole)
            length = len(whole.chunks)
            for count in (0, 1, 2, 3, length // 3, length // 2, length - 2, length - 1, length):
                stream = await pair.begin("/v1/completions", BODY | fields, stop_after=max(1, count))
                if not count:
                    stream = Stream(request_id=stream.request_id)
                while not stream.done:  # and once more in the middle
                    assert await stream.resume(pair.second, stop_after=len(stream.chunks) + length // 4) == 200
                check_ends(stream)
                for index in range(N):
                    assert of_choice(stream, index) == of_choice(whole, index)
                assert stream.chunks[-1]["usage"]["completion_tokens"] == whole.chunks[-1]["usage"]["completion_tokens"]

    asyncio.run(scenario())


def test_a_choice_that_the_journal_does_not_know_is_drawn_again(pair: Pair) -> None:
    async def scenario() -> None:
        async with pair.instance() as played:
            begun = await pair.begin("/v1/completions", BODY, stop_after=20)
            for index in (1, 2):
                key = f"infinite-llm:test:request:{begun.request_id}-{index}"
                await until(lambda key=key: pair.redis.client().exists(key), "it is journalled")
                pair.redis.client().delete(key, key + ":tokens")
            seeds = [submit.seed for submit in played.submitted]
            assert await begun.resume(pair.second) == 200
            check_ends(begun)
            for index in range(N):
                assert tokens_of(begun, index) == expected_tokens(TOKENS, 1, seeds[index])
            # It is journalled from then on, for whoever comes next.
            await until(lambda: pair.journalled(f"{begun.request_id}-1") == TOKENS, "all of it is in the journal")
            whole = Stream(request_id=begun.request_id)
            submitted = len(played.submitted)
            assert await whole.resume(pair.first) == 200
            assert [tokens_of(whole, index) for index in range(N)] == [tokens_of(begun, index) for index in range(N)]
            assert len(played.submitted) == submitted

    asyncio.run(scenario())


def test_two_gateways_never_go_on_with_one_request(pair: Pair) -> None:
    async def scenario() -> None:
        async with pair.instance(delay_s=0.03) as played:
            old = asyncio.create_task(pair.begin("/v1/completions", BODY | {"max_tokens": 1000}))
            await until(lambda: len(played.submitted) == N, "the request is in work")
            names = [submit.request_id for submit in played.submitted]
            await until(lambda: all(pair.journalled(name) > 3 for name in names), "it has tokens in the journal")
            new = Stream(request_id=names[0])
            resuming = asyncio.create_task(new.resume(pair.second, stop_after=60))
            assert (await old).chunks[-1]["error"]["code"] == "taken_over"
            await until(lambda: {*names} <= {*played.aborted}, "the instance computes none of it any more")
            for name in names:
                assert (await pair.state(name))[b"owner"] == b"second"
            assert await resuming == 200
            seeds = [submit.seed for submit in played.submitted[:N]]
            for stream in (await old, new):
                for index in range(N):
                    tokens = tokens_of(stream, index)
                    assert tokens == expected_tokens(len(tokens), 1, seeds[index])
            wrong = Stream("0-00000000", names[0])  # of a stream with one choice
            assert await wrong.resume(pair.first) == 400

    asyncio.run(scenario())
