"""Is a rank still there? A thread of the leader asks, a thread of the rank answers, whatever both compute meanwhile.

A process that is dead has closed its socket, one that is stopped owes answers. Both is known of an idle rank, too.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from services.runtime.exit_text import exit_text

_ASKED_WITHIN_TIMEOUT = 10
_EXIT_WAIT_S = 2.0


class Watch:
    """The leader's side.

    Args:
        sockets: one for each process, in the same order; the rank of the first is 1.
        timeout_s: a rank that has answered nothing for so long counts as lost.
        on_lost: told why, once, in the watch's thread; the ranks are of no use from then on.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        processes: Sequence[subprocess.Popen[bytes]],
        timeout_s: float,
        on_lost: Callable[[str], None],
    ) -> None:
        self._sockets = sockets
        self._processes = processes
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._owed = [0] * len(sockets)
        self._asking = False
        self._closing = threading.Event()
        for sock in sockets:
            sock.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """From now on a rank that is silent is lost. Before, while models are loaded, only one that is dead."""
        self._asking = True

    def close(self) -> None:
        """No rank will be missed any more."""
        self._closing.set()

    def lost(self, wait_s: float = 0.0) -> str | None:
        """Which ranks are dead, and how they ended; waits for the first to be so up to ``wait_s``."""
        deadline = time.monotonic() + wait_s
        while True:
            codes = [(rank, process.poll()) for rank, process in enumerate(self._processes, 1)]
            dead = [f"rank {rank} {exit_text(code)}" for rank, code in codes if code is not None]
            if dead or time.monotonic() > deadline:
                return ", ".join(dead) or None
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._closing.is_set():
            reason = self._round()
            if reason is not None and not self._closing.is_set():
                self._on_lost(reason)
                return

    def _round(self) -> str | None:
        """Asks once and takes answers for a while.

        What is owed is counted in questions, not read from a clock: a leader that was stopped together with its ranks,
        and continued, does not blame them.
        """
        if self._asking:
            for rank, sock in enumerate(self._sockets, 1):
                if self._owed[rank - 1] >= _ASKED_WITHIN_TIMEOUT:
                    return f"rank {rank} has not answered for {self._timeout_s:g} s"
                with contextlib.suppress(OSError):  # it is gone: its end of the socket says so below
                    self._owed[rank - 1] += sock.send(b"?")
        poller = select.poll()
        for sock in self._sockets:
            poller.register(sock, select.POLLIN)
        by_fd = {sock.fileno(): index for index, sock in enumerate(self._sockets)}
        until = time.monotonic() + self._timeout_s / _ASKED_WITHIN_TIMEOUT
        while (left := until - time.monotonic()) > 0 and not self._closing.is_set():
            for fd, _ in poller.poll(1000 * left):
                try:
                    answers = len(self._sockets[by_fd[fd]].recv(64))
                except BlockingIOError:
                    continue
                except OSError:
                    answers = 0
                if not answers:
                    return self.lost(_EXIT_WAIT_S) or f"rank {by_fd[fd] + 1} has closed its socket"
                self._owed[by_fd[fd]] -= answers
        return None


def answer_pulse(fd: int) -> None:
    """The rank's side: begins to answer, in a thread of its own, until the leader's end is closed."""

    def run() -> None:
        with contextlib.suppress(OSError):
            while asked := os.read(fd, 64):
                os.write(fd, asked)

    threading.Thread(target=run, name="pulse", daemon=True).start()
