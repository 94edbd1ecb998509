"""KvDaemonService: the control interface, protobuf to ledger and back.

Everything runs on the event loop and nothing waits but ``Session``, which lasts as long as the session it opened.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grpc import aio

from infinitellm.internal.v1 import kvdaemon_pb2 as pb
from infinitellm.internal.v1 import pool_pb2
from infinitellm.internal.v1.kvdaemon_pb2_grpc import KvDaemonServiceServicer
from services.core.blocks import BLOCK_KEY_BYTES, BlockHandle, PoolGeometry
from services.core.errors import InvalidRequestError, SessionRevokedError
from services.dataplane.negotiation import Offers
from services.kvdaemon.sessions import Sessions, SharedLedger
from services.rmanager.holder import Session
from services.rmanager.pool_messages import geometry_to_proto, stats_to_proto

_log = logging.getLogger(__name__)
_Context = aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """What every session is told: where to go, and how often to ping. See ``SessionOpened`` in kvdaemon.proto."""

    offers: Offers
    pool_socket: str
    ping_interval_s: float
    session_timeout_s: float


class KvDaemonServicer(KvDaemonServiceServicer):
    """Serves instances."""

    def __init__(self, shared: SharedLedger, sessions: Sessions, terms: SessionTerms) -> None:
        self._shared = shared
        self._sessions = sessions
        self._terms = terms

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: _Context
    ) -> AsyncIterator[pb.SessionResponse]:
        request = await self._next(request_iterator)
        if request is None or request.WhichOneof("request") != "open":
            raise InvalidRequestError("a Session call begins with `open`")
        open_request = request.open
        session, total_blocks = self._sessions.open(
            open_request.instance_id, open_request.epoch, _geometry(open_request.geometry), open_request.mapped
        )
        try:
            yield _opened(self._terms, session, total_blocks)
            # When this process itself was stopped for a while, its timers fire first and it cannot tell whose silence
            # it was. It ends the session then as well: the instance opens another.
            while (request := await self._next(request_iterator)) is not None:
                self._sessions.check(session.session_id)
                if request.WhichOneof("request") != "ping":
                    raise InvalidRequestError("the session is open already; what follows are pings")
                with self._shared as ledger:
                    stats = ledger.stats()
                yield pb.SessionResponse(pong=pb.Pong(stats=stats_to_proto(stats)))
        finally:
            # However the call ends: by its client, by silence, by a lost connection (gRPC cancels this generator).
            self._sessions.close(session.session_id)

    async def Reserve(self, request: pb.ReserveRequest, context: _Context) -> pb.ReserveResponse:
        with self._shared as ledger:
            handles = ledger.reserve(
                request.session_id, request.max_blocks, request.min_blocks, request.workspace, request.ttl_s
            )
        _log.debug("reserved", extra={"request_id": request.request_id, "blocks": len(handles)})
        return pb.ReserveResponse(blocks=_to_proto(handles))

    async def Attach(self, request: pb.AttachRequest, context: _Context) -> pb.AttachResponse:
        keys = _keys(request.keys)
        with self._shared as ledger:
            found = ledger.attach(request.session_id, keys)
        return pb.AttachResponse(found=[index for index, _ in found], blocks=_to_proto(handle for _, handle in found))

    async def Seal(self, request: pb.SealRequest, context: _Context) -> pb.SealResponse:
        handles, keys = _handles(request.blocks), _keys(request.keys)
        with self._shared as ledger:
            sealed = ledger.seal(request.session_id, handles, keys)
        return pb.SealResponse(blocks=_to_proto(sealed))

    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseResponse:
        handles = _handles(request.blocks)
        with self._shared as ledger:
            ledger.release(request.session_id, handles)
        return pb.ReleaseResponse()

    async def GetPool(self, request: pb.GetPoolRequest, context: _Context) -> pb.GetPoolResponse:
        with self._shared as ledger:
            stats, geometry = ledger.stats(), ledger.geometry
            sessions, violations = ledger.open_sessions, ledger.check_integrity()
        return pb.GetPoolResponse(
            stats=stats_to_proto(stats),
            geometry=None if geometry is None else geometry_to_proto(geometry),
            sessions=sessions,
            violations=violations,
        )

    async def _next(self, requests: AsyncIterator[pb.SessionRequest]) -> pb.SessionRequest | None:
        """The client's next request; None when it has ended the call.

        Raises:
            SessionRevokedError: it is silent for too long.
        """
        try:
            async with asyncio.timeout(self._terms.session_timeout_s):
                return await anext(requests)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            reason = f"no message from the client for {self._terms.session_timeout_s:g} s; the session is over"
            _log.warning(reason)
            raise SessionRevokedError(reason) from None


def _opened(terms: SessionTerms, session: Session, total_blocks: int) -> pb.SessionResponse:
    return pb.SessionResponse(
        opened=pb.SessionOpened(
            session_id=session.session_id,
            total_blocks=total_blocks,
            dataplane_addresses=terms.offers.addresses,
            pool_socket=terms.pool_socket if session.mapped else "",
            ping_interval_s=terms.ping_interval_s,
            session_timeout_s=terms.session_timeout_s,
            shm_socket_identity=terms.offers.socket_identity,
        )
    )


def _geometry(message: pool_pb2.PoolGeometry) -> PoolGeometry:
    return PoolGeometry(message.layers, message.kv_heads, message.block_tokens, message.head_dim, message.dtype)


def _handles(blocks: Iterable[pool_pb2.BlockHandle]) -> list[BlockHandle]:
    return [BlockHandle(block.block, block.generation) for block in blocks]


def _to_proto(handles: Iterable[BlockHandle]) -> list[pool_pb2.BlockHandle]:
    return [pool_pb2.BlockHandle(block=handle.block, generation=handle.generation) for handle in handles]


def _keys(joined: bytes) -> Sequence[bytes]:
    if len(joined) % BLOCK_KEY_BYTES:
        raise InvalidRequestError(f"block keys have {BLOCK_KEY_BYTES} bytes each; got {len(joined)} bytes of them")
    return [joined[start : start + BLOCK_KEY_BYTES] for start in range(0, len(joined), BLOCK_KEY_BYTES)]
