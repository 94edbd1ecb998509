"""What a leader and a rank say to each other, over a socket that only the two of them have.

The leader's orders and a rank's ends of steps are pickled: both are the same program, and one has started the other.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from services.core.errors import PeerLostError, TransferTimeoutError
from services.dataplane.peers import LostPeer
from services.instance.batch import Batch


@dataclass(frozen=True, slots=True)
class DaemonAddress:
    """Where a rank finds a daemon of the step, as its leader does, and in whose session."""

    kvdaemon_id: str
    address: str
    session_id: int


@dataclass(frozen=True, slots=True)
class StepOrder:
    """One step.

    Attributes:
        daemons: those of the batch's shares to which the leader is connected.
        forgotten: (daemon, segment) that no plan will name again.
    """

    step: int
    batch: Batch
    daemons: tuple[DaemonAddress, ...]
    forgotten: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A rank has computed a step.

    Attributes:
        failure: why the step is void; "" if it is not.
        lost: daemons whose connections have ended since the last step.
    """

    step: int
    failure: str
    lost: tuple[LostPeer, ...]


class RankChannel:
    """One end of the socket between a leader and a rank. Used by one thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._connection = Connection(fd)

    def send(self, message: object) -> None:
        """
        Raises:
            PeerLostError: the other side is gone.
        """
        data = io.BytesIO()
        _Pickler(data, pickle.HIGHEST_PROTOCOL).dump(message)
        try:
            self._connection.send_bytes(data.getbuffer())
        except OSError as error:
            raise PeerLostError(f"the other side is gone: {error.strerror}") from error

    def receive(self, timeout_s: float | None) -> object:
        """Waits for the next message; None: for as long as it takes.

        Raises:
            PeerLostError: the other side is gone.
            TransferTimeoutError: it has sent nothing.
        """
        try:
            if not self._connection.poll(timeout_s):
                raise TransferTimeoutError(f"no message within {timeout_s:g} s")
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise PeerLostError("the other side is gone") from error

    def send_files(self, fds: Sequence[int]) -> None:
        """Passes open files on; this process keeps its own."""
        with socket.socket(fileno=os.dup(self._fd)) as sock:
            socket.send_fds(sock, [b"f"], fds)

    def receive_files(self, count: int) -> list[int]:
        """
        Raises:
            PeerLostError: the other side is gone.
        """
        with socket.socket(fileno=os.dup(self._fd)) as sock:
            _, fds, _, _ = socket.recv_fds(sock, 1, count, socket.MSG_CMSG_CLOEXEC)
        if len(fds) != count:
            raise PeerLostError("the other side is gone")
        return list(fds)

    def close(self) -> None:
        self._connection.close()


class _Pickler(pickle.Pickler):
    """Tensors as the arrays of numpy that they share memory with: torch's own way is slower than a small step."""

    def reducer_override(self, obj: object) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, Tensor) else NotImplemented
