"""Transport between processes of one host: a pair of rings in shared memory for each connection.

Messages never pass through the kernel; ``Message.data`` is a view straight into the ring. The Unix socket of a
connection carries only doorbells, and its hang-up tells that the peer is dead. (A forked child without exec keeps its
parent's sockets open, so services start their children by exec.)

A connection is *awake* or *asleep*. ``poll`` looks at the rings of all awake connections; when none has anything, it
watches them for a while (``Patience``), puts them to sleep and waits in epoll. A sleeping connection costs nothing
until its doorbell rings, and a doorbell is rung once per sleep: a sender to a busy receiver makes no system call.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from kernels.cpu.answering import CompiledQueries, ConnectionWatch, Watched
from kernels.cpu.asking import CompiledAsker
from kernels.cpu.library import Channel, find_library
from services.core.errors import ConfigError, PeerLostError
from services.dataplane.patience import Patience
from services.dataplane.reception import Reception
from services.dataplane.shm_handshake import BELL, SharedRings, ShmGuest, offer
from services.dataplane.shm_ring import RingReader, RingWriter
from services.dataplane.socket_transport import SocketConnection, SocketTransport
from services.dataplane.transport import Accepted, Buffer, Connected, Connection, Event, Limits, Received, message_bytes
from services.dataplane.unix_socket import UnixListener, connect_unix

_COMPILED = find_library() is not None


class ShmConnection(SocketConnection):
    """One end of a pair of rings."""

    can_answer = can_ask = _COMPILED

    def __init__(
        self, transport: ShmTransport, sock: socket.socket, rings: SharedRings, peer: str, connecting: bool
    ) -> None:
        self.limits = rings.layout.limits
        self.peer = peer
        self.sock = sock
        self.fd = sock.fileno()
        self.waiting = connecting  # for the other side's poll
        self.reader = RingReader(rings.memory, rings.layout, ring=1 if connecting else 0)
        self._writer: RingWriter | None = RingWriter(rings.memory, rings.layout, ring=0 if connecting else 1)
        self._transport = transport
        self._queries: CompiledQueries | None = None

    def send(self, parts: Sequence[Buffer]) -> None:
        size = message_bytes(parts, self.limits, self.peer)
        if self._writer is None:
            raise PeerLostError(f"the connection to {self.peer} has ended")
        try:
            if self._writer.write(parts, size):
                self.sock.send(BELL)
        except PeerLostError as error:
            self._transport.lose(self, str(error))
            raise
        except OSError:
            # Full: the peer has doorbells enough. Hung up: poll says so, after what the peer has sent before.
            pass

    def answer_with(self, queries: CompiledQueries | None) -> None:
        self._queries = queries
        if queries is not None:
            self._bind(queries.channel)

    def ask_with(self, asker: CompiledAsker) -> None:
        self._bind(asker.channel)

    def _bind(self, channel: Channel) -> None:
        if self._writer is not None:
            self.reader.bind(channel.in_)
            self._writer.bind(channel.out)
            channel.max_message, channel.fd = self.limits.max_message_bytes, self.fd

    def ask(self, asker: CompiledAsker, sequence: int) -> int:
        writer = self._writer
        if writer is None:
            return 0
        writer.lend(asker.channel.out)
        sent = asker.ask(sequence)
        writer.take_back(asker.channel.out)
        return sent

    def take_answer(self, asker: CompiledAsker) -> bool:
        if self._writer is None or self.waiting or self.reader.held:
            return False
        return self._transport.take_answer(self, asker)

    def lend(self, asker: CompiledAsker) -> bool:
        if self._writer is None or self.waiting or self.reader.held:
            return False
        self._writer.lend(asker.channel.out)
        self._transport.lend(self, asker)
        return True

    def take_back(self, asker: CompiledAsker) -> None:
        if self._writer is not None:
            self._writer.take_back(asker.channel.out)
            self._transport.take_back(self, asker)

    @property
    def answers(self) -> bool:
        """Whether there is anything that compiled code may answer."""
        return self._queries is not None

    @property
    def delayed(self) -> bool:
        """Whether compiled code lets messages wait until they are due."""
        return self._queries is not None and bool(self._queries.channel.link)

    def lend_rings(self) -> CompiledQueries | None:
        """What compiled code may answer until ``take_rings_back``."""
        queries = self._queries
        if queries is None or self._writer is None or self.reader.held:
            return None
        self.reader.lend(queries.channel.in_)
        self._writer.lend(queries.channel.out)
        return queries

    def take_rings_back(self, queries: CompiledQueries) -> None:
        if self._writer is not None:
            self.reader.take_back(queries.channel.in_)
            self._writer.take_back(queries.channel.out)

    def end(self) -> None:
        self._writer = self._queries = None
        self.sock.close()
        if not self.reader.held:
            self.reader.discard()

    def close(self) -> None:
        self._transport.forget(self)
        self.reader.discard()


class ShmTransport(SocketTransport[ShmConnection]):
    """Data plane over shared memory; addresses are ``shm:/path/of/socket``.

    Args:
        socket_path: where ``listen`` listens; None for a process that only connects.
        awake_s: how long ``poll`` watches awake rings before it sleeps: at least, and where messages come soon.
    """

    scheme = "shm"
    address_form = "shm:/path/of/socket"

    def __init__(self, socket_path: Path | None = None, awake_s: tuple[float, float] = (20e-6, 1e-3)) -> None:
        super().__init__()
        self._socket_path = socket_path
        self._patience = Patience(*awake_s)
        self._watch = _RingWatch()
        self._listener: UnixListener | None = None
        self._reception: Reception[socket.socket, SharedRings] | None = None
        self._awake: set[ShmConnection] = set()

    def listen(self) -> str:
        if self._socket_path is None:
            raise ConfigError("this shm transport has no socket path to listen on")
        if self._listener is None:
            self._listener = UnixListener(self._socket_path)
            self._reception = Reception(self._loop, self._listener.socket, ShmGuest, self._admit)
        return f"{self.scheme}:{self._socket_path}"

    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        sock = connect_unix(Path(self._check_connect(address, hello)))
        try:
            connection = ShmConnection(self, sock, offer(sock, hello, limits), peer=address, connecting=True)
        except (ConfigError, PeerLostError) as error:
            sock.close()
            raise PeerLostError(f"cannot connect to {address}: {error}") from error
        self._adopt(connection)
        return connection

    def take_answer(self, connection: ShmConnection, asker: CompiledAsker) -> bool:
        """Looks for an answer for as long as ``poll`` would stay awake."""
        self._wake_up(connection)
        connection.reader.lend(asker.channel.in_)
        ending = asker.take_answer(self._patience.awake_s())
        connection.reader.take_back(asker.channel.in_)
        if ending is Watched.TAKEN:
            self._patience.arrived()
        elif ending is Watched.CONTENDED:
            self._patience.contended()
        return ending is Watched.TAKEN

    def lend(self, connection: ShmConnection, asker: CompiledAsker) -> None:
        """Lets compiled code look for answers for as long as ``poll`` would stay awake."""
        self._wake_up(connection)
        connection.reader.lend(asker.channel.in_)
        asker.wait_for(self._patience.next_awake_s)

    def take_back(self, connection: ShmConnection, asker: CompiledAsker) -> None:
        connection.reader.take_back(asker.channel.in_)
        self._patience.learn_from(asker)

    def _wake_up(self, connection: ShmConnection) -> None:
        if connection not in self._awake:
            connection.reader.wake_up()
            self._awake.add(connection)

    def _close_sockets(self) -> None:
        if self._listener is not None and self._reception is not None:
            self._reception.close()
            self._listener.close()

    def _check_deadlines(self) -> bool:
        return self._reception is not None and self._reception.check_deadlines()

    def _remove(self, connection: ShmConnection) -> None:
        self._awake.discard(connection)
        self._watch = _RingWatch()  # the old one may keep the rings' memory
        super()._remove(connection)

    def _begin_poll(self, events: list[Event]) -> None:
        self._read_rings(events)

    def _read_rings(self, events: list[Event]) -> None:
        """Reads the rings of all awake connections, but for what compiled code answers."""
        answering = any(connection.answers for connection in self._awake)
        if answering and self._look(0.0, self._loop.fileno()) is not Watched.CHANGED:
            return  # what has come since then is looked at next time
        self._read_all(events)

    def _read_all(self, events: list[Event]) -> None:
        broken: list[tuple[ShmConnection, str]] = []
        for connection in self._awake:
            reason = self._read_ring(connection, events)
            if reason:
                broken.append((connection, reason))
        for connection, reason in broken:
            self._end(connection, reason, events)

    def _before_wait(self, events: list[Event], also: int) -> None:
        """Puts the awake connections to sleep, unless one of them has something soon."""
        while self._awake and not events:  # more than once where compiled code has answered what was there
            awake_s = self._patience.awake_s()
            ending = self._look(awake_s, also) if awake_s > 0 else Watched.TIMEOUT
            if ending is Watched.CONTENDED:
                self._patience.contended()
            if ending is not Watched.CHANGED:
                self._awake = {connection for connection in self._awake if not connection.reader.fall_asleep()}
                if any(connection.delayed for connection in self._awake):
                    self._read_all(events)  # what is not due yet is the link's to wait for
            self._read_rings(events)

    def _look(self, awake_s: float, also: int) -> Watched:
        """Watches the rings of all awake connections; what compiled code may answer is answered meanwhile."""
        answered, ending = self._watch.look([*self._awake], also, awake_s)
        if answered:
            self._patience.arrived(answered)
        return ending

    def _read_ring(self, connection: ShmConnection, events: list[Event]) -> str:
        """Takes what has arrived. Answers why the connection must end, or nothing."""
        reader = connection.reader
        try:
            while (message := reader.read()) is not None:
                self._patience.arrived()
                events.append(Received(connection, message))
        except PeerLostError as error:
            return str(error)
        return ""

    def _serve_connection(self, connection: ShmConnection, mask: int, events: list[Event]) -> None:
        try:
            bells = connection.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            bells = b""
        if connection.waiting and bells:
            connection.waiting = False
            events.append(Connected(connection))
            self._awake.add(connection)
        elif bells and connection not in self._awake:
            connection.reader.wake_up()
            self._awake.add(connection)
        if bells and any(awake.answers for awake in self._awake):
            self._read_rings(events)
            return
        # What the peer sent before it hung up still counts.
        reason = self._read_ring(connection, events)
        if reason or not bells:
            refused = "the peer ended before it accepted the connection" if connection.waiting else "the peer hung up"
            self._end(connection, reason or refused, events)

    def _admit(self, sock: socket.socket, rings: SharedRings, events: list[Event]) -> None:
        with contextlib.suppress(OSError):  # gone already; what it has sent still counts
            sock.send(BELL)
        connection = ShmConnection(self, sock, rings, peer=f"{self.scheme}:{_process_of(sock)}", connecting=False)
        self._adopt(connection)
        self._awake.add(connection)
        events.append(Accepted(connection, rings.hello()))
        reason = self._read_ring(connection, events)
        if reason:
            self._end(connection, reason, events)


class _RingWatch:
    """Looks at the rings of connections until one of them has something."""

    def __init__(self) -> None:
        self._connections: list[ShmConnection] = []
        self._also = -1
        self._compiled_watch: ConnectionWatch | None = None  # of these connections, where it is compiled

    def look(self, connections: list[ShmConnection], also: int, awake_s: float) -> tuple[int, Watched]:
        """Answers how many queries have been answered meanwhile, and why it looks no more.

        Args:
            also: as in ``arm``.
            awake_s: for how long at most, after the last such query.
        """
        if _COMPILED:
            return self._look(connections, also, awake_s)
        until = time.perf_counter() + awake_s
        while time.perf_counter() < until:
            if any(connection.reader.pending() for connection in connections):
                return 0, Watched.CHANGED
            os.sched_yield()  # whom we wait for may need this core
        return 0, Watched.TIMEOUT

    def _look(self, connections: list[ShmConnection], also: int, awake_s: float) -> tuple[int, Watched]:
        if self._compiled_watch is None or also != self._also or connections != self._connections:
            self._connections, self._also = connections, also
            self._compiled_watch = ConnectionWatch([connection.reader.published for connection in connections], also)
        lent = [connection.lend_rings() for connection in connections]
        before = [0 if queries is None else queries.answered for queries in lent]
        ending = self._compiled_watch.watch([connection.reader.taken for connection in connections], lent, awake_s)
        answered = 0
        for connection, queries, count in zip(connections, lent, before, strict=True):
            if queries is not None:
                connection.take_rings_back(queries)
                answered += queries.answered - count
        return answered, ending


def _process_of(sock: socket.socket) -> str:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # pid, uid, gid
    return f"pid-{int.from_bytes(credentials[:4], 'little')}"
