"""The request journal in Redis: what was asked, and what has been answered so far.

    infinite-llm:{cluster}:request:{id}         hash    prompt (uint32 little-endian), parameters (JSON), arrival, state
    infinite-llm:{cluster}:request:{id}:tokens  string  generated ids (uint32 little-endian)

It is written behind the requests: nothing waits for it, and a Redis that is away or hangs never changes a token. While
it is away entries queue up; beyond ``buffer_bytes`` the oldest are dropped. A request of which anything was dropped is
not continued in the journal and marked "incomplete", so that a record is either whole up to some token or says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.gateway.requests import GenerationRequest

logger = logging.getLogger(__name__)

BATCH_ENTRIES = 512
BATCH_DELAY_S = 0.02
SOCKET_TIMEOUT_S = 2.0
MAX_BACKOFF_S = 2.0
CLOSE_TIMEOUT_S = 1.0
# What an entry takes beyond its data, roughly.
ENTRY_BYTES = 200


class Journal(Protocol):
    """Takes note of requests. No method waits or fails."""

    def started(self, request: GenerationRequest) -> None: ...

    def tokens(self, request_id: str, first: int, token_ids: Sequence[int]) -> None:
        """Tokens number ``first``, ``first + 1``, ... of the answer."""

    def ended(self, request_id: str, state: str) -> None:
        """``state``: "stop", "length", "aborted" or an error's reason."""

    async def close(self) -> None:
        """Writes what it can in a moment, then lets go."""


class NoJournal:
    """Keeps nothing."""

    def started(self, request: GenerationRequest) -> None:
        return

    def tokens(self, request_id: str, first: int, token_ids: Sequence[int]) -> None:
        return

    def ended(self, request_id: str, state: str) -> None:
        return

    async def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class _Started:
    request_id: str
    prompt: bytes
    parameters: str
    arrival: float

    @property
    def size(self) -> int:
        return ENTRY_BYTES + len(self.prompt)


@dataclass(frozen=True, slots=True)
class _Tokens:
    request_id: str
    # Byte offset: writing the same entry twice changes nothing.
    offset: int
    ids: bytes

    @property
    def size(self) -> int:
        return ENTRY_BYTES + len(self.ids)


@dataclass(frozen=True, slots=True)
class _Ended:
    request_id: str
    state: str

    @property
    def size(self) -> int:
        return ENTRY_BYTES


_Entry = _Started | _Tokens | _Ended


class RedisJournal:
    """Writes batches of entries from a task of its own; a failed batch is written again when Redis is back."""

    def __init__(self, url: str, cluster: str, ttl_s: int, buffer_bytes: int) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._prefix = f"infinite-llm:{cluster}:request:"
        self._ttl_s = ttl_s
        self._buffer_bytes = buffer_bytes
        self._entries: deque[_Entry] = deque()
        self._queued_bytes = 0
        # Requests that lost an entry; each until its end is written or lost as well.
        self._incomplete: set[str] = set()
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._write_forever(), name="journal")

    def started(self, request: GenerationRequest) -> None:
        parameters = json.dumps(
            {
                "max_tokens": request.max_tokens,
                "temperature": request.temperature,
                "seed": request.seed,
                "stop_token_ids": request.stop_token_ids,
                "logprobs": request.logprobs,
            }
        )
        self._put(_Started(request.request_id, _pack(request.prompt_ids), parameters, request.arrival_time))

    def tokens(self, request_id: str, first: int, token_ids: Sequence[int]) -> None:
        self._put(_Tokens(request_id, 4 * first, _pack(token_ids)))

    def ended(self, request_id: str, state: str) -> None:
        self._put(_Ended(request_id, state))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while self._entries:
                    await self._write_batch()
        except (RedisError, OSError, TimeoutError) as exc:
            logger.warning("journal: %d entries not written: %s", len(self._entries), exc)
        await self._redis.aclose()

    def _put(self, entry: _Entry) -> None:
        if entry.request_id in self._incomplete and not isinstance(entry, _Ended):
            return
        self._entries.append(entry)
        self._queued_bytes += entry.size
        while self._queued_bytes > self._buffer_bytes and self._entries:
            dropped = self._entries.popleft()
            self._queued_bytes -= dropped.size
            if isinstance(dropped, _Ended):
                self._incomplete.discard(dropped.request_id)
            else:
                self._incomplete.add(dropped.request_id)
        self._wake.set()

    async def _write_forever(self) -> None:
        away, backoff_s = False, 0.1
        while True:
            await self._wake.wait()
            await asyncio.sleep(BATCH_DELAY_S)
            try:
                while self._entries:
                    await self._write_batch()
                self._wake.clear()
            except (RedisError, OSError, TimeoutError) as exc:
                if not away:
                    logger.warning("journal: Redis is away, requests go on without it: %s", exc)
                away = True
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                continue
            if away:
                logger.info("journal: Redis is back")
            away, backoff_s = False, 0.1

    async def _write_batch(self) -> None:
        """Writes the oldest entries. They leave the queue only when Redis has confirmed them; all are idempotent."""
        batch = [self._entries[index] for index in range(min(BATCH_ENTRIES, len(self._entries)))]
        pipeline = self._redis.pipeline(transaction=False)
        for entry in batch:
            key = self._prefix + entry.request_id
            if isinstance(entry, _Started):
                fields = {"prompt": entry.prompt, "parameters": entry.parameters, "arrival": repr(entry.arrival)}
                pipeline.hset(key, mapping={**fields, "state": "running"})
            elif isinstance(entry, _Tokens):
                pipeline.setrange(key + ":tokens", entry.offset, entry.ids)
                pipeline.expire(key + ":tokens", self._ttl_s)
            else:
                pipeline.hset(key, "state", "incomplete" if entry.request_id in self._incomplete else entry.state)
            pipeline.expire(key, self._ttl_s)
        await pipeline.execute()
        for entry in batch:
            # While Redis was being waited for, an overflow may have dropped the oldest ones already.
            if self._entries and self._entries[0] is entry:
                self._entries.popleft()
                self._queued_bytes -= entry.size
                if isinstance(entry, _Ended):
                    self._incomplete.discard(entry.request_id)


def _pack(token_ids: Sequence[int]) -> bytes:
    """uint32 little-endian."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
