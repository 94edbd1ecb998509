"""The request journal in Redis: what was asked, and what has been answered so far.

    infinite-llm:{cluster}:request:{id}         hash    prompt (uint32 little-endian), parameters (JSON), arrival, state
    infinite-llm:{cluster}:request:{id}:tokens  string  generated ids (uint32 little-endian)

It is written behind the requests: nothing waits for it, and a Redis that is away or hangs never changes a token. A
request's tokens are gathered for ``BATCH_DELAY_S`` and written at once. While Redis is away entries queue up; beyond
``buffer_bytes`` the oldest are dropped. A request of which anything was dropped is not continued in the journal and
marked "incomplete", so that a record is either whole up to some token or says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import redis.asyncio
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.gateway.requests import GenerationRequest

logger = logging.getLogger(__name__)

BATCH_ENTRIES = 512
BATCH_DELAY_S = 0.25
SOCKET_TIMEOUT_S = 2.0
MAX_BACKOFF_S = 2.0
CLOSE_TIMEOUT_S = 1.0
# What an entry takes beyond its data, roughly.
ENTRY_BYTES = 200
ID_BYTES = 4
# How often the life of a running request's record is prolonged, as a part of it.
_KEEP_INTERVAL = 0.25


@dataclass(frozen=True, slots=True)
class JournalStats:
    """How writing goes, since the start: failed writes (which are tried again), entries dropped; and what waits now."""

    failures: int = 0
    dropped_entries: int = 0
    queued_bytes: int = 0


class Journal(Protocol):
    """Takes note of requests. No method waits or fails."""

    @property
    def stats(self) -> JournalStats: ...

    def started(self, request: GenerationRequest) -> None: ...

    def tokens(self, request_id: str, first: int, token_ids: Sequence[int]) -> None:
        """Tokens number ``first``, ``first + 1``, ... of the answer."""

    def ended(self, request_id: str, state: str) -> None:
        """``state``: "stop", "length", "aborted" or an error's reason."""

    async def close(self) -> None:
        """Writes what it can in a moment, then lets go."""


class NoJournal:
    """Keeps nothing."""

    stats = JournalStats()

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


@dataclass(slots=True)
class _Tokens:
    """Grows until it is written."""

    request_id: str
    # Index of the first: writing the same entry twice changes nothing.
    first: int
    ids: list[int]

    @property
    def size(self) -> int:
        return ENTRY_BYTES + ID_BYTES * len(self.ids)


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
        self._failures = self._dropped = 0
        # Entries of the queue that take further tokens, by request.
        self._growing: dict[str, _Tokens] = {}
        # Requests that lost an entry; each until its end is written or lost as well.
        self._incomplete: set[str] = set()
        # When the keys of running requests are to be given their time to live anew, on the monotonic clock.
        self._keep_at: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._write_forever(), name="journal")

    @property
    def stats(self) -> JournalStats:
        return JournalStats(self._failures, self._dropped, self._queued_bytes)

    def started(self, request: GenerationRequest) -> None:
        parameters = json.dumps(
            {
                "max_tokens": request.max_tokens,
                "temperature": request.temperature,
                "seed": request.seed,
                "stop_token_ids": request.stop_token_ids,
                "logprobs": request.logprobs,
                "shaping": asdict(request.shaping),
                "structure": None if request.structure is None else asdict(request.structure),
            }
        )
        self._put(_Started(request.request_id, _pack(request.prompt_ids), parameters, request.arrival_time))

    def tokens(self, request_id: str, first: int, token_ids: Sequence[int]) -> None:
        entry = self._growing.get(request_id)
        if entry is None:
            entry = _Tokens(request_id, first, list(token_ids))
            if self._put(entry):
                self._growing[request_id] = entry
            return
        entry.ids.extend(token_ids)
        self._queued_bytes += ID_BYTES * len(token_ids)
        self._drop_overflow()

    def ended(self, request_id: str, state: str) -> None:
        self._growing.pop(request_id, None)
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

    def _put(self, entry: _Entry) -> bool:
        """Queues an entry; answers whether it is still there afterwards."""
        if entry.request_id in self._incomplete and not isinstance(entry, _Ended):
            return False
        self._entries.append(entry)
        self._queued_bytes += entry.size
        self._drop_overflow()
        self._wake.set()
        return bool(self._entries)  # the last one is the last to be dropped

    def _drop_overflow(self) -> None:
        while self._queued_bytes > self._buffer_bytes and self._entries:
            dropped = self._entries.popleft()
            self._dropped += 1
            self._queued_bytes -= dropped.size
            if isinstance(dropped, _Ended):
                self._incomplete.discard(dropped.request_id)
                self._keep_at.pop(dropped.request_id, None)
            else:
                self._growing.pop(dropped.request_id, None)
                self._incomplete.add(dropped.request_id)

    async def _write_forever(self) -> None:
        away, backoff_s = False, 0.1
        while True:
            await self._wake.wait()
            await asyncio.sleep(BATCH_DELAY_S)
            try:
                due = len(self._entries)  # what comes meanwhile is gathered again
                while due > 0 and self._entries:
                    due -= await self._write_batch()
                if not self._entries:
                    self._wake.clear()
            except (RedisError, OSError, TimeoutError) as exc:
                self._failures += 1
                if not away:
                    logger.warning("journal: Redis is away, requests go on without it: %s", exc)
                away = True
                self._keep_at.clear()  # a Redis that was started anew knows of no time to live
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                continue
            if away:
                logger.info("journal: Redis is back")
            away, backoff_s = False, 0.1

    async def _write_batch(self) -> int:
        """Writes the oldest entries, and answers how many.

        They leave the queue only when Redis has confirmed them; all are idempotent.
        """
        batch = [self._entries[index] for index in range(min(BATCH_ENTRIES, len(self._entries)))]
        pipeline = self._redis.pipeline(transaction=False)
        for entry in batch:
            self._write(pipeline, entry)
        await pipeline.execute()
        for entry in batch:
            # While Redis was being waited for, an overflow may have dropped the oldest ones already.
            if self._entries and self._entries[0] is entry:
                self._entries.popleft()
                self._queued_bytes -= entry.size
                if isinstance(entry, _Ended):
                    self._incomplete.discard(entry.request_id)
        return len(batch)

    def _write(self, pipeline: Pipeline, entry: _Entry) -> None:
        """Adds an entry's commands."""
        key = self._prefix + entry.request_id
        tokens_key = key + ":tokens"
        if isinstance(entry, _Started):
            fields = {"prompt": entry.prompt, "parameters": entry.parameters, "arrival": repr(entry.arrival)}
            pipeline.hset(key, mapping={**fields, "state": "running"})
            pipeline.expire(key, self._ttl_s)
            return
        now = time.monotonic()
        if isinstance(entry, _Tokens):
            self._growing.pop(entry.request_id, None)  # what comes from now on is not in this batch
            pipeline.setrange(tokens_key, ID_BYTES * entry.first, _pack(entry.ids))
            if now < self._keep_at.get(entry.request_id, 0.0):
                return
            self._keep_at[entry.request_id] = now + _KEEP_INTERVAL * self._ttl_s
        else:
            pipeline.hset(key, "state", "incomplete" if entry.request_id in self._incomplete else entry.state)
            self._keep_at.pop(entry.request_id, None)
        pipeline.expire(key, self._ttl_s)
        pipeline.expire(tokens_key, self._ttl_s)


def _pack(token_ids: Sequence[int]) -> bytes:
    """uint32 little-endian."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
