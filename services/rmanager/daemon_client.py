"""A session with one KV daemon, from the side of an instance.

Runs in the asyncio thread. ``open`` answers once the daemon has granted the session; from then on a background task
keeps it alive, and ``on_lost`` is called exactly once when it ends for whatever reason: the daemon died, was stopped,
or revoked it. Calls are executed in the order in which they were made. None of them is retried: a call that failed
leaves it open whether the daemon executed it, so the session is given up as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from infinitellm.internal.v1 import kvdaemon_pb2 as pb
from infinitellm.internal.v1 import kvdaemon_pb2_grpc as rpc
from infinitellm.internal.v1 import pool_pb2
from services.core.blocks import BLOCK_KEY_BYTES, BlockHandle, PoolGeometry
from services.core.errors import InfiniteLLMError, PeerLostError, PoolExhaustedError
from services.core.placement import PoolStats
from services.dataplane.negotiation import Offers
from services.rmanager.pool_messages import geometry_to_proto, stats_from_proto
from services.runtime.cancelling import cancel
from services.runtime.grpc_channel import call_was_given_up, error_from_rpc, make_channel
from services.runtime.tls import MutualTls
from services.runtime.tracing import outgoing_metadata

_log = logging.getLogger(__name__)
_Response = TypeVar("_Response")


@dataclass(frozen=True, slots=True)
class Opened:
    """What a daemon granted. See ``SessionOpened`` in kvdaemon.proto."""

    session_id: int
    total_blocks: int
    offers: Offers
    pool_socket: str
    ping_interval_s: float
    session_timeout_s: float


class DaemonSession:
    """The right to hold, write and query blocks of one daemon's pool.

    Args:
        mapped: the instance will map the pool (same host).
        on_lost: called once, in the asyncio thread, with the reason.
        call_timeout_s: deadline of every unary call.
        tls: the instance's own identity.
    """

    def __init__(
        self,
        kvdaemon_id: str,
        address: str,
        *,
        instance_id: str,
        epoch: int,
        geometry: PoolGeometry,
        mapped: bool,
        on_lost: Callable[[str, str], None],
        call_timeout_s: float = 10.0,
        tls: MutualTls | None = None,
    ) -> None:
        self.kvdaemon_id = kvdaemon_id
        self._open_request = pb.OpenSession(
            instance_id=instance_id, epoch=epoch, geometry=geometry_to_proto(geometry), mapped=mapped
        )
        self._on_lost = on_lost
        self._call_timeout_s = call_timeout_s
        self._channel = make_channel(address, "kvdaemon", tls)
        self._stub: rpc.KvDaemonServiceAsyncStub = rpc.KvDaemonServiceStub(self._channel)
        self._in_order = asyncio.Lock()  # asyncio locks are granted in the order of asking
        self._task: asyncio.Task[None] | None = None
        self._lost = False
        self.opened: Opened
        self.pool: PoolStats | None = None  # as the latest pong said

    async def open(self) -> Opened:
        """Asks for the session.

        Raises:
            InfiniteLLMError: the daemon refused it or did not answer in time.
        """
        granted: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(granted), name=f"session {self.kvdaemon_id}")
        try:
            async with asyncio.timeout(self._call_timeout_s):
                self.opened = await granted
        except TimeoutError:
            await self.close()
            raise PeerLostError(
                f"kvdaemon {self.kvdaemon_id} did not grant a session within {self._call_timeout_s:g} s"
            ) from None
        except InfiniteLLMError:
            await self.close()
            raise
        return self.opened

    @property
    def alive(self) -> bool:
        return not self._lost

    async def reserve(
        self, max_blocks: int, min_blocks: int, *, request_id: str = "", workspace: bool = False, ttl_s: float = 0.0
    ) -> list[BlockHandle]:
        """Blocks promised to this session; none where fewer than ``min_blocks`` are free.

        Args:
            ttl_s: offers them, to be filled by other daemons: what is not used for so long is free again.
        """
        request = pb.ReserveRequest(
            session_id=self.opened.session_id,
            max_blocks=max_blocks,
            min_blocks=min_blocks,
            request_id=request_id,
            workspace=workspace,
            ttl_s=ttl_s,
        )
        try:
            metadata = outgoing_metadata()
            response = await self._call(
                lambda: self._stub.Reserve(request, timeout=self._call_timeout_s, metadata=metadata)
            )
        except PoolExhaustedError:
            return []
        return [_handle(block) for block in response.blocks]

    async def attach(self, keys: Sequence[bytes]) -> dict[int, BlockHandle]:
        """One hold on each sealed block found, by index of its key."""
        request = pb.AttachRequest(session_id=self.opened.session_id, keys=b"".join(keys))
        response = await self._call(lambda: self._stub.Attach(request, timeout=self._call_timeout_s))
        return {index: _handle(block) for index, block in zip(response.found, response.blocks, strict=True)}

    async def seal(self, blocks: Sequence[tuple[BlockHandle, bytes]]) -> list[BlockHandle]:
        """Seals blocks that are full; answers for each the block that holds that content now."""
        assert all(len(key) == BLOCK_KEY_BYTES for _, key in blocks)
        request = pb.SealRequest(
            session_id=self.opened.session_id,
            blocks=[_handle_to_proto(handle) for handle, _ in blocks],
            keys=b"".join(key for _, key in blocks),
        )
        response = await self._call(lambda: self._stub.Seal(request, timeout=self._call_timeout_s))
        return [_handle(block) for block in response.blocks]

    async def release(self, handles: Sequence[BlockHandle]) -> None:
        """Gives up one hold on each block."""
        request = pb.ReleaseRequest(
            session_id=self.opened.session_id, blocks=[_handle_to_proto(handle) for handle in handles]
        )
        await self._call(lambda: self._stub.Release(request, timeout=self._call_timeout_s))

    async def close(self) -> None:
        """Ends the session; the daemon drops its holds. Idempotent; ``on_lost`` is not called."""
        self._lost = True
        if self._task is not None:
            await cancel([self._task])
        await self._channel.close()

    async def _call(self, start: Callable[[], Awaitable[_Response]]) -> _Response:
        async with self._in_order:
            if self._lost:
                raise PeerLostError(f"the session with kvdaemon {self.kvdaemon_id} is over")
            try:
                return await start()
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error)
                if not isinstance(failure, PoolExhaustedError):
                    self._end(f"{failure.reason}: {failure}")
                raise failure from None
            except asyncio.CancelledError:
                if call_was_given_up():  # ``close`` cancels whatever is under way
                    raise PeerLostError(f"the session with kvdaemon {self.kvdaemon_id} was closed") from None
                raise

    def _end(self, reason: str) -> None:
        if not self._lost:
            self._lost = True
            _log.warning("session with kvdaemon ended", extra={"kvdaemon": self.kvdaemon_id, "why": reason})
            if self._task is not None:
                self._task.cancel()
            self._on_lost(self.kvdaemon_id, reason)

    async def _keep(self, granted: asyncio.Future[Opened]) -> None:
        """Holds the Session call: one ping per interval, and no longer silence than the timeout."""
        interval = 1.0
        stop = asyncio.Event()

        async def requests() -> AsyncIterator[pb.SessionRequest]:
            yield pb.SessionRequest(open=self._open_request)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval):
                        await stop.wait()
                yield pb.SessionRequest(ping=pb.Ping())

        call = self._stub.Session(requests())
        reason = "the daemon ended it"
        timeout = self._call_timeout_s
        try:
            while True:
                async with asyncio.timeout(timeout):
                    response = await call.read()
                if not isinstance(response, pb.SessionResponse):  # end of the call
                    break
                if response.WhichOneof("response") == "opened":
                    opened = _opened(response.opened)
                    interval, timeout = opened.ping_interval_s, opened.session_timeout_s
                    if not granted.done():
                        granted.set_result(opened)
                else:
                    self.pool = stats_from_proto(response.pong.stats)
        except TimeoutError:
            reason = f"silent for {timeout:g} s"
        except grpc.aio.AioRpcError as error:
            failure = error_from_rpc(error)
            reason = f"{failure.reason}: {failure}"
            if not granted.done():
                granted.set_exception(failure)
        finally:
            stop.set()
            call.cancel()
        if not granted.done():
            granted.set_exception(PeerLostError(f"kvdaemon {self.kvdaemon_id}: {reason}"))
        else:
            self._end(reason)


def _opened(message: pb.SessionOpened) -> Opened:
    return Opened(
        message.session_id,
        message.total_blocks,
        Offers(tuple(message.dataplane_addresses), message.shm_socket_identity),
        message.pool_socket,
        message.ping_interval_s,
        message.session_timeout_s,
    )


def _handle(block: pool_pb2.BlockHandle) -> BlockHandle:
    return BlockHandle(block.block, block.generation)


def _handle_to_proto(handle: BlockHandle) -> pool_pb2.BlockHandle:
    return pool_pb2.BlockHandle(block=handle.block, generation=handle.generation)
