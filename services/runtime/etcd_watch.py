"""Watching a prefix of etcd's store without losing a change.

    list ──> revision r ──> stream from r + 1 ──> changes ... ──> stream ends ──> stream from last revision + 1
      ^                                                                                  │
      └── the revision is compacted away, or the store is older than what we have seen ──┘

A stream that breaks loses nothing: the next one starts after the last revision seen. Only if etcd has thrown that
history away (compaction), or has itself been started anew with an empty store, everything is listed again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from grpc import aio

from infinitellm.internal.etcd.v1 import etcd_pb2 as pb
from services.core.errors import UnavailableError
from services.runtime.etcd_types import KeyValue, RangeResult, key_value, prefix_end

log = logging.getLogger(__name__)

# etcd then ends streams of a member that has lost the rest of its cluster, instead of letting them go silent.
REQUIRE_LEADER = (("hasleader", "true"),)

OPEN_TIMEOUT_S = 3.0
RETRY_S = 0.5


class WatchedStore(Protocol):
    """What a watch needs of the client."""

    async def range(self, prefix: str, timeout_s: float | None = None) -> RangeResult: ...
    async def watch_channel(self, timeout_s: float) -> tuple[int, aio.Channel]: ...
    def endpoint_failed(self, index: int) -> None: ...


class _HistoryLostError(Exception):
    """The store no longer has the changes since the last revision seen."""


async def watch(store: WatchedStore, prefix: str) -> AsyncIterator[Mapping[str, KeyValue]]:
    """See ``EtcdClient.watch``."""
    entries: dict[str, KeyValue] = {}
    revision = 0  # everything up to here is in `entries`; 0: nothing is known
    while True:
        try:
            if revision == 0:
                listed = await store.range(prefix)
                entries, revision = {entry.key: entry for entry in listed.entries}, listed.revision
                yield dict(entries)
            async for response in _stream(store, prefix, revision + 1):
                for event in response.events:
                    if event.type == pb.Event.EVENT_TYPE_DELETE:
                        entries.pop(event.kv.key.decode(), None)
                    else:
                        entries[event.kv.key.decode()] = key_value(event.kv)
                    revision = max(revision, event.kv.mod_revision)
                if response.events:
                    yield dict(entries)
        except _HistoryLostError as exc:
            log.warning("watch lists everything again", extra={"prefix": prefix, "reason": str(exc)})
            revision = 0
        except UnavailableError as exc:
            log.info("watch interrupted, trying again", extra={"prefix": prefix, "reason": str(exc)})
            await asyncio.sleep(RETRY_S)


async def _stream(store: WatchedStore, prefix: str, start_revision: int) -> AsyncIterator[pb.WatchResponse]:
    """One watch stream; ends by raising UnavailableError or _HistoryLostError."""
    index, channel = await store.watch_channel(OPEN_TIMEOUT_S)
    call = channel.stream_stream(
        "/etcdserverpb.Watch/Watch",
        request_serializer=pb.WatchRequest.SerializeToString,
        response_deserializer=pb.WatchResponse.FromString,
    )(metadata=REQUIRE_LEADER)
    create = pb.WatchCreateRequest(key=prefix.encode(), range_end=prefix_end(prefix), start_revision=start_revision)
    try:
        # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the result.
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            await call.write(pb.WatchRequest(create_request=create))
            created = await call.read()
        if isinstance(created, pb.WatchResponse) and created.header.revision < start_revision - 1:
            raise _HistoryLostError(
                f"the store is at revision {created.header.revision}, we were at {start_revision - 1}"
            )
        response = created
        while isinstance(response, pb.WatchResponse):
            if response.compact_revision:
                raise _HistoryLostError(f"compacted up to revision {response.compact_revision}")
            if response.canceled:
                raise UnavailableError(f"etcd canceled the watch: {response.cancel_reason}")
            yield response
            # No deadline: silence is what a watch mostly is. The channel's pings notice an etcd that hangs.
            response = await call.read()
        raise UnavailableError("etcd ended the watch stream")
    except (aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as exc:
        store.endpoint_failed(index)
        raise UnavailableError(f"watch stream: {exc!r}") from exc
    finally:
        call.cancel()
