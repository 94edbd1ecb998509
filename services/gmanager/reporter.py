"""What one process has said on its present heartbeat stream, put together. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.core.placement import (
    BlockCount,
    InstanceReport,
    KvDaemonReport,
    PeerTransport,
    Report,
    RunningRequest,
    WaitingRequest,
)


@dataclass(slots=True)
class Reporter:
    """One process.

    Attributes:
        open: the stream.
        instance, kvdaemon: its latest report.
        placement: request id -> daemon id -> blocks; every inner mapping has at least one entry.
        progress: of running requests.
        queue: of waiting ones, oldest first.
        transports: of the daemons that it is connected to.
    """

    stream: int
    next_sequence: int
    last_heartbeat: float
    open: bool = True
    instance: InstanceReport | None = None
    kvdaemon: KvDaemonReport | None = None
    placement: dict[str, dict[str, BlockCount]] = field(default_factory=dict)
    progress: dict[str, RunningRequest] = field(default_factory=dict)
    queue: tuple[WaitingRequest, ...] = ()
    transports: tuple[PeerTransport, ...] = ()

    def apply(self, report: Report) -> None:
        """Takes in what has changed; cost in proportion to that."""
        if isinstance(report, KvDaemonReport):
            self.kvdaemon = report
            return
        self.instance = report
        for request_id, kvdaemon_id, num_blocks, local in report.placement:
            where = self.placement.get(request_id)
            if num_blocks:
                if where is None:
                    where = self.placement[request_id] = {}
                where[kvdaemon_id] = BlockCount(num_blocks, local)
            elif where is not None:
                where.pop(kvdaemon_id, None)
                if not where:
                    del self.placement[request_id]
        for progress in report.progress:
            self.progress[progress.request_id] = progress
        for request_id in report.ended:
            self.placement.pop(request_id, None)
            self.progress.pop(request_id, None)
        if report.queue is not None:
            self.queue = report.queue
        if report.transports is not None:
            self.transports = report.transports
