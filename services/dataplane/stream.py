"""What the tcp transport needs of a non-blocking socket. A plain one has it, and so has ``TlsStream``, and no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from services.dataplane.transport import Buffer


class Stream(Protocol):
    """A socket's methods. What would block raises BlockingIOError, and what has failed another OSError, whose
    ``strerror`` says why.

    What ``send`` or ``sendmsg`` has not taken is offered again, first and at least as much of it: with TLS a part of it
    may be on its way.
    """

    def fileno(self) -> int: ...

    def send(self, data: Buffer, /) -> int: ...

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int: ...

    def recv(self, bufsize: int, /) -> bytes: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def shutdown(self, how: int, /) -> None: ...

    def getpeername(self) -> Any: ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...

    def close(self) -> None: ...
