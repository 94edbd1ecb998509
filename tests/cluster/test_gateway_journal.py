"""The request journal in a real Redis that is killed, stopped and too slow: never a token changes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import struct
from pathlib import Path

import httpx
import pytest
from gateway_rig import PlayedInstance, Script, expected_tokens, gateway, service, until, write_checkpoint
from redis_process import RedisProcess

from services.core.errors import RequestNotFoundError
from services.gateway.journal import RedisJournal
from services.gateway.requests import GenerationRequest, Tenure
from services.runtime.etcd import EtcdClient

pytestmark = pytest.mark.cluster


def request(request_id: str, prompt: tuple[int, ...] = (1, 2, 300)) -> GenerationRequest:
    return GenerationRequest(request_id, prompt, 8, 0.5, 2**63, (3,), 0, False, 12.25)


def never() -> None:
    raise AssertionError("nobody takes it over")


def record(server: RedisProcess, request_id: str) -> tuple[dict[bytes, bytes], list[int]]:
    client = server.client()
    key = f"infinite-llm:c:request:{request_id}"
    tokens = client.get(key + ":tokens") or b""
    return client.hgetall(key), list(struct.unpack(f"<{len(tokens) // 4}I", tokens))


def test_what_is_written(redis_process: RedisProcess) -> None:
    async def scenario() -> None:
        journal = RedisJournal(redis_process.url, "c", "gateway-0", ttl_s=60, buffer_bytes=1 << 20)
        journal.started(request("r"), never)
        journal.tokens(Tenure("r"), 0, (5, 6))
        journal.tokens(Tenure("r"), 2, (70_000,))
        await until(lambda: record(redis_process, "r")[1] == [5, 6, 70_000], "the tokens are there")
        fields, _ = record(redis_process, "r")
        assert struct.unpack("<3I", fields[b"prompt"]) == (1, 2, 300)
        assert json.loads(fields[b"parameters"])["seed"] == 2**63
        assert json.loads(fields[b"parameters"])["arrival_time"] == 12.25
        assert fields[b"state"] == b"running"
        journal.ended(Tenure("r"), "stop")
        await journal.close()
        assert record(redis_process, "r")[0][b"state"] == b"stop"
        client = redis_process.client()
        assert 0 < client.ttl("infinite-llm:c:request:r") <= 60
        assert 0 < client.ttl("infinite-llm:c:request:r:tokens") <= 60

    asyncio.run(scenario())


def test_tokens_that_come_quickly_are_written_at_once_and_a_long_request_is_kept(redis_process: RedisProcess) -> None:
    async def scenario() -> None:
        client = redis_process.client()
        journal = RedisJournal(redis_process.url, "c", "gateway-0", ttl_s=2, buffer_bytes=1 << 20)
        journal.started(request("r"), never)
        for index in range(300):
            journal.tokens(Tenure("r"), index, (index,))
            await asyncio.sleep(0.01)  # in all, longer than it is kept without being written to
        await journal.close()
        assert record(redis_process, "r")[1] == list(range(300))
        assert record(redis_process, "r")[0][b"state"] == b"running"
        assert client.info("commandstats")["cmdstat_setrange"]["calls"] < 100

    asyncio.run(scenario())


def test_a_redis_that_comes_back_gets_everything(redis_process: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        journal = RedisJournal(redis_process.url, "c", "gateway-0", ttl_s=60, buffer_bytes=1 << 20)
        redis_process.signal(signal.SIGKILL)
        journal.started(request("r"), never)
        for index in range(600):  # more than one batch
            journal.tokens(Tenure("r"), index, (index,))
            if index % 100 == 0:
                await asyncio.sleep(0.1)
        redis_process.start()
        await until(lambda: record(redis_process, "r")[1] == list(range(600)), "everything is there")
        assert [message for message in caplog.messages if "is away" in message][1:] == []
        await until(lambda: journal.stats.queued_bytes == 0, "the journal has heard of it")
        assert journal.stats.failures > 0
        assert journal.stats.dropped_entries == 0
        await journal.close()

    asyncio.run(scenario())


def test_overflow_drops_the_oldest_and_says_so(redis_process: RedisProcess) -> None:
    async def scenario() -> None:
        redis_process.signal(signal.SIGKILL)
        journal = RedisJournal(redis_process.url, "c", "gateway-0", ttl_s=60, buffer_bytes=1_300)
        journal.started(request("old"), never)
        for index in range(100):
            journal.tokens(Tenure("old"), index, (index,))
        journal.ended(Tenure("old"), "length")
        journal.started(request("new"), never)
        journal.tokens(Tenure("new"), 0, (9,))
        journal.ended(Tenure("new"), "length")
        redis_process.start()
        await until(lambda: record(redis_process, "new")[0].get(b"state") == b"length", "the new one is there")
        assert record(redis_process, "new")[1] == [9]
        assert record(redis_process, "old")[0][b"state"] == b"incomplete"
        assert journal.stats.dropped_entries > 0
        await journal.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_go_on_without_redis(
    etcd_endpoint: str, redis_process: RedisProcess, tmp_path: Path, how: signal.Signals
) -> None:
    async def scenario() -> None:
        etcd = EtcdClient([etcd_endpoint])
        played = PlayedInstance("instance-0", Script(delay_s=0.01))
        await played.start(etcd)
        body = {"prompt": [1], "max_tokens": 100, "temperature": 0, "return_token_ids": True}
        async with httpx.AsyncClient(base_url=running.http, timeout=30) as client:

            async def ready() -> bool:
                return (await client.get("/health")).status_code == 200

            await until(ready, "the gateway is ready")
            answer = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: played.submitted, "the request is in work")
            await asyncio.sleep(0.2)
            redis_process.signal(how)
            assert (await answer).json()["choices"][0]["token_ids"] == expected_tokens(100)
            # Nor does it start to matter later.
            later = await client.post("/v1/completions", json=body)
            assert later.json()["choices"][0]["token_ids"] == expected_tokens(100)
        await played.close()
        await etcd.close()

    with (
        service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_endpoint]),
        gateway(tmp_path, etcd_endpoint, write_checkpoint(tmp_path / "tiny"), redis_url=redis_process.url) as running,
    ):
        asyncio.run(scenario())
    assert running.process.returncode == 0


def test_whoever_was_taken_over_writes_no_more_and_is_told(redis_process: RedisProcess) -> None:
    async def scenario() -> None:
        old, new = (RedisJournal(redis_process.url, "c", name, ttl_s=60, buffer_bytes=1 << 20) for name in ("a", "b"))
        told: list[str] = []
        asked = dataclasses.replace(request("r"), stop=("ä",), rendering="{}", key_name="ann", model="m", progress=True)
        old.started(asked, lambda: told.append("a"))
        old.tokens(asked.tenure, 0, (5, 6))
        await until(lambda: record(redis_process, "r")[1] == [5, 6], "the tokens are there")
        for unknown in (("r", "bob"), ("r", ""), ("s", "ann")):
            with pytest.raises(RequestNotFoundError):
                await new.take_over(*unknown)
        taken, tokens = await new.take_over("r", "ann")
        assert list(tokens) == [5, 6]
        assert (list(taken.prompt_ids), taken.tenure) == ([1, 2, 300], Tenure("r", 1))
        assert dataclasses.replace(taken, prompt_ids=asked.prompt_ids, takeovers=0) == asked

        new.started(taken, lambda: told.append("b"))
        old.tokens(asked.tenure, 2, (7, 7, 7))
        await until(lambda: told == ["a"], "the old owner is told")
        new.tokens(taken.tenure, 2, (8,))
        await until(lambda: record(redis_process, "r")[1] == [5, 6, 8], "the new owner's tokens are there")
        old.ended(asked.tenure, "aborted")
        await old.close()
        fields, tokens = record(redis_process, "r")
        assert (fields[b"state"], fields[b"owner"], fields[b"takeovers"], tokens) == (b"running", b"b", b"1", [5, 6, 8])
        new.ended(taken.tenure, "stop")
        await new.close()
        assert record(redis_process, "r")[0][b"state"] == b"stop"
        assert told == ["a"]

    asyncio.run(scenario())


def test_a_request_that_had_not_begun_begins_with_its_take_over(redis_process: RedisProcess) -> None:
    async def scenario() -> None:
        old, new = (RedisJournal(redis_process.url, "c", owner, ttl_s=60, buffer_bytes=1 << 20) for owner in ("a", "b"))
        late, told = request("r"), []
        taken, tokens = await new.take_over("r", "", late)
        assert (taken.tenure, list(tokens)) == (Tenure("r", 1), [])
        assert dataclasses.replace(taken, prompt_ids=late.prompt_ids, takeovers=0) == late
        new.started(taken, never)
        new.tokens(taken.tenure, 0, (5, 6))
        await until(lambda: record(redis_process, "r")[1] == [5, 6], "the tokens are there")
        # The old owner, which was about to begin it, learns that it is late, and changes nothing.
        old.started(late, lambda: told.append("a"))
        old.tokens(late.tenure, 0, (7,))
        await until(lambda: told == ["a"], "the old owner is told")
        await old.close()
        assert record(redis_process, "r")[1] == [5, 6]
        again, tokens = await new.take_over("r", "", late)
        assert (again.tenure, list(tokens)) == (Tenure("r", 2), [5, 6])
        await new.close()

    asyncio.run(scenario())


def test_a_record_has_no_gap_whatever_redis_forgets(redis_process: RedisProcess) -> None:
    async def scenario() -> None:
        journal = RedisJournal(redis_process.url, "c", "gateway-0", ttl_s=60, buffer_bytes=1 << 20)
        client = redis_process.client()
        for name in ("whole", "tokens"):
            journal.started(request(name), never)
            journal.tokens(Tenure(name), 0, (5, 6))
        await until(lambda: record(redis_process, "tokens")[1] == [5, 6], "the tokens are there")
        client.delete("infinite-llm:c:request:whole", "infinite-llm:c:request:whole:tokens")
        client.delete("infinite-llm:c:request:tokens:tokens")
        for name in ("whole", "tokens"):
            journal.tokens(Tenure(name), 2, (7,))
            journal.ended(Tenure(name), "stop")
        await until(lambda: record(redis_process, "tokens")[0][b"state"] == b"stop", "everything is written")
        assert record(redis_process, "tokens")[1] == []
        assert list((await journal.take_over("tokens", "")).generated) == []  # and goes on from the prompt
        with pytest.raises(RequestNotFoundError):
            await journal.take_over("whole", "")
        await journal.close()

    asyncio.run(scenario())
