"""An epoll with one callback for each descriptor, which any thread can wake."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

from services.dataplane.transport import Event

# Called with epoll's mask and the list that takes the events of this turn.
Callback = Callable[[int, list[Event]], None]


class EpollLoop:
    """One thread watches and serves descriptors; only ``wake`` may be called by others.

    A callback may unwatch and close any descriptor, its own included.
    """

    def __init__(self) -> None:
        self._callbacks: dict[int, Callback] = {}
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.Lock()  # wake never writes to a descriptor that close has given up
        self._epoll.register(self._wake_fd, select.EPOLLIN)

    @property
    def closed(self) -> bool:
        return self._epoll.closed

    def fileno(self) -> int:
        """Readable when ``serve`` has something to do."""
        return self._epoll.fileno()

    def watch(self, fd: int, callback: Callback, mask: int = select.EPOLLIN) -> None:
        self._epoll.register(fd, mask)
        self._callbacks[fd] = callback

    def change(self, fd: int, mask: int) -> None:
        self._epoll.modify(fd, mask)

    def unwatch(self, fd: int) -> None:
        """To be called before the descriptor is closed."""
        del self._callbacks[fd]
        self._epoll.unregister(fd)

    def serve(self, timeout: float, events: list[Event]) -> bool:
        """Waits up to ``timeout`` seconds and calls back; answers whether ``wake`` has been called."""
        woken = False
        for fd, mask in self._epoll.poll(timeout):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
                woken = True
                continue
            callback = self._callbacks.get(fd)
            if callback is not None:  # else unwatched by a callback of this turn
                callback(mask, events)
        return woken

    def wake(self) -> None:
        """Lets a ``serve`` that is waiting, or the next one, return at once."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Stops watching. The descriptors that were watched stay open. Idempotent."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1
        self._callbacks.clear()
        self._epoll.close()
