"""The load client against a small server whose every byte and pause is known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from benchmarks.http_load import Ask, Load, LoadError, RefusedError, complete, send_load
from benchmarks.mixed_load import Sent, Target, send_mixed

PAUSE_S = 0.02
Script = Callable[[dict], Sequence[bytes]]


def event(text: str, tokens: int = 1, **more: object) -> bytes:
    choices = [{"index": 0, "text": text, "logprobs": None}] if tokens else []
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


def usage(prompt: int, output: int, cached: int | None = 0) -> bytes:
    details = None if cached is None else {"cached_tokens": cached}
    counted = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}
    return event("", tokens=0, usage=counted)


def right(asked: dict) -> list[bytes]:
    """What a server does that computes what it is asked for, a token at a time."""
    words = [event(f" w{n}") for n in range(asked["max_tokens"])]
    return [*words, event(""), usage(len(asked["prompt"]), asked["max_tokens"]), b"data: [DONE]\n\n"]


@asynccontextmanager
async def serving(
    script: Script, status: int = 200, chunked: bool = True, at_once: list[int] | None = None
) -> AsyncIterator[str]:
    """A server that answers every POST with the script's pieces, ``PAUSE_S`` apart; counts the requests in work."""
    working = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal working
        working += 1
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        (length,) = [
            int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")
        ]
        assert head.startswith("POST /v1/completions HTTP/1.1\r\n")
        asked = json.loads(await reader.readexactly(length))
        assert (asked["stream"], asked["ignore_eos"], asked["temperature"]) == (True, True, 0)
        kind = "Transfer-Encoding: chunked\r\n" if chunked else ""
        writer.write(f"HTTP/1.1 {status} X\r\n{kind}Content-Type: text/event-stream\r\n\r\n".encode())
        for piece in script(asked):
            await asyncio.sleep(PAUSE_S)
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
            if at_once is not None:
                at_once.append(working)
        if chunked:
            writer.write(b"0\r\n\r\n")
        working -= 1
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def load(script: Script, asks: Sequence[Ask], **how: object) -> Load:
    async def run() -> Load:
        async with serving(script, **how) as address:
            return await send_load(address, "m", asks)

    return asyncio.run(run())


def refusal(script: Script, **how: object) -> str:
    with pytest.raises(LoadError) as caught:
        load(script, [Ask((1, 2, 3), 2)], **how)
    return str(caught.value)


@pytest.mark.parametrize("chunked", [True, False])
def test_tokens_and_times_of_one_request(chunked: bool) -> None:
    (answer,) = load(right, [Ask((7, 8, 9), 5)], chunked=chunked).answers
    assert (answer.prompt_tokens, answer.output_tokens, answer.chunks) == (3, 5, 5)
    # The first token comes after one pause, the last after four more; what follows carries no token and does not count.
    assert answer.ttft_s >= PAUSE_S
    assert answer.last_at - answer.first_at >= 4 * PAUSE_S * 0.9
    assert answer.tpot_s == pytest.approx((answer.last_at - answer.first_at) / 4)
    assert answer.sent_at < answer.first_at < answer.last_at


def test_requests_are_sent_at_once_and_counted_together() -> None:
    working: list[int] = []
    measured = load(right, [Ask((1,) * 10, 4) for _ in range(6)], at_once=working)
    assert max(working) == 6
    first, last = min(a.sent_at for a in measured.answers), max(a.last_at for a in measured.answers)
    assert measured.wall_s == last - first
    assert measured.output_tokens_per_s == pytest.approx(24 / (last - first))
    until_first = max(a.first_at for a in measured.answers) - first
    assert measured.prompt_tokens_per_s == pytest.approx(60 / until_first)
    assert measured.tpot_s > 0


def test_an_event_may_be_cut_anywhere() -> None:
    def cut(asked: dict) -> list[bytes]:
        whole = b"".join(right(asked))
        return [whole[at : at + 7] for at in range(0, len(whole), 7)]

    (answer,) = load(cut, [Ask((1, 2), 1)]).answers
    assert (answer.output_tokens, answer.chunks) == (1, 1)


def test_several_tokens_in_one_event_are_counted_by_the_usage() -> None:
    def together(asked: dict) -> list[bytes]:
        return [event(" a b"), event(" c"), usage(1, 3), b"data: [DONE]\n\n"]

    (answer,) = load(together, [Ask((1,), 3)]).answers
    assert (answer.output_tokens, answer.chunks) == (3, 2)


def test_a_single_token_has_no_time_between_tokens() -> None:
    (answer,) = load(right, [Ask((1,), 1)]).answers
    assert answer.tpot_s == 0


def test_what_was_not_computed_as_asked_is_an_error() -> None:
    done = b"data: [DONE]\n\n"
    assert "should have (3, 2) tokens" in refusal(lambda _: [event(" a"), usage(3, 1), done])
    assert "should have (3, 2) tokens" in refusal(lambda _: [event(" a"), usage(2, 2), done])
    assert "64 tokens of the prompt were cached" in refusal(lambda _: [event(" a"), usage(3, 2, cached=64), done])
    assert load(lambda _: [event(" a"), usage(3, 2, cached=None), done], [Ask((1, 2, 3), 2)]).answers


def test_an_own_cache_may_be_used_where_the_caller_says_so() -> None:
    async def run() -> int:
        script = lambda _: [event(" a"), usage(3, 2, cached=64), b"data: [DONE]\n\n"]  # noqa: E731
        async with serving(script) as address:
            return (await complete(address, "m", Ask((1, 2, 3), 2), may_be_cached=True)).output_tokens

    assert asyncio.run(run()) == 2


def test_a_refusal_is_told_apart_from_a_failure() -> None:
    for status, refused in ((400, True), (429, False), (500, False)):
        with pytest.raises(LoadError) as caught:
            load(lambda _: [b"too long"], [Ask((1, 2, 3), 2)], status=status)
        assert isinstance(caught.value, RefusedError) is refused


def test_each_request_of_a_mixed_load_goes_where_most_room_is() -> None:
    got: tuple[list[int], list[int]] = ([], [])

    def counting(into: list[int]) -> Script:
        def script(asked: dict) -> list[bytes]:
            into.append(len(asked["prompt"]))
            return right(asked)

        return script

    async def run() -> Sent:
        async with serving(counting(got[0])) as small, serving(counting(got[1])) as large:
            targets = (Target(small, "m", 100), Target(large, "m", 200))
            asks = [Ask((1,) * tokens, 2) for tokens in (150, 40, 30, 20)]
            return await send_mixed(targets, asks, clients=2, show=lambda _: None)

    sent = asyncio.run(run())
    assert (len(sent.answers), sent.refused) == (4, 0)
    assert got[1][0] == 150
    assert got[0][0] == 40  # 100 free here, 48 there
    assert sent.output_tokens_per_s == pytest.approx(8 / sent.wall_s)


def test_what_is_refused_is_counted_and_the_rest_goes_on() -> None:
    async def run() -> Sent:
        async with serving(lambda _: [b"too long"], status=400) as address:
            asks = [Ask((1,), 2)] * 3
            return await send_mixed((Target(address, "m", 1),), asks, clients=2, show=lambda _: None)

    sent = asyncio.run(run())
    assert (sent.answers, sent.refused) == ((), 3)


def test_a_broken_answer_is_an_error() -> None:
    error = b'data: {"error": {"message": "no room"}}\n\n'
    assert "no room" in refusal(lambda _: [event(" a"), error])
    assert "ended early" in refusal(lambda _: [event(" a"), event(" b"), usage(3, 2)])  # and no [DONE]
    assert "ended early" in refusal(lambda _: [event(" a"), event(" b"), b"data: [DONE]\n\n"])  # and no usage
    assert "answered 429: try again" in refusal(lambda _: [b"try again"], status=429)


def test_nobody_there() -> None:
    with pytest.raises(LoadError, match="ConnectionRefusedError"):
        asyncio.run(send_load("127.0.0.1:1", "m", [Ask((1,), 1)]))
