"""Groups of torch.distributed with two members, made without a default group: one for each direction of a connection.

Two directions are two groups, because NCCL runs the operations of a group in order: two members that both send first
would wait for each other for ever. The members meet in a store, under a key that holds the connection's generation, so
a member that comes late, for a connection that has ended, finds nobody.

Everything here but ``abort`` blocks; it is for a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import Backend, PrefixStore, Store, TCPStore, Work
from torch.distributed.distributed_c10d import ProcessGroupGloo, is_nccl_available

from services.core.errors import ConfigError

FORM_TIMEOUT_S = 30.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1e-3, 0.05  # between two looks for the other member
# A transfer waits for a peer that is stopped or busy until the connection is closed; this only bounds a forgotten one.
_TRANSFER_TIMEOUT = timedelta(hours=1)
_AT_ONCE = timedelta(milliseconds=1)
_NCCL_GLANCES = 200  # looks at a transfer before the thread begins to sleep between two of them
_NCCL_NAP_S = 50e-6


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where and as whom a member joins a group.

    Attributes:
        store_host: numeric address of the store's server.
        store_port: its port.
        key: the group's prefix in the store.
        rank: 0 for the side that has connected, 1 for the one that has accepted.
        server: keeps the store's server alive where it is this process's; else None.
    """

    store_host: str
    store_port: int
    key: str
    rank: int
    server: TCPStore | None


class PairGroup(ABC):
    """A group that this member sends to, or receives from, in order. ``abort`` may be called from any thread."""

    @abstractmethod
    def send(self, data: torch.Tensor) -> None:
        """Returns when the data [bytes] uint8 on the CPU have been taken.

        Raises:
            RuntimeError: the group is broken or aborted.
        """

    @abstractmethod
    def receive(self, data: torch.Tensor) -> None:
        """Returns when the data [bytes] uint8 on the CPU have been filled.

        Raises:
            RuntimeError: the group is broken or aborted.
        """

    @abstractmethod
    def abort(self) -> None:
        """Ends the transfer under way, and all others before they begin, with an error."""


class PairBackend(ABC):
    """Makes the groups of one transport."""

    name: str

    @abstractmethod
    def join(self, meeting: Meeting, aborted: threading.Event) -> PairGroup:
        """Waits for the other member until that is aborted.

        Raises:
            RuntimeError: it did not come, or the store is gone.
            OSError: there is no way to it.
        """


class GlooBackend(PairBackend):
    """Groups over TCP between CPUs."""

    name = "gloo"

    def join(self, meeting: Meeting, aborted: threading.Event) -> PairGroup:
        store = _meet(meeting, aborted)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs know it by another name
        options._timeout = timedelta(seconds=FORM_TIMEOUT_S)
        # On the interface that leads to the peer, and on no other.
        options._devices = [ProcessGroupGloo.create_device(hostname=local_host(meeting.store_host, meeting.store_port))]
        options._threads = 1  # for collectives, which there are none of
        group = ProcessGroupGloo(store, meeting.rank, 2, options)
        return GlooGroup(group, 1 - meeting.rank)


class GlooGroup(PairGroup):
    """Gloo closes a pair when a wait for one of its transfers times out; this is how one is aborted."""

    def __init__(self, group: Backend, peer: int) -> None:
        self._group = group
        self._peer = peer
        self._lock = threading.Lock()
        self._aborted = False
        self._work: Work | None = None  # the transfer under way

    def send(self, data: torch.Tensor) -> None:
        self._transfer(data, is_send=True)

    def receive(self, data: torch.Tensor) -> None:
        self._transfer(data, is_send=False)

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            work = self._work
        if work is not None:
            with contextlib.suppress(RuntimeError):
                work.wait(_AT_ONCE)

    def _transfer(self, data: torch.Tensor, is_send: bool) -> None:
        post = self._group.send if is_send else self._group.recv
        with self._lock:
            if self._aborted:
                raise RuntimeError("the group has been aborted")
            work = self._work = post([data], self._peer, 0)
        try:
            work.wait(_TRANSFER_TIMEOUT)
        finally:
            self._work = None


class NcclBackend(PairBackend):
    """Groups between GPUs: each message is copied to this process's GPU, sent to the peer's, and copied from there.

    NCCL refuses two members on one GPU.

    Raises:
        ConfigError: this torch has no NCCL, or there is no GPU.
    """

    name = "nccl"

    def __init__(self, device: torch.device) -> None:
        if not is_nccl_available():
            raise ConfigError("the nccl transport needs a torch with NCCL; this one has none")
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError(f"the nccl transport needs a GPU, and {device} is none that can be used")
        self._device = device
        # Read when a group is made: an error aborts the group's communicators and leaves the process alone (2 is
        # CleanUpOnly), and no monitor ends the process because a peer or its store does not answer.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"
        os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"

    def join(self, meeting: Meeting, aborted: threading.Event) -> PairGroup:
        from torch.distributed.distributed_c10d import ProcessGroupNCCL  # a torch for CPUs has none

        store = _meet(meeting, aborted)
        options = ProcessGroupNCCL.Options()
        options._timeout = _TRANSFER_TIMEOUT
        group = ProcessGroupNCCL(store, meeting.rank, 2, options)
        return NcclGroup(group, 1 - meeting.rank, self._device)


class NcclGroup(PairGroup):
    """The first transfer makes the communicator."""

    def __init__(self, group: Backend, peer: int, device: torch.device) -> None:
        self._group = group
        self._peer = peer
        self._device = device
        self._aborted = threading.Event()

    def send(self, data: torch.Tensor) -> None:
        with torch.cuda.device(self._device):
            staged = data.to(self._device)
            self._await(self._group.send([staged], self._peer, 0))

    def receive(self, data: torch.Tensor) -> None:
        with torch.cuda.device(self._device):
            staged = torch.empty_like(data, device=self._device)
            self._await(self._group.recv([staged], self._peer, 0))
            data.copy_(staged)

    def abort(self) -> None:
        self._aborted.set()

    def _await(self, work: Work) -> None:
        """Its own ``wait`` would only make a stream wait, and would not see an abort."""
        glances = 0
        while not work.is_completed():
            if self._aborted.is_set():
                self._group.abort()
                raise RuntimeError("the group has been aborted")
            glances += 1
            if glances > _NCCL_GLANCES:
                time.sleep(_NCCL_NAP_S)
        work.wait()  # raises what has gone wrong


def open_store_server(host: str) -> TCPStore:
    """A store that others reach at ``host``, and at no other address of this machine.

    Raises:
        OSError: nothing can listen there.
        RuntimeError: the server did not start.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        return TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=FORM_TIMEOUT_S),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def local_host(host: str, port: int) -> str:
    """Numeric address of this machine on the way to a peer's.

    Raises:
        OSError: there is no way to it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((host, port))
        own: str = probe.getsockname()[0]
        return own


def _meet(meeting: Meeting, aborted: threading.Event) -> Store:
    """The group's part of the store, once both members are there: until then nothing waits that cannot be aborted."""
    server = TCPStore(
        meeting.store_host,
        meeting.store_port,
        is_master=False,
        timeout=timedelta(seconds=FORM_TIMEOUT_S),
        wait_for_workers=False,
    )
    store = PrefixStore(meeting.key, server)
    store.set(f"member{meeting.rank}", "here")
    pause_s = _FIRST_PAUSE_S
    while not store.check([f"member{1 - meeting.rank}"]):
        if aborted.wait(pause_s):
            raise RuntimeError("the group has been aborted")
        pause_s = min(2 * pause_s, _LAST_PAUSE_S)
    return store
