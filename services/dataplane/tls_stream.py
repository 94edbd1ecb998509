"""TLS over one non-blocking socket: OpenSSL between two buffers in memory, and the socket's bytes in and out of these.

So whatever OpenSSL has to say is sent and read here, in the order of this side's messages, and never waits for anybody.

What arrives is decrypted straight into the caller's buffer; what is sent is encrypted in pieces. The socket's readiness
says nothing of bytes that have been read from it and not been asked for: ``holds_more`` does.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
from collections.abc import Iterable, Iterator
from typing import Any

from services.dataplane.tls_failures import tls_failure
from services.dataplane.transport import Buffer

_PIECE_BYTES = 128 << 10  # encrypted at once
_FETCH_BYTES = 256 << 10  # read from the socket at once
_ALERT = b"\x15\x03\x03\x00\x02\x02\x46"  # "protocol version": to whom OpenSSL says nothing, as he speaks no TLS


class TlsStream:
    """A ``Stream``. It takes the socket over.

    Args:
        sock: connected, or about to be.
        context: for this side of the handshake.
        name: DNS name that the listener's certificate must be for; None where this is the listener.

    Attributes:
        wants: what the handshake waits for, an epoll mask; 0 once it is over.
        holds_more: the last read left something that the socket's readiness does not tell of.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str | None) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=name is None, server_hostname=name)
        self._sealed = memoryview(b"")  # encrypted, and not taken by the kernel
        self._sealed_size = 0  # bytes of the caller's that it stands for, which have not been answered as sent
        self._failure: OSError | None = None
        self._over = False  # the other side has said that nothing follows
        self._shut = False  # this side has; what arrives is not looked at any more
        self.wants = select.EPOLLIN if name is None else select.EPOLLOUT
        self.holds_more = False

    def handshake(self) -> None:
        """Goes on with the handshake, as far as it can now; ``wants`` says how far that is.

        Raises:
            OSError: it has failed, now or before.
        """
        if self._failure is not None:
            raise self._failure
        try:
            while self.wants:
                self._shake()
        except BlockingIOError:
            return
        except OSError as error:
            self._sealed = self._sealed or memoryview(_ALERT)
            raise self._fail(tls_failure(error, in_handshake=True)) from error

    def peer_dns_names(self) -> list[str]:
        """The names in the other side's certificate, which the handshake has verified."""
        certificate = self._tls.getpeercert() or {}
        names: Any = certificate.get("subjectAltName", ())
        return [value for kind, value in names if kind == "DNS"]

    # ------------------------------------------------------------ a stream

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, data: Buffer, /) -> int:
        """Sends one piece at most, all of it or nothing."""
        self._ensure_ready()
        if not self._sealed:
            with memoryview(data) as view, view[:_PIECE_BYTES] as piece:
                self._seal(piece)
        return self._push()

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        self._ensure_ready()
        assert not self._sealed, "what was not taken is offered to send"
        sent = 0
        try:
            for piece in _pieces(buffers):
                self._seal(piece)
                sent += self._push()
        except BlockingIOError:
            if not sent:
                raise
        return sent

    def recv(self, bufsize: int, /) -> bytes:
        if self._shut:
            return self._sock.recv(bufsize)
        buffer = bytearray(bufsize)
        with memoryview(buffer) as view:
            got = self.recv_into(view)
        return bytes(buffer[:got])

    def recv_into(self, buffer: memoryview, /) -> int:
        """Reads once from the socket at most; 0 says that the other side has said that nothing follows."""
        self._ensure_ready()
        self.holds_more = False
        got = 0
        if self._over:
            return got
        if not self._holds():  # or OpenSSL would say so by an exception, which takes longer
            self._fetch()
        while got < len(buffer):
            try:
                size = int(self._tls.read(len(buffer) - got, buffer[got:]))
            except ssl.SSLWantReadError:
                if got:
                    return got
                self._fetch()
                continue
            except ssl.SSLError as error:
                raise self._fail(tls_failure(error, in_handshake=False)) from error
            if not size:
                self._over = True
                self.holds_more = got > 0  # namely that
                return got
            got += size
            if not self._holds():
                return got
        self.holds_more = True
        return got

    def shutdown(self, how: int, /) -> None:
        """Tells the other side that nothing follows, first in TLS. ``how`` is SHUT_WR: nobody asks for else."""
        if not self._shut:
            with contextlib.suppress(ssl.SSLError):  # nobody waits for the other side to say the same
                self._tls.unwrap()
            self._sealed = memoryview(self._outgoing.read())
            self._shut = True
        self._push()
        self._sock.shutdown(how)

    def getpeername(self) -> Any:
        return self._sock.getpeername()

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        self._sock.setsockopt(level, option, value)

    def close(self) -> None:
        self._sock.close()

    # ------------------------------------------------------------ between OpenSSL and the socket

    def _ensure_ready(self) -> None:
        if self.wants or self._failure is not None:
            self.handshake()
            if self.wants:
                raise BlockingIOError(errno.EAGAIN, "the TLS handshake is not over")

    def _holds(self) -> bool:
        """Whether something has been read from the socket that nobody has taken, if only a part of a record."""
        return bool(self._incoming.pending or self._tls.pending())

    def _shake(self) -> None:
        """One step: what OpenSSL has to say is sent before more is read for it."""
        self.wants = select.EPOLLOUT
        self._push()
        try:
            self._tls.do_handshake()
            over = True
        except ssl.SSLWantReadError:
            over = False
        finally:  # of a failure, too: it tells the other side what is wrong
            self._sealed = memoryview(self._outgoing.read())
        if self._sealed:
            return
        if over:
            self.wants = 0
        else:
            self.wants = select.EPOLLIN
            self._fetch()

    def _seal(self, piece: Buffer) -> None:
        self._tls.write(piece)
        self._sealed = memoryview(self._outgoing.read())
        self._sealed_size = len(piece)

    def _push(self) -> int:
        """Hands what is encrypted to the kernel; answers what it stands for."""
        try:
            while self._sealed:
                self._sealed = self._sealed[self._sock.send(self._sealed) :]
        except BlockingIOError:
            raise
        except OSError:
            self._sealed = memoryview(b"")  # nobody takes it any more; what the peer has sent before can still be read
            raise
        size, self._sealed_size = self._sealed_size, 0
        return size

    def _fetch(self) -> None:
        data = self._sock.recv(_FETCH_BYTES)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _fail(self, failure: OSError) -> OSError:
        """Keeps why the connection is of no use any more, as OpenSSL says so only once; the other side is told."""
        self._failure = failure
        self.wants = 0
        with contextlib.suppress(OSError):
            self._push()
        return failure


def _pieces(buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    """The bytes of the buffers, cut into pieces as large as may be: every piece costs a header and a system call."""
    gathered = bytearray()
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.nbytes:
            continue
        view = view.cast("B")
        if gathered:
            room = _PIECE_BYTES - len(gathered)
            gathered += view[:room]
            view = view[room:]
            if len(gathered) < _PIECE_BYTES:
                continue
            yield gathered
            gathered = bytearray()
        whole = len(view) - len(view) % _PIECE_BYTES
        for at in range(0, whole, _PIECE_BYTES):
            yield view[at : at + _PIECE_BYTES]
        gathered += view[whole:]
    if gathered:
        yield gathered
