"""One end of a TCP connection of the data plane: whole messages out and in, and queries in compiled code.

``TcpTransport`` says when its socket is ready.
"""

from __future__ import annotations

import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from ctypes import addressof, c_char

from kernels.cpu.answering import CompiledQueries, Watched
from kernels.cpu.asking import CompiledAsker
from kernels.cpu.library import Channel, StreamView, find_library
from services.core.errors import PeerLostError
from services.dataplane.socket_transport import SocketConnection
from services.dataplane.stream import Stream
from services.dataplane.tcp_frames import (
    FrameMessage,
    FrameReader,
    charge_of,
    frame,
    frame_bytes,
    frame_memory,
    report,
)
from services.dataplane.tcp_greeting import ANSWER, why_no_answer
from services.dataplane.transport import (
    Buffer,
    Connected,
    Event,
    Limits,
    Message,
    Received,
    ReleaseHook,
    message_bytes,
)

_MOST_OUTSTANDING = 4  # windows that may seem to be outstanding before the sender calls the promise broken
_REPORT_PART = 4  # a report is due when this part of the window has been freed and not told
_MOST_BUFFERS = 1024  # of one sendmsg, IOV_MAX
_COMPILED = find_library() is not None


class TcpOwner(ABC):
    """What a connection asks of its transport."""

    @abstractmethod
    def lose(self, connection: TcpConnection, reason: str) -> None:
        """Ends it with an event, which the next ``poll`` answers."""

    @abstractmethod
    def forget(self, connection: TcpConnection) -> None:
        """Ends it without an event, if it has not ended before."""

    @abstractmethod
    def await_output(self, connection: TcpConnection) -> None:
        """The connection has bytes that its socket does not take."""

    @abstractmethod
    def await_report(self, connection: TcpConnection) -> None:
        """The connection has freed much. The next poll tells the peer, unless a message does so before."""

    @abstractmethod
    def take_answer(self, asker: CompiledAsker) -> bool:
        """Looks for an answer for as long as ``poll`` would stay awake."""

    @abstractmethod
    def lend(self, asker: CompiledAsker) -> None:
        """Compiled code will look for answers, as long as ``poll`` would stay awake."""

    @abstractmethod
    def take_back(self, asker: CompiledAsker) -> None:
        """Compiled code has looked for answers."""

    @abstractmethod
    def take_rest(self, connection: TcpConnection) -> None:
        """Compiled code has received something and left it."""


class TcpConnection(SocketConnection, ReleaseHook):
    """One end of a TCP connection; as a hook it takes its own received messages back.

    Args:
        answer_bytes: what is to come before the first frame, from the side that accepts.
    """

    def __init__(
        self,
        transport: TcpOwner,
        sock: Stream,
        reader: FrameReader,
        limits: Limits,
        peer: str,
        answer_bytes: int,
    ) -> None:
        self.limits = limits
        self.peer = peer
        self.sock = sock
        self.fd = sock.fileno()
        self.reader = reader
        self.unsent = bytearray()  # what the kernel has not taken
        self._transport = transport
        self._ended = False
        self._answer = b""
        self._answer_bytes = answer_bytes
        self._sent = 0  # charges of all messages
        self._reported = 0  # charges freed that the peer has been told of
        self._out: memoryview | None = None  # room for a frame that compiled code sends
        self._queries: CompiledQueries | None = None
        self.can_ask = self.can_answer = _COMPILED and isinstance(sock, socket.socket)

    @property
    def accepted(self) -> bool:
        """Whether the other side has taken the connection; nothing but its answer comes before."""
        return len(self._answer) == self._answer_bytes

    def send(self, parts: Sequence[Buffer]) -> None:
        size = message_bytes(parts, self.limits, self.peer)
        if self._ended:
            raise PeerLostError(f"the connection to {self.peer} has ended")
        self._sent += charge_of(size)
        if self._sent - self.reader.freed_by_peer > _MOST_OUTSTANDING * self.limits.window_bytes:
            reason = f"a message of {size} bytes does not fit the peer's window"
            self._transport.lose(self, reason)
            raise PeerLostError(reason)
        self._reported = self.reader.freed
        self.transmit(frame(parts, size, self._reported))

    def transmit(self, buffers: Sequence[Buffer]) -> None:
        """Hands bytes to the kernel and keeps a copy of those that it does not take."""
        sent = 0
        if not self.unsent:
            if len(buffers) > _MOST_BUFFERS:
                buffers = [b"".join(buffers)]
            try:
                sent = self.sock.sendmsg(buffers)
            except BlockingIOError:
                pass
            except OSError:
                return  # hung up: poll says so, after what the peer has sent before
        for part in buffers:
            size = memoryview(part).nbytes
            if sent < size:
                self.unsent += memoryview(part).cast("B")[sent:] if sent else part
            sent = max(0, sent - size)
        if self.unsent:
            self._transport.await_output(self)

    def flush(self) -> None:
        """Hands on what the kernel has not taken before."""
        try:
            while self.unsent:
                del self.unsent[: self.sock.send(self.unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.unsent.clear()  # as in transmit

    def receive(self, events: list[Event]) -> str:
        """Takes what has arrived. Answers why the connection must end, or nothing."""
        try:
            if not self.accepted and not self._receive_answer(events):
                return ""
            if not self.reader.receive(self.sock):
                return "the peer hung up"
        except BlockingIOError:
            return ""
        except PeerLostError as error:
            return str(error)
        except OSError as error:
            return f"{'the connection broke' if self.accepted else 'not connected'}: {error.strerror}"
        return self.take_messages(events)

    def take_messages(self, events: list[Event]) -> str:
        """Takes the messages that have been received in full. Answers why the connection must end, or nothing."""
        try:
            while (message := self.reader.next(self)) is not None:
                events.append(Received(self, message))
        except PeerLostError as error:
            return str(error)
        if self.reader.freed_by_peer > self._sent:
            return f"the peer sent an impossible count of freed bytes: {self.reader.freed_by_peer}"
        return ""

    def answer_with(self, queries: CompiledQueries | None) -> None:
        self._queries = queries if queries is not None and self._bind(queries.channel) else None

    def ask_with(self, asker: CompiledAsker) -> None:
        self._bind(asker.channel)

    def ask(self, asker: CompiledAsker, sequence: int) -> int:
        stream = asker.channel.stream
        if self._ended or self.unsent or not stream.out:
            return 0
        self._lend_counts(stream)
        sent = asker.ask(sequence)
        self._take_counts_back(stream)
        return sent

    def take_answer(self, asker: CompiledAsker) -> bool:
        stream = asker.channel.stream
        if self._ended or not self.accepted or self.reader.held or not stream.out:
            return False
        self._lend_counts(stream)
        self.reader.lend(stream)
        taken = self._transport.take_answer(asker)
        self.reader.take_back(stream)
        self._check_report()
        if not taken:
            self._transport.take_rest(self)
        return taken

    def lend(self, asker: CompiledAsker) -> bool:
        stream = asker.channel.stream
        if self._ended or self.unsent or not self.accepted or self.reader.held or not stream.out:
            return False
        self._lend_counts(stream)
        self.reader.lend(stream)
        self._transport.lend(asker)
        return True

    def take_back(self, asker: CompiledAsker) -> None:
        stream = asker.channel.stream
        self.reader.take_back(stream)
        self._take_counts_back(stream)
        self._check_report()
        self._transport.take_back(asker)
        if asker.ending is not Watched.TAKEN:
            self._transport.take_rest(self)

    @property
    def answers(self) -> bool:
        """Whether there is anything that compiled code may answer."""
        return self._queries is not None

    def lend_stream(self) -> CompiledQueries | None:
        """What compiled code may answer until ``take_stream_back``."""
        queries = self._queries
        if queries is None or self._ended or self.unsent or not self.accepted or self.reader.held:
            return None
        self._lend_counts(queries.channel.stream)
        self.reader.lend(queries.channel.stream)
        return queries

    def take_stream_back(self, queries: CompiledQueries) -> None:
        self.reader.take_back(queries.channel.stream)
        self._take_counts_back(queries.channel.stream)

    def _bind(self, channel: Channel) -> bool:
        """Says where messages are received and sent; answers whether they can be."""
        if self._out is None and not self._ended:
            with contextlib.suppress(PeerLostError):  # no memory: all is left to ``send``
                self._out = frame_memory(frame_bytes(self.limits.max_message_bytes))
        if self._out is None or self._ended:
            return False
        channel.max_message, channel.fd, channel.is_stream = self.limits.max_message_bytes, self.fd, 1
        channel.stream.out = addressof(c_char.from_buffer(self._out))
        channel.stream.most_outstanding = _MOST_OUTSTANDING * self.limits.window_bytes
        self.reader.bind(channel.stream)
        return True

    def _lend_counts(self, stream: StreamView) -> None:
        stream.sent, stream.reported = self._sent, self._reported
        stream.freed, stream.freed_by_peer = self.reader.freed, self.reader.freed_by_peer

    def _take_counts_back(self, stream: StreamView) -> None:
        self._sent, self._reported = stream.sent, stream.reported
        if stream.unsent:
            assert self._out is not None
            self.unsent += self._out[stream.unsent_at :][: stream.unsent]
            stream.unsent = 0
            self._transport.await_output(self)

    def report(self) -> None:
        """Tells the peer what has been freed, unless a message has done so."""
        if not self._ended and self.reader.freed > self._reported:
            self._reported = self.reader.freed
            self.transmit(report(self._reported))

    def end(self) -> None:
        self.leave().close()
        self.unsent.clear()
        if not self.reader.held:
            self.reader.discard()

    def leave(self) -> Stream:
        """Ends the connection but for its socket, which the caller takes over with ``unsent``."""
        self._ended = True
        return self.sock

    def close(self) -> None:
        self._transport.forget(self)
        self.reader.discard()

    def __call__(self, message: Message) -> None:
        assert isinstance(message, FrameMessage)
        self.reader.free(message)
        self._check_report()

    def _check_report(self) -> None:
        unreported = self.reader.freed - self._reported
        if unreported * _REPORT_PART >= self.limits.window_bytes and not self._ended:
            self._transport.await_report(self)

    def _receive_answer(self, events: list[Event]) -> bool:
        """Whether the other side's answer is complete; then the connection is."""
        data = self.sock.recv(self._answer_bytes - len(self._answer))
        self._answer += data
        if not data:
            raise PeerLostError("the peer ended before it accepted the connection")
        if not ANSWER.startswith(self._answer):
            raise PeerLostError(why_no_answer(self._answer))
        if not self.accepted:
            return False
        events.append(Connected(self))
        return True
