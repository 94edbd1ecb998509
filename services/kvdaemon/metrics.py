"""What a daemon holds and has exchanged, read when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.kvdaemon.sessions import SharedLedger
from services.kvdaemon.worker import Worker
from services.runtime import metrics


class DaemonState(Collector):
    """The ledger is asked for numbers that it keeps, as heartbeats do; the worker is not held up."""

    def __init__(self, kvdaemon_id: str, shared: SharedLedger, worker: Worker) -> None:
        self._kvdaemon_id = kvdaemon_id
        self._shared = shared
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        with self._shared as ledger:
            pool, lent = ledger.stats(), ledger.lent()
        states = (
            ("free", pool.free),
            ("cached", pool.cached),
            ("workspace", pool.workspace),
            ("reserved", pool.reserved),
            ("in_use", pool.in_use),
        )
        yield metrics.POOL_BLOCKS.family(((state,), count) for state, count in states)
        yield metrics.POOL_BYTES.value(pool.pool_bytes)
        yield metrics.BLOCK_BYTES.value(pool.block_bytes)
        yield metrics.LENT_BLOCKS.family(((name, self._kvdaemon_id), count) for name, count in lent.items())
        traffic = self._worker.traffic.all()
        yield metrics.DATAPLANE_SENT.family(((t.instance_id, t.transport), t.sent_bytes) for t in traffic)
        yield metrics.DATAPLANE_RECEIVED.family(((t.instance_id, t.transport), t.received_bytes) for t in traffic)
        hosting = self._worker.hosting
        yield metrics.HOSTED_ATTENTION_TIME.summary([((), hosting.queries, hosting.queries_s)])
