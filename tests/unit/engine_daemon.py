"""The daemons of ``engine_rig``: pool, ledger and worker thread each, over the loopback transport."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass

from services.core.blocks import HeadRange, PoolGeometry
from services.dataplane.device import Device
from services.dataplane.kv_pool import Pool
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.wire import Header
from services.kvdaemon.pool_view import PoolView
from services.kvdaemon.segments import StepPlan
from services.kvdaemon.sessions import SharedLedger
from services.kvdaemon.worker import Worker
from services.rmanager.ledger import Ledger


@dataclass(frozen=True)
class Query:
    """One QUERY that a daemon answered.

    Attributes:
        rows: of the longest segment; 1 in decode.
        distance: from the first row of any segment back to the last key of its blocks there, at least.
        positions: of the first token of each block, of all segments.
    """

    step: int
    layer: int
    window: int
    rows: int
    distance: int
    positions: tuple[int, ...]


class _RecordingPoolView(PoolView):
    def __init__(self, pool: Pool, queries: list[Query], device: Device) -> None:
        super().__init__(pool, device.load_kernels(1), device)
        self._queries = queries

    def attend(self, query: Header, payload: memoryview, plan: StepPlan, heads: HeadRange, max_answer_bytes: int):
        attention = plan.attention
        last = attention.block_pos[attention.block_start[1:].long() - 1] + self._geometry.block_tokens - 1
        distance = int((attention.query_pos - last).min())
        self._queries.append(
            Query(
                query.step,
                query.layer,
                query.window,
                attention.max_query_len,
                distance,
                tuple(attention.block_pos.tolist()),
            )
        )
        return super().attend(query, payload, plan, heads, max_answer_bytes)


class Daemon:
    """A KV daemon's pool, ledger and worker thread."""

    session_ids = itertools.count(1)

    def __init__(
        self, hub: LoopbackHub, name: str, geometry: PoolGeometry, blocks: int, mapped: bool, device: Device
    ) -> None:
        self.name = name
        self.pool = device.make_pool(blocks * geometry.block_bytes)
        self.later_s = 0.0  # how far the ledger's clock has been put forward
        self.shared = SharedLedger(
            Ledger(self.pool.pool_bytes, lambda: next(Daemon.session_ids), lambda: time.monotonic() + self.later_s)
        )
        self._geometry, self._mapped = geometry, mapped
        self._epoch = 0
        self.session_id = self.open_session()
        self._transport = LoopbackTransport(hub, name)
        self.address = self._transport.listen()
        self.queries: list[Query] = []
        self.worker = Worker(self._transport, self.shared, _RecordingPoolView(self.pool, self.queries, device))
        self._thread = threading.Thread(target=self.worker.run, daemon=True)
        self._thread.start()

    def open_session(self) -> int:
        self._epoch += 1
        with self.shared as ledger:
            self.session_id = ledger.open_session("i", self._epoch, self._geometry, self._mapped).session_id
        return self.session_id

    def revoke(self) -> None:
        """Ends the session, as after a silence."""
        with self.shared as ledger:
            ledger.close_session(self.session_id)
        self.worker.sessions_ended()

    def evict(self) -> None:
        """Forgets what is cached."""
        with self.shared as ledger:
            session = ledger.open_session("evicts", 1, self._geometry, False)
            ledger.release(session.session_id, ledger.reserve(session.session_id, ledger.total_blocks))
            ledger.close_session(session.session_id)

    def stop(self) -> None:
        self.worker.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()
