"""Streams that go on at another gateway: two real gateways, a real Redis, and an instance whose tokens are known."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from gateway_pair import Pair, Stream, running_pair
from gateway_rig import TEXT, expected_tokens, until
from signals import send_signal

from infinitellm import AsyncClient, Tokens
from infinitellm import errors as sdk_errors
from infinitellm._rpc_errors import error_from_status
from infinitellm.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.position import START, EventId, Place, Position
from services.runtime.api_keys import new_key

pytestmark = pytest.mark.cluster

TOKENS = 120
BODY = {"prompt": [1, 2], "max_tokens": TOKENS, "temperature": 0, "stream": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("pair")) as running:
        yield running


def test_a_killed_gateways_streams_go_on_at_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running.instance(delay_s=0.04) as played:
            chat = {"messages": [{"role": "user", "content": "?"}], "max_tokens": TOKENS, "temperature": 0}
            chat |= {"stream": True, "stream_options": {"include_usage": True}}
            stop = {"stop": TEXT[-3:] + TEXT[:4]}  # found where the text begins anew
            streams = [
                asyncio.create_task(running.begin("/v1/completions", BODY)),
                asyncio.create_task(running.begin("/v1/chat/completions", chat)),
                asyncio.create_task(running.begin("/v1/completions", BODY | stop)),
            ]
            await until(
                lambda: (
                    len(played.submitted) == 3 and all(running.journalled(s.request_id) > 3 for s in played.submitted)
                ),
                "all have tokens in the journal",
            )
            running.first.process.kill()
            completion, chatting, stopped = [await stream for stream in streams]
            for stream in (completion, chatting, stopped):
                assert not stream.done
                assert await stream.resume(running.second) == 200
                assert stream.done
            text = bytes(expected_tokens(TOKENS)).decode(errors="replace")
            assert completion.tokens == expected_tokens(TOKENS)
            assert completion.text == text
            assert chatting.text == text
            roles = [choice["delta"].get("role") for choice in chatting.choices]
            assert roles == ["assistant"] + [None] * (len(roles) - 1)
            assert len({(chunk["id"], chunk["created"]) for chunk in chatting.chunks}) == 1
            assert chatting.chunks[-1]["usage"]["completion_tokens"] == TOKENS
            assert stopped.text == TEXT[:-3]
            assert stopped.choices[-1]["finish_reason"] == "stop"
            # What was computed for the second gateway began with what the first had journalled.
            again = [submit for submit in played.submitted if submit.request_id == completion.request_id + ".1"]
            assert len(again) == 1
            assert len(again[0].token_ids) > 2 + 3

    with running_pair(tmp_path) as running:
        asyncio.run(scenario())


def test_from_any_event_of_a_stream_the_rest_comes(pair: Pair) -> None:
    async def scenario() -> None:
        async with pair.instance(eos_at=30) as played:
            body = BODY | {"logprobs": 2, "stream_options": {"include_usage": True}}
            whole = await pair.begin("/v1/completions", body)
            assert whole.tokens[:-1] == expected_tokens(30)
            begun = [await pair.begin("/v1/completions", body, stop_after=count) for count in (1, 2, 31, 32, 33)]
            begun.append(dataclasses.replace(begun[0], last_event_id="", chunks=[]))
            for stream in begun:
                assert await stream.resume(pair.second) == 200
                assert stream.done
                for chunk, expected in zip(stream.chunks, whole.chunks, strict=True):
                    expected = expected | {"id": chunk["id"], "created": chunk["created"]}
                    if chunk["choices"]:
                        assert chunk == expected
            assert len(played.submitted) > len(begun)

    asyncio.run(scenario())


def test_who_does_not_ask_for_ids_gets_one_line_of_data_for_each_event(pair: Pair) -> None:
    async def scenario() -> None:
        async with pair.instance(), httpx.AsyncClient(timeout=20) as client:
            response = await client.post(f"{pair.first.http}/v1/completions", json=BODY)
            lines = [line for line in response.text.split("\n") if line]
            assert len(lines) > TOKENS / 2
            assert all(line.startswith("data: ") for line in lines)
            resumed = Stream(request_id=response.headers["x-request-id"])
            assert await resumed.resume(pair.second) == 200
            assert resumed.tokens == expected_tokens(TOKENS)
            assert resumed.last_event_id, "who resumes needs them"

    asyncio.run(scenario())


def test_two_gateways_never_go_on_with_one_request(pair: Pair) -> None:
    async def scenario() -> None:
        async with pair.instance(delay_s=0.03) as played:
            old = asyncio.create_task(pair.begin("/v1/completions", BODY | {"max_tokens": 1000}))
            await until(lambda: played.submitted, "the request is in work")
            (submit,) = played.submitted
            await until(lambda: pair.journalled(submit.request_id) > 3, "it has tokens in the journal")
            new = Stream(request_id=submit.request_id)
            resuming = asyncio.create_task(new.resume(pair.second))
            assert (await old).chunks[-1]["error"]["code"] == "taken_over"
            await until(lambda: played.aborted == [submit.request_id], "the instance computes it no more")
            # Nor does the one that lost it write to the journal any more; taken back, it goes on where it stood.
            before = pair.journalled(submit.request_id)
            await until(lambda: pair.journalled(submit.request_id) > before, "the other one's tokens are journalled")
            assert (await pair.state(submit.request_id))[b"owner"] == b"second"
            assert await (await old).resume(pair.first, stop_after=60) == 200
            assert not (await old).done
            await resuming
            assert new.chunks[-1]["error"]["code"] == "taken_over"
            assert new.tokens == expected_tokens(len(new.tokens))
            assert (await old).tokens == expected_tokens(len((await old).tokens))
            assert [submit.request_id for submit in played.submitted] == [
                new.request_id,
                new.request_id + ".1",
                new.request_id + ".2",
            ]

    asyncio.run(scenario())


class Rpc:
    """The gRPC API of a gateway, without the SDK's own retries."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def resume(self, request_id: str, received: list[int]) -> tuple[list[int], str]:
        """Tokens and text that come."""
        request = inference_pb2.ResumeRequest(request_id=request_id, received={"ids": received})
        return await self._read(self._stub.Resume(request, timeout=20))

    async def generate(self, received: list[int], **sampling: object) -> tuple[list[int], str]:
        request = inference_pb2.GenerateRequest(
            token_ids={"ids": [1, 2]}, sampling={"max_tokens": TOKENS, **sampling}, received={"ids": received}
        )
        return await self._read(self._stub.Generate(request, timeout=20))

    async def refusal(self, call: object) -> type[sdk_errors.InfiniteLLMError]:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        error = raised.value
        return type(error_from_status(error.code(), error.details(), error.trailing_metadata()))

    @staticmethod
    async def _read(call: object) -> tuple[list[int], str]:
        tokens, text = [], ""
        async for response in call:
            tokens += response.tokens.ids
            text += response.tokens.text
        return tokens, text

    async def close(self) -> None:
        await self._channel.close()


def test_resuming_over_grpc(pair: Pair) -> None:
    async def scenario() -> None:
        async with pair.instance() as played:
            rpc = Rpc(pair.second.grpc)
            whole = expected_tokens(TOKENS)
            text = bytes(whole).decode(errors="replace")
            begun = await pair.begin("/v1/completions", BODY, stop_after=20)
            await until(lambda: pair.journalled(begun.request_id) >= 20, "its tokens are in the journal")
            for count in (90, 0, 11, 20, TOKENS):  # at first more than anybody has computed
                tokens, rest = await rpc.resume(begun.request_id, whole[:count])
                await until(lambda: pair.journalled(begun.request_id) == TOKENS, "the journal has no gap")
                assert tokens == whole[count:]
                assert text.endswith(rest)
                shown = bytes(whole[:count]).decode(errors="ignore")  # what is not a whole character was held back
                assert shown + rest == text
            # Without a journal, the client's own tokens do as well.
            assert (await rpc.generate(whole[:7], temperature=0))[0] == whole[7:]
            drawn = expected_tokens(TOKENS, 1, 5)
            assert (await rpc.generate(drawn[:7], temperature=1, seed=5))[0] == drawn[7:]
            assert len(played.submitted[-1].token_ids) == 2 + 7

            assert await rpc.refusal(rpc.generate([300], temperature=0)) is sdk_errors.InvalidRequestError
            assert await rpc.refusal(rpc.generate([3], temperature=1)) is sdk_errors.InvalidRequestError
            assert await rpc.refusal(rpc.generate([3] * 121, temperature=0)) is sdk_errors.InvalidRequestError
            assert await rpc.refusal(rpc.resume("cmpl-none", [])) is sdk_errors.RequestNotFoundError
            for wrong in ([*whole[:10], 1], [1] * TOKENS):
                assert await rpc.refusal(rpc.resume(begun.request_id, wrong)) is sdk_errors.ResyncRequiredError
            await rpc.close()

    asyncio.run(scenario())


def test_what_cannot_be_resumed_over_http(pair: Pair) -> None:
    async def scenario() -> None:
        async with pair.instance():
            whole = await pair.begin("/v1/completions", BODY)
            too_far = Place(Position().after([*expected_tokens(TOKENS), 7]))
            for last, status in (("gibberish", 400), (str(EventId((Place(START.after([9])),))), 409)):
                stream = Stream(last, whole.request_id)
                assert await stream.resume(pair.second) == status
            assert await Stream("", "cmpl-unknown").resume(pair.second) == 404
            beyond = Stream(str(too_far), whole.request_id)
            assert await beyond.resume(pair.second) == 200  # the headers were out before anybody knew
            assert beyond.chunks[-1]["error"]["code"] == "resync_required"
            assert not beyond.tokens

    asyncio.run(scenario())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGSTOP])
def test_the_sdk_leaves_a_gateway_that_ends_or_hangs(tmp_path: Path, how: signal.Signals) -> None:
    async def scenario() -> None:
        tokens: list[int] = []
        async with (
            running.instance(delay_s=0.03) as played,
            AsyncClient([running.first.grpc, running.second.grpc]) as client,
        ):
            async for event in client.generate([1, 2], max_tokens=TOKENS, temperature=1, seed=4):
                if isinstance(event, Tokens):
                    tokens += event.ids
                    if len(tokens) == 10:
                        send_signal(running.first.process.pid, how)
            assert tokens == expected_tokens(TOKENS, 1, 4)
            assert [submit.request_id for submit in played.submitted] == [event.request_id, event.request_id + ".1"]

    with running_pair(tmp_path, shutdown_grace_s=0.5) as running:
        asyncio.run(scenario())


def test_redis_away(tmp_path: Path) -> None:
    """Running streams go on; lost ones cannot be resumed for the moment, which is said and counted."""

    async def scenario() -> None:
        async with running.instance(), httpx.AsyncClient(timeout=20) as client:
            lost = await running.begin("/v1/completions", BODY, stop_after=3)
            going = asyncio.create_task(running.begin("/v1/completions", BODY))
            await until(lambda: running.journalled(lost.request_id) >= 3, "its tokens are in the journal")
            running.redis.signal(signal.SIGSTOP)
            assert await lost.resume(running.second) == 503
            assert "journal_failures_total 1.0" in (await client.get(running.second.http + "/metrics")).text
            assert "journal: not read" in running.second.log.read_text()
            assert (await going).tokens == expected_tokens(TOKENS)
            running.redis.signal(signal.SIGCONT)
            assert await lost.resume(running.second) == 200
            assert lost.tokens == expected_tokens(TOKENS)

    with running_pair(tmp_path) as running:
        asyncio.run(scenario())


def test_only_the_key_that_began_a_request_resumes_it(tmp_path: Path) -> None:
    keys, lines = zip(*(new_key(name) for name in ("ann", "bob")), strict=True)
    (tmp_path / "keys").write_text("\n".join(lines))
    ann, bob = (f"Bearer {key}" for key in keys)

    async def scenario() -> None:
        async with running.instance():
            begun = await running.begin("/v1/completions", BODY, stop_after=3, Authorization=ann)
            await until(lambda: running.journalled(begun.request_id) >= 3, "its tokens are in the journal")
            assert await begun.resume(running.second) == 401
            assert await begun.resume(running.second, Authorization=bob) == 404
            assert await begun.resume(running.second, Authorization=ann) == 200
            assert begun.tokens == expected_tokens(TOKENS)

    with running_pair(tmp_path, api_keys=str(tmp_path / "keys")) as running:
        asyncio.run(scenario())
