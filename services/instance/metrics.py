"""What an instance holds, read when somebody asks; what its engine does is counted in engine_metrics.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.dataplane.peers import PeerSet
from services.instance.assembly import SnapshotBoard
from services.rmanager.daemon_client import DaemonSession
from services.runtime import metrics


class InstanceState(Collector):
    """Read from the engine's latest snapshot and from numbers that it only writes: it waits for nobody.

    Args:
        local: the session with the daemon beside the instance.
    """

    def __init__(self, instance_id: str, board: SnapshotBoard, peers: PeerSet, local: DaemonSession) -> None:
        self._instance_id = instance_id
        self._board = board
        self._peers = peers
        self._local = local

    def collect(self) -> Iterable[Metric]:
        latest = self._board.latest
        yield metrics.REQUESTS_RUNNING.value(latest.running)
        yield metrics.REQUESTS_WAITING.value(latest.waiting)
        yield metrics.KV_CACHE_USAGE.value(self._usage())
        borrowed: Counter[str] = Counter()
        for _, where in latest.placement:
            borrowed.update({name: count for name, count in where.items() if name != self._local.kvdaemon_id})
        yield metrics.BORROWED_BLOCKS.family(((self._instance_id, name), count) for name, count in borrowed.items())
        traffic = self._peers.traffic()
        yield metrics.DATAPLANE_SENT.family(((p.kvdaemon_id, p.transport), p.sent_bytes) for p in traffic)
        yield metrics.DATAPLANE_RECEIVED.family(((p.kvdaemon_id, p.transport), p.received_bytes) for p in traffic)
        yield metrics.REMOTE_ANSWER_TIME.summary(((p.kvdaemon_id, p.transport), p.answers, p.answer_s) for p in traffic)

    def _usage(self) -> float:
        """As the daemon said with its latest pong."""
        pool = self._local.pool
        room = 0 if pool is None else pool.total - pool.workspace
        return (pool.reserved + pool.in_use) / room if pool is not None and room else 0.0
