"""How an instance gets at the pool of the daemon beside it, and how the daemon learns that it let go.

The daemon listens on a Unix socket. An instance presents its session id, which only the daemon and the instance know,
and gets the pool: a memfd, or the name of memory on a GPU (``Grant``). The connection then stays open, silent, for as
long as the mapping exists: its hang-up proves that nobody writes to the session's open blocks any more. A stopped
process still holds it; a killed one does not. What a killed process has asked a GPU for may still be under way: such a
pool lingers before it believes in the hang-up.

    request, little-endian: magic [8], session_id u64
    answer: status u8 (0 mapped, 1 refused), memory u8 (MemoryKind), pool_bytes u64, then the memory's descriptor
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError, PeerLostError, SessionRevokedError, TransferTimeoutError
from services.dataplane.device import Device
from services.dataplane.host_device import HostDevice
from services.dataplane.kv_pool import Grant, MemoryKind, Pool, blocks_of
from services.dataplane.unix_socket import UnixListener, connect_unix

_log = logging.getLogger(__name__)
_REQUEST = struct.Struct("<8sQ")
_ANSWER = struct.Struct("<BBQ")
_LONGEST_DESCRIPTOR = 256
_MAGIC = b"IFLLMKV2"
_MAPPED, _REFUSED = 0, 1
_REQUEST_TIMEOUT_S = 5.0
_ACCEPT_PAUSE_S = 1.0


class _Client:
    """A connected process; ``session_id`` is None until it has been given the pool."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.request = b""
        self.session_id: int | None = None


class PoolSocketServer:
    """The daemon's side. Everything, the callbacks included, runs in the thread of the event loop that calls ``start``.

    Args:
        path: of the Unix socket; a stale file of a dead process is replaced.
        may_map: whether the session exists and may map the pool. A session has at most one mapping at a time.
        hung_up: called exactly once for each session that was given the pool, when its mapping is gone and nothing
            that it began is under way (not by ``close``).

    Raises:
        ConfigError: the socket cannot be bound.
    """

    def __init__(self, path: Path, pool: Pool, may_map: Callable[[int], bool], hung_up: Callable[[int], None]) -> None:
        self._pool = pool
        self._may_map = may_map
        self._hung_up = hung_up
        self._clients: set[_Client] = set()
        self._lingering: dict[int, asyncio.TimerHandle] = {}  # by session
        self._listener = UnixListener(path)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accept_again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to serve in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener.socket, self._accept)

    def close(self) -> None:
        """Ends all connections without callbacks and stops listening. Idempotent."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.remove_reader(self._listener.socket)
            if self._accept_again is not None:
                self._accept_again.cancel()
            for client in self._clients:
                loop.remove_reader(client.sock)
                client.sock.close()
            self._clients.clear()
            for timer in self._lingering.values():
                timer.cancel()
        self._listener.close()

    def _accept(self) -> None:
        assert self._loop is not None
        try:
            sock, _ = self._listener.socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of file descriptors: the loop must not spin over the backlog.
            _log.warning("cannot accept an instance, trying again in %s s: %s", _ACCEPT_PAUSE_S, error.strerror)
            self._loop.remove_reader(self._listener.socket)
            self._accept_again = self._loop.call_later(
                _ACCEPT_PAUSE_S, self._loop.add_reader, self._listener.socket, self._accept
            )
            return
        sock.setblocking(False)
        client = _Client(sock)
        self._loop.call_later(_REQUEST_TIMEOUT_S, self._expire, client)
        self._clients.add(client)
        self._loop.add_reader(sock, self._receive, client)

    def _expire(self, client: _Client) -> None:
        if client in self._clients and client.session_id is None:
            self._drop(client)

    def _receive(self, client: _Client) -> None:
        wanted = _REQUEST.size - len(client.request) if client.session_id is None else _REQUEST.size
        try:
            data = client.sock.recv(wanted)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
        elif client.session_id is None:
            client.request += data
            if len(client.request) == _REQUEST.size:
                self._answer(client)

    def _answer(self, client: _Client) -> None:
        magic, session_id = _REQUEST.unpack(client.request)
        mapped = session_id in self._lingering or any(other.session_id == session_id for other in self._clients)
        if magic != _MAGIC or mapped or not self._may_map(session_id):
            with contextlib.suppress(OSError):
                client.sock.send(_ANSWER.pack(_REFUSED, 0, 0))
            self._drop(client)
            return
        # From here on the client may hold the memory, whether or not the answer reaches it.
        client.session_id = session_id
        grant = self._pool.grant()
        assert len(grant.descriptor) <= _LONGEST_DESCRIPTOR
        answer = _ANSWER.pack(_MAPPED, grant.kind, grant.pool_bytes) + grant.descriptor
        try:
            socket.send_fds(client.sock, [answer], list(grant.fds))
        except OSError:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        assert self._loop is not None
        self._loop.remove_reader(client.sock)
        client.sock.close()
        self._clients.discard(client)
        if client.session_id is not None:
            self._lose(client.session_id)

    def _lose(self, session_id: int) -> None:
        """A mapping is gone."""
        assert self._loop is not None
        if self._pool.linger_s:
            self._lingering[session_id] = self._loop.call_later(self._pool.linger_s, self._end_lingering, session_id)
        else:
            self._hung_up(session_id)

    def _end_lingering(self, session_id: int) -> None:
        del self._lingering[session_id]
        self._hung_up(session_id)


class MappedPool:
    """The instance's side: another process's pool in this one.

    Args:
        grant: what the daemon passed; its files are owned from here on, like ``sock``.
        sock: the connection to the daemon, an open file descriptor.
        device: that is to look at the pool.

    Attributes:
        grant, files: for another process of the instance that is to map the same pool: ``MappedPool`` is made there of
            the grant, with the files that belong to it, and of the last of ``files``. The daemon sees a hang-up when
            the last process with the connection is gone.

    Raises:
        ConfigError, PeerLostError: as ``Device.map_pool``.
    """

    def __init__(self, grant: Grant, sock: int, device: Device) -> None:
        self.grant = grant
        self.files = (*grant.fds, sock)
        try:
            mapping = device.map_pool(grant)
        except (ConfigError, PeerLostError):
            _close_all(self.files)
            raise
        self.pool_bytes = len(mapping.content)
        self._content: Tensor | None = mapping.content
        # The daemon gives the session's blocks away after the hang-up, so the socket outlives every tensor, and at the
        # process's end every thread: there the system closes it.
        weakref.finalize(mapping.memory, _let_go, mapping.unmap, self.files).atexit = False

    def as_tensor(self, geometry: PoolGeometry) -> Tensor:
        """The pool as blocks: ``[num_blocks, layers, kv_heads, 2, block_tokens, head_dim]`` of ``geometry.dtype``."""
        assert self._content is not None, "the mapping is closed"
        return blocks_of(self._content, geometry)

    def close(self) -> None:
        """Gives up the mapping. It goes, and the daemon learns of it, with the last tensor over it. Idempotent."""
        self._content = None


def _let_go(unmap: Callable[[], None], fds: tuple[int, ...]) -> None:
    unmap()
    _close_all(fds)


def map_pool(socket_path: Path, session_id: int, deadline: float, device: Device | None = None) -> MappedPool:
    """Maps the pool of the daemon that listens on ``socket_path``. Blocks until ``deadline`` at most.

    Args:
        session_id: of an open session with that daemon, below 2**64.
        deadline: in terms of ``time.monotonic()``.
        device: that is to look at it; the CPU where none is given.

    Raises:
        ConfigError: the pool does not lie where the device can look at it.
        PeerLostError: nobody listens there, or the daemon hung up.
        SessionRevokedError: the daemon knows no such session, or the session has mapped the pool already.
        TransferTimeoutError: no answer before the deadline.
    """
    sock = connect_unix(socket_path)
    fds: list[int] = []
    try:
        sock.send(_REQUEST.pack(_MAGIC, session_id))
        sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        # The answer is a single write of a few bytes: it arrives whole or not at all.
        longest = _ANSWER.size + _LONGEST_DESCRIPTOR
        answer, fds, _, _ = socket.recv_fds(sock, longest, 1, socket.MSG_CMSG_CLOEXEC)
        if len(answer) < _ANSWER.size:
            raise PeerLostError(f"the daemon behind {socket_path} hung up before it passed the pool")
        status, kind, pool_bytes = _ANSWER.unpack_from(answer)
        if status != _MAPPED:
            raise SessionRevokedError(f"the daemon behind {socket_path} lets session {session_id:#x} map no pool")
        if kind not in list(MemoryKind):
            raise PeerLostError(f"the daemon behind {socket_path} has memory of kind {kind}: it is of another version")
        grant = Grant(MemoryKind(kind), pool_bytes, answer[_ANSWER.size :], tuple(fds))
        fds = []  # the mapping's from here on, as the socket is
        return MappedPool(grant, sock.detach(), device or HostDevice())
    except TimeoutError as error:
        sock.close()
        raise TransferTimeoutError(f"the daemon behind {socket_path} did not pass the pool in time") from error
    except OSError as error:
        sock.close()
        raise PeerLostError(f"the daemon behind {socket_path} hung up: {error.strerror}") from error
    except (ConfigError, PeerLostError, SessionRevokedError):
        sock.close()
        raise
    finally:
        for fd in fds:
            os.close(fd)


def _close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
