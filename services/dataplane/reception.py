"""Where strangers connect: each has a few seconds for an acceptable greeting, and nothing it sends disturbs others."""

from __future__ import annotations

import logging
import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from services.core.errors import PeerLostError
from services.dataplane.epoll_loop import EpollLoop
from services.dataplane.stream import Stream
from services.dataplane.transport import Event

_log = logging.getLogger(__name__)
_GREETING_TIMEOUT_S = 5.0
_ACCEPT_PAUSE_S = 1.0

Greeting = TypeVar("Greeting")
Sock = TypeVar("Sock", bound=Stream)


class Guest(ABC, Generic[Sock, Greeting]):
    """A peer that has connected and whose greeting has not arrived in full."""

    def __init__(self, sock: Sock) -> None:
        self.sock = sock

    @property
    def mask(self) -> int:
        """What to wait for before ``receive`` is called again."""
        return select.EPOLLIN

    @abstractmethod
    def receive(self) -> Greeting | None:
        """Reads on, not beyond the greeting; answers it once it is complete.

        Raises:
            PeerLostError: the peer hung up, or its greeting is not acceptable.
        """

    def discard(self) -> None:
        """Gives up what came with the greeting but what ``receive`` has answered. The socket stays open."""


class Reception(Generic[Sock, Greeting]):
    """A listening socket and those who have not been admitted yet.

    Args:
        listener: a non-blocking socket that listens; the caller keeps and closes it.
        new_guest: makes a guest of an accepted socket.
        admit: takes over the socket of a guest whose greeting is complete; it is watched by nobody then.
    """

    def __init__(
        self,
        loop: EpollLoop,
        listener: socket.socket,
        new_guest: Callable[[socket.socket], Guest[Sock, Greeting]],
        admit: Callable[[Sock, Greeting, list[Event]], None],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._new_guest = new_guest
        self._admit = admit
        self._guests: dict[Guest[Sock, Greeting], float] = {}  # until when each may take (time.monotonic)
        self._accept_again_at = 0.0  # 0: the listener is watched
        self._watch()

    def check_deadlines(self) -> bool:
        """Turns away who has said nothing. Answers whether it must be called again soon."""
        if not self._guests and not self._accept_again_at:
            return False
        now = time.monotonic()
        for guest in [guest for guest, deadline in self._guests.items() if deadline < now]:
            self._dismiss(guest, f"no greeting within {_GREETING_TIMEOUT_S} s")
        if self._accept_again_at and self._accept_again_at < now:
            self._accept_again_at = 0.0
            self._watch()
        return bool(self._guests or self._accept_again_at)

    def close(self) -> None:
        """Turns everybody away and stops watching the listener."""
        for guest in list(self._guests):
            self._release(guest)
            guest.sock.close()
        if not self._accept_again_at:
            self._loop.unwatch(self._listener.fileno())

    def _watch(self) -> None:
        self._loop.watch(self._listener.fileno(), self._accept)

    def _accept(self, _mask: int, _events: list[Event]) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of file descriptors: the guests wait in the backlog, and poll must not spin over them.
            _log.warning("cannot accept a peer, trying again in %s s: %s", _ACCEPT_PAUSE_S, error.strerror)
            self._loop.unwatch(self._listener.fileno())
            self._accept_again_at = time.monotonic() + _ACCEPT_PAUSE_S
            return
        sock.setblocking(False)
        guest = self._new_guest(sock)
        self._guests[guest] = time.monotonic() + _GREETING_TIMEOUT_S
        self._loop.watch(guest.sock.fileno(), partial(self._serve, guest), guest.mask)

    def _serve(self, guest: Guest[Sock, Greeting], _mask: int, events: list[Event]) -> None:
        try:
            greeting = guest.receive()
        except PeerLostError as error:
            self._dismiss(guest, str(error))
            return
        if greeting is None:
            self._loop.change(guest.sock.fileno(), guest.mask)
        else:
            self._release(guest)
            self._admit(guest.sock, greeting, events)

    def _dismiss(self, guest: Guest[Sock, Greeting], reason: str) -> None:
        _log.warning("turned away a guest: %s", reason)
        self._release(guest)
        guest.sock.close()

    def _release(self, guest: Guest[Sock, Greeting]) -> None:
        self._loop.unwatch(guest.sock.fileno())
        del self._guests[guest]
        guest.discard()
