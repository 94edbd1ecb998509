"""The end of a tcp connection that this side has closed.

Closing a socket with unread data would reset the connection, and the peer might never see what was sent to it before.
So the rest of the output is flushed, then the peer is told that nothing follows, and what it still sends is thrown away
until it hangs up or the time is over.
"""

from __future__ import annotations

import contextlib
import select
import socket

from services.dataplane.stream import Stream

FAREWELL_S = 2.0
_SCRATCH_BYTES = 64 << 10
_DRAINED_AT_ONCE = 16  # reads; the peer may go on sending


class Farewell:
    """A socket on its way out."""

    def __init__(self, sock: Stream, unsent: bytearray) -> None:
        self.sock = sock
        self._unsent = unsent
        self._told = False  # that nothing follows
        self._heard = False  # that nothing follows from the peer

    @property
    def mask(self) -> int:
        """What to wait for."""
        return (0 if self._told else select.EPOLLOUT) | (0 if self._heard else select.EPOLLIN)

    def serve(self) -> bool:
        """Goes on as far as it can now. Answers whether it is over and the socket may be closed."""
        try:
            self._flush()
            self._drain()
        except OSError:
            return True
        return self._told and self._heard

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent)]
            if not self._told:
                self.sock.shutdown(socket.SHUT_WR)
                self._told = True

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_DRAINED_AT_ONCE):
                if not self.sock.recv(_SCRATCH_BYTES):
                    self._heard = True
                    return
