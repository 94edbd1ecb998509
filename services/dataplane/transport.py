"""The one seam between the system and a network: ordered messages between two processes.

A ``Transport`` is one process's end of the data plane. One thread owns it: only ``wake`` may be called by others. It
listens, connects, and ``poll`` moves everything forward over all peers at once, so that a peer that is stopped or slow
never holds up another. Nothing else blocks.

A ``Connection`` carries whole messages of up to ``limits.max_message_bytes``, in order, both ways. Receive memory is
posted ahead: each side promises room for ``limits.window_bytes`` of messages that the other has sent and this side has
not released yet; a message's room is free once it and all messages before it are released. Keeping within that promise
is the sender's business (a request has one answer, so counting is easy); a sender that breaks it loses the connection.
A connection ends once, with one ``Lost`` event: hang-up, a broken frame or ``close``; after that ``send`` raises
``PeerLostError``. Receive memory is the connection's own and is never handed to another: what arrives late, for a
transfer that somebody has given up, lands where nobody reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.core.errors import ConfigError

if TYPE_CHECKING:
    from kernels.cpu.answering import CompiledQueries
    from kernels.cpu.asking import CompiledAsker

Buffer = bytes | bytearray | memoryview

MAX_HELLO_BYTES = 64 << 10
SMALLEST_CHARGE_BYTES = 256  # what a shorter message counts in the window


@dataclass(frozen=True, slots=True)
class Limits:
    """What one direction of a connection can hold.

    Attributes:
        max_message_bytes: the longest message.
        window_bytes: messages sent and not yet released by the receiver, together, each counted as at least
            ``SMALLEST_CHARGE_BYTES``; at least one longest message.
    """

    max_message_bytes: int
    window_bytes: int

    def __post_init__(self) -> None:
        if not 0 < self.max_message_bytes <= self.window_bytes:
            raise ConfigError(
                f"transport limits: max_message_bytes ({self.max_message_bytes}) must be positive and at most "
                f"window_bytes ({self.window_bytes})"
            )


def message_bytes(parts: Sequence[Buffer], limits: Limits, peer: str) -> int:
    """Size of a message.

    Raises:
        ValueError: it is longer than the limits allow.
    """
    size = 0
    for part in parts:
        size += part.nbytes if type(part) is memoryview else len(part)
    if size > limits.max_message_bytes:
        raise ValueError(f"a message of {size} bytes to {peer}: at most {limits.max_message_bytes} are allowed")
    return size


class Connection(ABC):
    """One peer. Created by ``Transport.connect`` or announced by ``Accepted``."""

    limits: Limits
    peer: str  # for messages and logs
    can_answer = False  # whether ``answer_with`` does anything
    can_ask = False  # whether ``ask_with`` does anything, and ``ask`` and ``take_answer`` may succeed

    @abstractmethod
    def send(self, parts: Sequence[Buffer]) -> None:
        """Posts one message, the parts joined. Returns at once; the parts may be reused.

        What cannot leave at once leaves in the polls that follow.

        Raises:
            PeerLostError: the connection has ended, or the message does not fit the peer's window (which ends it).
            ValueError: the message is longer than ``max_message_bytes``.
        """

    def answer_with(self, queries: CompiledQueries | None) -> None:
        """Lets compiled code answer these queries from now on, or none; what it leaves is received as ever."""
        assert queries is None, "this transport leaves all queries to its owner"

    def ask_with(self, asker: CompiledAsker) -> None:
        """Lets compiled code send queries and take their answers: ``ask`` and ``take_answer`` may follow."""
        assert self.can_ask, "this transport leaves all queries to its owner"

    def ask(self, asker: CompiledAsker, sequence: int) -> int:
        """Sends its query as message number ``sequence``; answers its bytes, or 0 where that is left to ``send``."""
        return 0

    def take_answer(self, asker: CompiledAsker) -> bool:
        """Merges the answer to the last query, if it is there or comes in a moment; else ``poll`` receives it."""
        return False

    def lend(self, asker: CompiledAsker) -> bool:
        """Lets compiled code ask and take answers by itself until ``take_back``; nothing else may be done meanwhile.
        Answers whether that can be now."""
        return False

    def take_back(self, asker: CompiledAsker) -> None:
        """Compiled code has asked: at most its last query has no answer yet, which ``poll`` receives."""
        assert self.can_ask, "this transport lends nothing"

    @abstractmethod
    def close(self) -> None:
        """Ends the connection. Messages of it that are not released become invalid. Idempotent; no event follows."""


class Message:
    """A received message. ``data`` stays valid until ``release``, which gives its room back to the sender."""

    __slots__ = ("_release", "data")

    def __init__(self, data: memoryview, release: ReleaseHook) -> None:
        self.data = data
        self._release: ReleaseHook | None = release

    def release(self) -> None:
        """Invalidates ``data``. Messages of a connection are released in any order; idempotent."""
        hook, self._release = self._release, None
        if hook is not None:
            hook(self)


class ReleaseHook(ABC):
    """How a backend takes a message's room back."""

    @abstractmethod
    def __call__(self, message: Message) -> None: ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """A peer has connected to this transport's address."""

    connection: Connection
    hello: bytes


@dataclass(frozen=True, slots=True)
class Connected:
    """A ``connect`` has been accepted by the other side's ``poll``; until then sent messages wait."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Received:
    """A whole message has arrived. Whoever takes the event releases the message."""

    connection: Connection
    message: Message


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection has ended for the reason given; it is the connection's last event."""

    connection: Connection
    reason: str


Event = Accepted | Connected | Received | Lost


class Transport(ABC):
    """One process's end of the data plane. See the module's docstring for who may call what."""

    scheme: str  # "shm", "tcp", ...: the part of an address before the first colon

    @property
    def schemes(self) -> tuple[str, ...]:
        """Those of addresses that it connects to, best first."""
        return (self.scheme,)

    @abstractmethod
    def listen(self) -> str:
        """Starts to accept peers and answers the address they connect to, scheme included."""

    @abstractmethod
    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        """Begins a connection; ``Connected`` or ``Lost`` follows from ``poll``. ``limits`` hold for both directions.

        Args:
            hello: up to ``MAX_HELLO_BYTES`` that the other side gets with ``Accepted``.

        Raises:
            PeerLostError: nobody listens there, or this side has no memory or descriptors for a connection.
            ConfigError: the address is of another scheme.
            ValueError: the hello is too long.
        """

    @abstractmethod
    def poll(self, timeout: float) -> list[Event]:
        """Moves all transfers forward; waits up to ``timeout`` seconds for the first event. 0 only looks."""

    @abstractmethod
    def wake(self) -> None:
        """Lets a ``poll`` that is waiting, or the next one, return at once. May be called from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Ends all connections and stops listening. Idempotent."""
