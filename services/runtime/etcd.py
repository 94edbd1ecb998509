"""A thin asyncio client of etcd's v3 API: keys, transactions, leases, watches, over several endpoints.

Every call has a deadline, and a call that cannot be made or is not answered in time raises ``UnavailableError``. What
that says differs: a *read* is tried on every endpoint, so no endpoint answered. A *write* is sent once, to the first
endpoint that has a connection, and **a write that timed out may still have been applied**, now or later. Callers
therefore write by compare-and-swap on a revision they have read, so that a late write finds its condition broken, and
read again before they conclude anything.

Endpoints are ``host:port``. The endpoint that answered last is used until it fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from google.protobuf.message import Message
from grpc import StatusCode, aio

from infinitellm.internal.etcd.v1 import etcd_pb2 as pb
from services.core.errors import ConfigError, UnavailableError
from services.runtime import etcd_watch
from services.runtime.etcd_types import KeyValue, RangeResult, key_value, prefix_end
from services.runtime.tls import TlsConfig, Version

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 3.0
# How long a write waits for a connection before it tries the next endpoint.
CONNECT_TIMEOUT_S = 1.0

# etcd's default is to hang up on clients that ping more often than every 5 s, or without a call in flight.
_OPTIONS = (
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)

ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds if the key's create or mod revision is ``revision``; 0 holds if there is no such key."""

    key: str
    target: Literal["create", "mod"]
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Sets a key; with a lease, the key goes when the lease does."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletes one key."""

    key: str


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """Whether all conditions held, and the store's revision afterwards."""

    succeeded: bool
    revision: int


class EtcdClient:
    """One process's connections to etcd. Belongs to one event loop; connects at the first call."""

    def __init__(
        self, endpoints: Sequence[str], tls: TlsConfig | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        if not endpoints:
            raise ConfigError("etcd: at least one endpoint (host:port) is needed")
        for endpoint in endpoints:
            if "://" in endpoint:
                raise ConfigError(f"etcd: endpoint {endpoint!r} must be host:port without a scheme")
        self._endpoints = tuple(endpoints)
        self._tls = tls
        self._timeout_s = timeout_s
        self._channels: dict[int, aio.Channel] = {}
        self._shown: dict[int, Version | None] = {}  # the certificates that each channel shows
        self._retired: list[aio.Channel] = []  # of older certificates; calls may still be under way on them
        self._current = 0

    async def close(self) -> None:
        """Closes all connections; calls in flight end with UnavailableError."""
        channels, self._channels, self._retired = [*self._channels.values(), *self._retired], {}, []
        for channel in channels:
            await channel.close()

    async def get(self, key: str, timeout_s: float | None = None) -> KeyValue | None:
        """The key's entry, or None if there is none."""
        response = await self._read("KV/Range", pb.RangeRequest(key=key.encode()), pb.RangeResponse, timeout_s)
        return key_value(response.kvs[0]) if response.kvs else None

    async def range(self, prefix: str, timeout_s: float | None = None) -> RangeResult:
        """All entries whose key starts with ``prefix``."""
        request = pb.RangeRequest(key=prefix.encode(), range_end=prefix_end(prefix))
        response = await self._read("KV/Range", request, pb.RangeResponse, timeout_s)
        return RangeResult(tuple(key_value(kv) for kv in response.kvs), response.header.revision)

    async def put(self, key: str, value: bytes, lease_id: int = 0, timeout_s: float | None = None) -> int:
        """Sets a key, whatever it was before; answers the store's revision. A write: see the module's docstring."""
        request = pb.PutRequest(key=key.encode(), value=value, lease=lease_id)
        return (await self._write("KV/Put", request, pb.PutResponse, timeout_s)).header.revision

    async def delete(self, key: str, timeout_s: float | None = None) -> bool:
        """Deletes a key; answers whether it was there. A write."""
        request = pb.DeleteRangeRequest(key=key.encode())
        return (await self._write("KV/DeleteRange", request, pb.DeleteRangeResponse, timeout_s)).deleted > 0

    async def transaction(
        self, conditions: Sequence[Condition], success: Sequence[Put | Delete], timeout_s: float | None = None
    ) -> TransactionResult:
        """Does everything in ``success`` if all conditions hold, and nothing otherwise; atomic. A write."""
        request = pb.TxnRequest(
            compare=[_compare(condition) for condition in conditions], success=[_request_op(op) for op in success]
        )
        response = await self._write("KV/Txn", request, pb.TxnResponse, timeout_s)
        return TransactionResult(response.succeeded, response.header.revision)

    async def lease_grant(self, ttl_s: int, timeout_s: float | None = None) -> int:
        """A new lease. One that was granted without our hearing of it expires by itself."""
        response = await self._write(
            "Lease/LeaseGrant", pb.LeaseGrantRequest(ttl=ttl_s), pb.LeaseGrantResponse, timeout_s
        )
        if response.error:
            raise UnavailableError(f"etcd: lease not granted: {response.error}")
        return response.id

    async def lease_keepalive(self, lease_id: int, timeout_s: float | None = None) -> int:
        """Renews a lease; answers the seconds left. 0 or less: the lease is gone, and all its keys with it."""
        method = "Lease/LeaseKeepAlive"
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        index, channel = await self._connected(deadline)
        call = channel.stream_stream(
            f"/etcdserverpb.{method}",
            request_serializer=pb.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=pb.LeaseKeepAliveResponse.FromString,
        )(timeout=max(0.0, deadline - time.monotonic()), metadata=etcd_watch.REQUIRE_LEADER)
        try:
            await call.write(pb.LeaseKeepAliveRequest(id=lease_id))
            response = await call.read()
            if not isinstance(response, pb.LeaseKeepAliveResponse):
                raise self._failed(index, method, "the stream ended without an answer")
            return response.ttl
        except (aio.AioRpcError, asyncio.InvalidStateError) as exc:
            raise self._failed(index, method, _reason(exc)) from exc
        finally:
            call.cancel()

    async def lease_revoke(self, lease_id: int, timeout_s: float | None = None) -> None:
        """Ends a lease and deletes its keys; one that is gone already is no error. A write."""
        await self._write("Lease/LeaseRevoke", pb.LeaseRevokeRequest(id=lease_id), pb.LeaseRevokeResponse, timeout_s)

    def watch(self, prefix: str) -> AsyncIterator[Mapping[str, KeyValue]]:
        """All entries under ``prefix``: once at the start, then again after every change, for ever.

        While etcd is away nothing is yielded; what changed meanwhile is yielded as one change when it is back.
        """
        return etcd_watch.watch(self, prefix)

    async def watch_channel(self, timeout_s: float) -> tuple[int, aio.Channel]:
        """A connected channel and its number, for a watch stream; ``endpoint_failed`` gives it up."""
        return await self._connected(time.monotonic() + timeout_s)

    def endpoint_failed(self, index: int) -> None:
        """Endpoint ``index`` did not answer: later calls start with the next one."""
        if self._current == index:
            self._current = (index + 1) % len(self._endpoints)

    async def _read(
        self, method: str, request: Message, response_type: type[ResponseT], timeout_s: float | None
    ) -> ResponseT:
        """Tries as many endpoints as there are, each with its share of the time."""
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        left = len(self._endpoints)
        while True:
            index, channel = await self._connected(deadline)
            share = max(0.0, deadline - time.monotonic()) / left
            try:
                return await self._call(index, channel, method, request, response_type, share)
            except UnavailableError:
                left -= 1
                if left == 0:
                    raise

    async def _write(
        self, method: str, request: Message, response_type: type[ResponseT], timeout_s: float | None
    ) -> ResponseT:
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        index, channel = await self._connected(deadline)
        remaining = max(0.0, deadline - time.monotonic())
        return await self._call(index, channel, method, request, response_type, remaining)

    async def _call(
        self,
        index: int,
        channel: aio.Channel,
        method: str,
        request: Message,
        response_type: type[ResponseT],
        timeout_s: float,
    ) -> ResponseT:
        call = channel.unary_unary(
            f"/etcdserverpb.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        try:
            response = await call(request, timeout=timeout_s)
        except aio.AioRpcError as exc:
            if exc.code() == StatusCode.NOT_FOUND and method == "Lease/LeaseRevoke":
                return response_type()
            raise self._failed(index, method, _reason(exc)) from exc
        if not isinstance(response, response_type):
            raise TypeError(f"{method} answered {type(response)}")
        return response

    async def _connected(self, deadline: float) -> tuple[int, aio.Channel]:
        """The first endpoint, from the current one on, that has or gets a connection. Nothing has been sent yet."""
        while (remaining := deadline - time.monotonic()) > 0:
            index = self._current
            try:
                # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the result.
                async with asyncio.timeout(min(remaining, CONNECT_TIMEOUT_S)):
                    await self._channel(index).channel_ready()
                return index, self._channel(index)
            except TimeoutError:
                self.endpoint_failed(index)
            except aio.UsageError as exc:
                raise UnavailableError("etcd: the client is closed") from exc
        raise UnavailableError(f"etcd: no connection to {', '.join(self._endpoints)}; is etcd running there?")

    def _channel(self, index: int) -> aio.Channel:
        channel = self._channels.get(index)
        version = None if self._tls is None else self._tls.version()
        if channel is not None and version is not None and version != self._shown[index]:
            self._retired.append(self._channels.pop(index))
            channel = None
        if channel is None:
            self._shown[index] = version
            endpoint = self._endpoints[index]
            if self._tls is None:
                channel = aio.insecure_channel(endpoint, options=_OPTIONS)
            else:
                channel = aio.secure_channel(endpoint, self._tls.channel_credentials(), options=_OPTIONS)
            self._channels[index] = channel
        return channel

    def _failed(self, index: int, method: str, reason: str) -> UnavailableError:
        self.endpoint_failed(index)
        return UnavailableError(f"etcd: {method} at {self._endpoints[index]}: {reason}")


def _reason(exc: Exception) -> str:
    return f"{exc.code().name}: {exc.details()}" if isinstance(exc, aio.AioRpcError) else str(exc)


def _compare(condition: Condition) -> pb.Compare:
    key = condition.key.encode()
    if condition.target == "create":
        return pb.Compare(key=key, target=pb.Compare.TARGET_CREATE, create_revision=condition.revision)
    return pb.Compare(key=key, target=pb.Compare.TARGET_MOD, mod_revision=condition.revision)


def _request_op(op: Put | Delete) -> pb.RequestOp:
    if isinstance(op, Put):
        return pb.RequestOp(request_put=pb.PutRequest(key=op.key.encode(), value=op.value, lease=op.lease_id))
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=op.key.encode()))
