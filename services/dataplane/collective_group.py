"""Groups of torch.distributed with two members, made without a default group, and transfers in one direction.

Everything here but ``abort`` blocks; it is for a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Store, Work
from torch.distributed import is_nccl_available

from services.core.errors import ConfigError

FORM_TIMEOUT_S = 30.0
# A transfer waits for a peer that is stopped or busy until the connection is closed; this only bounds a forgotten one.
_TRANSFER_TIMEOUT = timedelta(hours=1)
_AT_ONCE = timedelta(milliseconds=1)
_NCCL_GLANCES = 200  # looks at a transfer before the thread begins to sleep between two of them
_NCCL_NAP_S = 50e-6


class TorchGroup(Protocol):
    """What is used of a process group; torch's stubs do not know all of it."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> Work: ...

    def abort(self) -> None: ...


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
    def join(self, store: Store, rank: int, host: str) -> PairGroup:
        """Joins the group of two that meets in this store. The other member is about to do the same.

        Args:
            rank: 0 or 1.
            host: numeric address of this machine on the way to the other member.

        Raises:
            RuntimeError: the other member did not come, or the store is gone.
        """


class GlooBackend(PairBackend):
    """Groups over TCP between CPUs."""

    name = "gloo"

    def join(self, store: Store, rank: int, host: str) -> PairGroup:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs know it by another name
        options._timeout = timedelta(seconds=FORM_TIMEOUT_S)
        # On the interface that leads to the peer, and on no other.
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._threads = 1  # for collectives, which there are none of
        group = ProcessGroupGloo(store, rank, 2, options)
        return GlooGroup(cast(TorchGroup, group), 1 - rank)


class GlooGroup(PairGroup):
    """Gloo closes a pair when a wait for one of its transfers times out; this is how one is aborted."""

    def __init__(self, group: TorchGroup, peer: int) -> None:
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

    def join(self, store: Store, rank: int, host: str) -> PairGroup:
        from torch._C._distributed_c10d import ProcessGroupNCCL  # a torch for CPUs has none

        options = ProcessGroupNCCL.Options()
        options._timeout = _TRANSFER_TIMEOUT
        group = ProcessGroupNCCL(store, rank, 2, options)
        return NcclGroup(cast(TorchGroup, group), 1 - rank, self._device)


class NcclGroup(PairGroup):
    """The first transfer makes the communicator."""

    def __init__(self, group: TorchGroup, peer: int, device: torch.device) -> None:
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
