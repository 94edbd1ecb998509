"""What one process has said on its present heartbeat stream, put together. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.core.errors import InvalidRequestError
from services.core.placement import (
    BlockCount,
    InstanceReport,
    KvDaemonReport,
    NamedKvDaemon,
    NamedRequest,
    PeerTransport,
    Report,
    RunningRequest,
    WaitingRequest,
)


@dataclass(slots=True)
class Reporter:
    """One process.

    Blocks and progress are kept by the stream's numbers, as they come: in a large cluster next to nothing of a process
    is in a processor's cache when its heartbeat comes, and names and objects would lie all over the memory.

    Attributes:
        open: the stream.
        instance, kvdaemon: its latest report.
        queue: of waiting requests, oldest first.
        transports: of the daemons that it is connected to.
    """

    stream: int
    next_sequence: int
    last_heartbeat: float
    open: bool = True
    instance: InstanceReport | None = None
    kvdaemon: KvDaemonReport | None = None
    queue: tuple[WaitingRequest, ...] = ()
    transports: tuple[PeerTransport, ...] = ()
    _requests: dict[int, NamedRequest] = field(default_factory=dict)
    _kvdaemons: dict[int, NamedKvDaemon] = field(default_factory=dict)
    _blocks: dict[int, dict[int, int]] = field(default_factory=dict)  # by daemon, by request; all > 0
    _context: dict[int, int] = field(default_factory=dict)  # of running requests, tokens

    @property
    def placement(self) -> Mapping[str, Mapping[str, BlockCount]]:
        """Request id -> daemon id -> blocks; every inner mapping has at least one entry."""
        placed: dict[str, dict[str, BlockCount]] = {}
        for daemon, by_request in self._blocks.items():
            _, kvdaemon_id, local = self._kvdaemons[daemon]
            for request, num_blocks in by_request.items():
                placed.setdefault(self._requests[request].request_id, {})[kvdaemon_id] = BlockCount(num_blocks, local)
        return placed

    @property
    def progress(self) -> tuple[RunningRequest, ...]:
        """Of running requests, the oldest first."""
        running = []
        for number, context_tokens in self._context.items():
            _, request_id, arrival_time, final_tokens = self._requests[number]
            running.append(RunningRequest(request_id, arrival_time, context_tokens, final_tokens))
        return tuple(sorted(running, key=lambda progress: (progress.arrival_time, progress.request_id)))

    def apply(self, report: Report) -> None:
        """Takes in what has changed; cost in proportion to that.

        Raises:
            InvalidRequestError: a number that nothing was named with, or columns of different lengths; nothing of the
                columns was taken in.
        """
        if isinstance(report, KvDaemonReport):
            self.kvdaemon = report
            return
        for request in report.requests:
            self._requests[request.number] = request
        for kvdaemon in report.kvdaemons:
            self._kvdaemons[kvdaemon.number] = kvdaemon
            self._blocks.setdefault(kvdaemon.number, {})
        self._check(report)
        blocks, context = self._blocks, self._context
        for number, daemon, num_blocks in zip(*report.placement, strict=True):
            if num_blocks:
                blocks[daemon][number] = num_blocks
            else:
                blocks[daemon].pop(number, None)
        context.update(zip(*report.progress, strict=True))
        for number in report.ended:
            del self._requests[number]
            context.pop(number, None)
            for by_request in blocks.values():
                by_request.pop(number, None)
        self.instance = report
        if report.queue is not None:
            self.queue = report.queue
        if report.transports is not None:
            self.transports = report.transports

    def _check(self, report: InstanceReport) -> None:
        placement, progress = report.placement, report.progress
        if not (
            len(placement.requests) == len(placement.kvdaemons) == len(placement.num_blocks)
            and len(progress.requests) == len(progress.context_tokens)
        ):
            raise InvalidRequestError("a heartbeat's columns have different lengths")
        known = self._requests.keys()
        if not (
            known >= {*placement.requests, *progress.requests, *report.ended}
            and self._kvdaemons.keys() >= set(placement.kvdaemons)
        ):
            raise InvalidRequestError("a heartbeat tells of a request or a daemon that was not named in its stream")
