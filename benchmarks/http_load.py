"""A client that loads a server of OpenAI's completions API over HTTP and takes the times of what comes back.

Any server of that API is asked alike: prompts as token ids, greedy, streamed, each request on a connection of its own.
The client does little for a token (one read, one JSON object), so that its own core suffices for what it measures. What
a server did not compute as asked is an error, not a fast answer: another number of tokens, a cached prompt, a broken
stream.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from services.core.errors import InfiniteLLMError

_LIMIT = 1 << 20  # bytes of one line
_DATA = b"data: "
_DONE = b"[DONE]"
_REFUSALS = (400, 413, 422)
REQUEST_TIMEOUT_S = 600.0


class LoadError(InfiniteLLMError):
    """A server answered something else than it was asked for."""


class RefusedError(LoadError):
    """A server said that it cannot serve this request at all."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: ``output_tokens`` greedy tokens after ``prompt``, whatever they are."""

    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered request. Times are of ``time.perf_counter``, in seconds.

    Attributes:
        prompt_tokens, output_tokens: as the server counts them.
        chunks: events that carried text or tokens.
        sent_at: when the connection was asked for.
        first_at, last_at: of the first and of the last event that carried tokens.
    """

    prompt_tokens: int
    output_tokens: int
    chunks: int
    sent_at: float
    first_at: float
    last_at: float

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.sent_at

    @property
    def tpot_s(self) -> float:
        """Mean time between output tokens; 0 for a single one."""
        return (self.last_at - self.first_at) / max(1, self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that were sent at once, all answered."""

    answers: tuple[Answered, ...]

    @property
    def wall_s(self) -> float:
        """From the first request to the last token."""
        return max(answer.last_at for answer in self.answers) - min(answer.sent_at for answer in self.answers)

    @property
    def output_tokens_per_s(self) -> float:
        return sum(answer.output_tokens for answer in self.answers) / self.wall_s

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens until the last first token."""
        took_s = max(answer.first_at for answer in self.answers) - min(answer.sent_at for answer in self.answers)
        return sum(answer.prompt_tokens for answer in self.answers) / took_s

    @property
    def ttft_s(self) -> float:
        return statistics.median(answer.ttft_s for answer in self.answers)

    @property
    def tpot_s(self) -> float:
        return statistics.median(answer.tpot_s for answer in self.answers)


async def send_load(address: str, model: str, asks: Sequence[Ask]) -> Load:
    """Sends all requests at once and waits for all answers.

    Args:
        address: host:port.

    Raises:
        LoadError: an answer was not what was asked for; the other requests are given up.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(complete(address, model, ask)) for ask in asks]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return Load(tuple(task.result() for task in tasks))


async def complete(address: str, model: str, ask: Ask, *, may_be_cached: bool = False) -> Answered:
    """One streamed completion.

    Args:
        may_be_cached: whether parts of the prompt may come from a cache: its own, say, after it was preempted.

    Raises:
        RefusedError: the server answered that the request is not one for it.
        LoadError: the answer was not what was asked for.
    """
    body = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chunks, first_at, last_at = 0, 0.0, 0.0
    usage: dict[str, object] | None = None
    done = False
    sent_at = time.perf_counter()
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            async for data in _events(address, json.dumps(body).encode()):
                now = time.perf_counter()
                if data == _DONE:
                    done = True
                    break
                event = json.loads(data)
                if "choices" not in event:
                    raise LoadError(f"{address}: the stream broke off: {data.decode()[:500]}")
                usage = event.get("usage") or usage
                if any(choice["text"] for choice in event["choices"]):
                    chunks, first_at, last_at = chunks + 1, first_at or now, now
    except TimeoutError:
        raise LoadError(f"{address}: not answered within {REQUEST_TIMEOUT_S:g} s") from None
    except (OSError, EOFError, ValueError) as error:
        raise LoadError(f"{address}: {type(error).__name__}: {error}") from error
    if not done or usage is None or not chunks:
        raise LoadError(f"{address}: the stream ended early, after {chunks} events with text")
    answered = Answered(
        _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"), chunks, sent_at, first_at, last_at
    )
    _check(address, ask, answered, 0 if may_be_cached else _cached(usage))
    return answered


def _check(address: str, ask: Ask, answered: Answered, cached: int) -> None:
    """Raises LoadError unless the server did the work that it was asked for."""
    wanted, got = (len(ask.prompt), ask.output_tokens), (answered.prompt_tokens, answered.output_tokens)
    if got != wanted:
        raise LoadError(f"{address}: prompt and output should have {wanted} tokens, the server counts {got}")
    if cached:
        raise LoadError(f"{address}: {cached} tokens of the prompt were cached")


def _cached(usage: dict[str, object]) -> int:
    details = usage.get("prompt_tokens_details")
    return _count(details, "cached_tokens") if isinstance(details, dict) else 0


def _count(usage: dict[str, object], key: str) -> int:
    value = usage.get(key) or 0
    if not isinstance(value, int):
        raise LoadError(f"usage.{key} is no number: {value!r}")
    return value


async def _events(address: str, body: bytes) -> AsyncIterator[bytes]:
    """The data of each server-sent event of one POST, as soon as it is there.

    Raises: LoadError for another status than 200; OSError, EOFError, ValueError where HTTP itself broke.
    """
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=_LIMIT)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status, headers = await _read_head(reader)
        parts = _chunks(reader) if headers.get("transfer-encoding") == "chunked" else _rest(reader)
        if status != 200:
            answer = b"".join([part async for part in parts])
            kind = RefusedError if status in _REFUSALS else LoadError
            raise kind(f"{address}: answered {status}: {answer.decode(errors='replace')[:500]}")
        pending = b""
        async for part in parts:
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                if line.startswith(_DATA):
                    yield line.removeprefix(_DATA).rstrip(b"\r")
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status code and headers, names in lower case."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split(" ")[1]), headers


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A chunked body, chunk by chunk."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A body that ends with the connection."""
    while part := await reader.read(_LIMIT):
        yield part
