"""The request journal in Redis: what was asked, and what has been answered so far.

    infinite-llm:{cluster}:request:{id}         hash    prompt (uint32 little-endian), parameters (JSON), key_name,
                                                        owner, takeovers, state
    infinite-llm:{cluster}:request:{id}:tokens  string  generated ids (uint32 little-endian): the answer's beginning

It is written behind the requests: nothing waits for it, and a Redis that is away or hangs never changes a token. What
was asked is written as soon as it is known; tokens are gathered for ``BATCH_DELAY_S``, so the journal is about that far
behind. While Redis is away entries queue up; beyond ``buffer_bytes`` the oldest are dropped. A request that lost any is
not continued in the journal and marked "incomplete". It is read when a client resumes a stream, and the request then
belongs to whoever read it (journal_record.py): whoever had it before learns that with its next write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import redis.asyncio
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.core.errors import JournalUnavailableError, RequestNotFoundError
from services.gateway.journal_record import (
    TAKE_OVER,
    TAKEN_OVER,
    WRITE_ENDED,
    WRITE_STARTED,
    WRITE_TOKENS,
    JournalRecord,
    fields_of,
    record_of,
)
from services.gateway.position import pack_ids
from services.gateway.requests import GenerationRequest, Tenure

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
    """Since the start: failed reads and writes (these are tried again), entries dropped; and what waits now."""

    failures: int = 0
    dropped_entries: int = 0
    queued_bytes: int = 0


class Journal(Protocol):
    """Takes note of requests. No method but ``take_over`` waits or fails."""

    @property
    def stats(self) -> JournalStats: ...

    @property
    def resumable(self) -> bool:
        """Whether requests can be taken over at all."""

    def started(self, request: GenerationRequest, on_taken_over: Callable[[], None]) -> None:
        """A request begins here, or goes on here. ``on_taken_over`` is called at most once, before ``ended``."""

    def tokens(self, tenure: Tenure, first: int, token_ids: Sequence[int]) -> None:
        """Tokens number ``first``, ``first + 1``, ... of the answer."""

    def ended(self, tenure: Tenure, state: str) -> None:
        """``state``: "stop", "length", "aborted" or an error's reason."""

    async def take_over(
        self, request_id: str, key_name: str, otherwise: GenerationRequest | None = None
    ) -> JournalRecord:
        """The request belongs to this gateway from now on, whoever had it.

        Args:
            otherwise: the request as it begins, where the journal does not know it.
        Raises: RequestNotFoundError, also for one of another API key; JournalUnavailableError.
        """

    async def close(self) -> None:
        """Writes what it can in a moment, then lets go."""


class NoJournal:
    """Keeps nothing."""

    stats = JournalStats()
    resumable = False

    def started(self, request: GenerationRequest, on_taken_over: Callable[[], None]) -> None:
        return

    def tokens(self, tenure: Tenure, first: int, token_ids: Sequence[int]) -> None:
        return

    def ended(self, tenure: Tenure, state: str) -> None:
        return

    async def take_over(
        self, request_id: str, key_name: str, otherwise: GenerationRequest | None = None
    ) -> JournalRecord:
        raise RequestNotFoundError("this gateway keeps no journal, so nothing can be resumed; send the request again")

    async def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class _Started:
    tenure: Tenure
    fields: dict[str, str | bytes]

    @property
    def size(self) -> int:
        return ENTRY_BYTES + sum(map(len, self.fields.values()))


@dataclass(slots=True)
class _Tokens:
    """Grows until it is written."""

    tenure: Tenure
    # Index of the first: writing the same entry twice changes nothing.
    first: int
    ids: list[int]

    @property
    def size(self) -> int:
        return ENTRY_BYTES + ID_BYTES * len(self.ids)


@dataclass(frozen=True, slots=True)
class _Ended:
    tenure: Tenure
    state: str

    @property
    def size(self) -> int:
        return ENTRY_BYTES


_Entry = _Started | _Tokens | _Ended


class RedisJournal:
    """Writes batches of entries from a task of its own; a failed batch is written again when Redis is back."""

    resumable = True

    def __init__(self, url: str, cluster: str, owner: str, ttl_s: int, buffer_bytes: int) -> None:
        """
        Args:
            owner: this gateway's id.
            ttl_s: how long a record is kept after the last write.
        """
        self._redis = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._prefix = f"infinite-llm:{cluster}:request:"
        self._owner = owner
        self._ttl_s = ttl_s
        self._buffer_bytes = buffer_bytes
        self._entries: deque[_Entry] = deque()
        self._queued_bytes = 0
        self._failures = self._dropped = 0
        # Entries of the queue that take further tokens, by request.
        self._growing: dict[Tenure, _Tokens] = {}
        # Requests that lost an entry; each until its end is written or lost as well.
        self._incomplete: set[Tenure] = set()
        # When the keys of running requests are to be given their time to live anew, on the monotonic clock.
        self._keep_at: dict[Tenure, float] = {}
        # Whom to tell that a running request has been taken over.
        self._owners: dict[Tenure, Callable[[], None]] = {}
        self._wake = asyncio.Event()
        # A request has begun: it is written at once, long before it has a token that could be lost.
        self._begun = asyncio.Event()
        self._task = asyncio.create_task(self._write_forever(), name="journal")

    @property
    def stats(self) -> JournalStats:
        return JournalStats(self._failures, self._dropped, self._queued_bytes)

    def started(self, request: GenerationRequest, on_taken_over: Callable[[], None]) -> None:
        self._owners[request.tenure] = on_taken_over
        if not request.takeovers:  # otherwise it is there
            self._put(_Started(request.tenure, fields_of(request, self._owner)))
            self._begun.set()

    def tokens(self, tenure: Tenure, first: int, token_ids: Sequence[int]) -> None:
        entry = self._growing.get(tenure)
        if entry is None:
            entry = _Tokens(tenure, first, list(token_ids))
            if self._put(entry):
                self._growing[tenure] = entry
            return
        entry.ids.extend(token_ids)
        self._queued_bytes += ID_BYTES * len(token_ids)
        self._drop_overflow()

    def ended(self, tenure: Tenure, state: str) -> None:
        self._owners.pop(tenure, None)
        self._growing.pop(tenure, None)
        self._put(_Ended(tenure, state))

    async def take_over(
        self, request_id: str, key_name: str, otherwise: GenerationRequest | None = None
    ) -> JournalRecord:
        key = self._prefix + request_id
        begins = {} if otherwise is None else fields_of(otherwise, self._owner)
        arguments = [self._owner, self._ttl_s, key_name, *(part for field in begins.items() for part in field)]
        try:
            answer = await self._redis.eval(TAKE_OVER, 2, key, key + ":tokens", *arguments)
        except (RedisError, OSError, TimeoutError) as exc:
            self._failures += 1
            logger.warning("journal: not read, the stream cannot be resumed: %s", exc, extra={"request_id": request_id})
            raise JournalUnavailableError(
                "the request journal cannot be read for the moment; try again, or send the request again"
            ) from exc
        if answer is None:
            raise RequestNotFoundError(
                f"the journal does not know a request {request_id!r}: it keeps requests for {self._ttl_s} s; "
                "send the request again"
            )
        fields, tokens = answer
        return record_of(request_id, dict(zip(fields[::2], fields[1::2], strict=True)), tokens)

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
        if entry.tenure in self._incomplete and not isinstance(entry, _Ended):
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
                self._incomplete.discard(dropped.tenure)
                self._keep_at.pop(dropped.tenure, None)
            else:
                self._growing.pop(dropped.tenure, None)
                self._incomplete.add(dropped.tenure)

    async def _write_forever(self) -> None:
        away, backoff_s = False, 0.1
        while True:
            await self._wake.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BATCH_DELAY_S):
                    await self._begun.wait()
            self._begun.clear()
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
        for entry, answer in zip(batch, await pipeline.execute(), strict=True):
            if answer == TAKEN_OVER and (on_taken_over := self._owners.pop(entry.tenure, None)) is not None:
                on_taken_over()
            # While Redis was being waited for, an overflow may have dropped the oldest ones already.
            if self._entries and self._entries[0] is entry:
                self._entries.popleft()
                self._queued_bytes -= entry.size
                if isinstance(entry, _Ended):
                    self._incomplete.discard(entry.tenure)
        return len(batch)

    def _write(self, pipeline: Pipeline, entry: _Entry) -> None:
        """Adds an entry's one command."""
        tenure, ttl_s = entry.tenure, self._ttl_s
        arguments: list[str | bytes | int]
        if isinstance(entry, _Started):
            script, arguments = WRITE_STARTED, [part for field in entry.fields.items() for part in field]
        elif isinstance(entry, _Tokens):
            self._growing.pop(tenure, None)  # what comes from now on is not in this batch
            script, arguments = WRITE_TOKENS, [ID_BYTES * entry.first, pack_ids(entry.ids)]
            now = time.monotonic()
            if now < self._keep_at.get(tenure, 0.0):
                ttl_s = 0
            else:
                self._keep_at[tenure] = now + _KEEP_INTERVAL * self._ttl_s
        else:
            script, arguments = WRITE_ENDED, ["incomplete" if tenure in self._incomplete else entry.state]
            self._keep_at.pop(tenure, None)
        key = self._prefix + tenure.request_id
        pipeline.eval(script, 2, key, key + ":tokens", tenure.takeovers, ttl_s, *arguments)
