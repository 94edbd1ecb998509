"""One direction of a connection: a thread that joins the direction's group and makes one transfer after the other.

torch.distributed blocks: in meeting the other member, and, with gloo, in every wait. So none of it is called by the
thread that owns the transport. That thread posts tensors, is told of each one that has been transferred, and can always
go on without an answer: a lane whose peer is stopped waits alone, until it is aborted.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import torch

from services.dataplane.collective_group import PairBackend, PairGroup
from services.dataplane.collective_meeting import Meeting

_JOIN_S = 1.0


class Lane:
    """Transfers in the order in which they are posted.

    ``progress`` is called by the lane's thread after ``transferred`` or ``failure`` has changed.
    """

    def __init__(self, backend: PairBackend, meeting: Meeting, is_send: bool, progress: Callable[[], None]) -> None:
        self.transferred = 0  # messages, since the lane began
        self.failure = ""  # why there will be no more
        self._is_send = is_send
        self._progress = progress
        self._queue: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        self._group: PairGroup | None = None
        self._aborted = threading.Event()
        self._deadline: threading.Timer | None = None
        self.thread = threading.Thread(
            target=self._run, args=(backend, meeting), name=f"lane {meeting.generation}", daemon=True
        )

    def start(self) -> None:
        self.thread.start()

    def post(self, data: torch.Tensor) -> None:
        """Has ``data`` [bytes] uint8 sent or filled; nobody else touches it until it has been transferred."""
        self._queue.put(data)

    def finish(self, within_s: float) -> None:
        """What has been posted is transferred yet, if that takes no longer; nothing more is posted."""
        if self._is_send:
            # Closing a socket may discard what it has not delivered. Nobody receives this byte, but the other member
            # leaves the group, which ends its transfer, when it has received what came before.
            self._queue.put(torch.zeros(1, dtype=torch.uint8))
        self._queue.put(None)
        if self.thread.is_alive() and self._deadline is None:
            self._deadline = threading.Timer(within_s, self.abort)
            self._deadline.daemon = True
            self._deadline.start()

    def abort(self) -> None:
        """Nothing more is transferred. Any thread may call it; the lane's thread ends soon."""
        self._aborted.set()
        self._queue.put(None)
        group = self._group
        if group is not None:
            group.abort()

    def _run(self, backend: PairBackend, meeting: Meeting) -> None:
        try:
            sender = meeting.rank if self._is_send else 1 - meeting.rank
            self._group = meeting.group(sender, backend, self._aborted)
            while not self._aborted.is_set() and (data := self._queue.get()) is not None:
                if data.numel():
                    self._transfer(self._group, data)
                self.transferred += 1
                self._progress()
            self.failure = "the lane has ended"
        except (RuntimeError, OSError) as error:
            self.failure = str(error).partition("\n")[0]
        finally:
            self._group = None  # its sockets close: the other member's transfers end
            if self._deadline is not None:
                self._deadline.cancel()
            self._progress()

    def _transfer(self, group: PairGroup, data: torch.Tensor) -> None:
        if self._is_send:
            group.send(data)
        else:
            group.receive(data)


class Lanes:
    """The lanes of a transport, also those that finish after their connection has ended."""

    def __init__(self) -> None:
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()

    def add(self, lane: Lane) -> None:
        self._lanes.add(lane)

    def end(self) -> None:
        """Aborts all. At the process's end: a thread that is still in torch's code then would crash it."""
        running = [lane for lane in self._lanes if lane.thread.is_alive()]
        for lane in running:
            lane.abort()
        for lane in running:
            lane.thread.join(_JOIN_S)
