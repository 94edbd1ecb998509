"""NIXL, as far as the rdma transport needs it: memory that others write, and requests that write others' memory.

NIXL is an optional dependency (``pip install infinite-llm[rdma]``) and is imported when the first agent is made. UCX
below it chooses the way for each peer: InfiniBand or RoCE, shared memory, TCP. Where a way has no hardware that writes
remote memory, NIXL's progress thread does it, which sleeps until something comes. (That is why NIXL's bindings are used
and not its Python classes: these set the thread's delay to 0, and it never sleeps. They also log to stdout.)
"""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import uuid
from ctypes import addressof, c_char
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.memfd import available_bytes

_ADAPTERS = Path("/dev/infiniband")
_PAGE = 4096
_THREAD_DELAY_US = 10_000  # the longest sleep of the progress thread; what comes wakes it


def is_worthwhile() -> bool:
    """Whether NIXL is installed, and there is an RDMA adapter that this process may use.

    Without an adapter UCX writes remote memory over TCP, by threads: slower than messages over TCP are.
    """
    adapters = _ADAPTERS.glob("uverbs*")
    return any(os.access(adapter, os.R_OK | os.W_OK) for adapter in adapters) and _is_installed()


def _is_installed() -> bool:
    return importlib.util.find_spec("nixl_cu12") is not None


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory. The bytes live for as long as anybody has a view of them, registered or not."""

    data: memoryview
    address: int


Request = int  # a write that can be posted again and again


class NixlAgent:
    """One process's end of all its RDMA connections. Owned by one thread.

    Raises:
        ConfigError: NIXL is not installed, or cannot start.
    """

    def __init__(self) -> None:
        try:
            from nixl_cu12 import _bindings as bindings
        except ImportError as error:
            raise ConfigError(f"the rdma transport needs NIXL: pip install infinite-llm[rdma] ({error})") from error
        self.name = uuid.uuid4().hex
        self._nixl = bindings
        config = bindings.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _THREAD_DELAY_US
        config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
        try:
            self._agent = bindings.nixlAgent(self.name, config)
            self._agent.createBackend("UCX", {})
        except Exception as error:  # NIXL's errors have no base of their own, here and below
            raise ConfigError(f"NIXL cannot start on this machine: {error}") from error
        self._known: dict[str, int] = {}  # how many connections lead to an agent

    def register(self, size: int) -> Region:
        """Zeroed, registered memory of at least ``size`` bytes.

        Raises:
            PeerLostError: there is not enough memory, or it cannot be registered.
        """
        size = (size + _PAGE - 1) & -_PAGE
        try:
            available = available_bytes()
            memory = mmap.mmap(-1, size) if size <= available else None
        except (ConfigError, OSError, ValueError, OverflowError) as error:
            raise PeerLostError(f"no memory for messages: {error}") from error
        if memory is None:
            raise PeerLostError(
                f"no memory for messages: {size >> 20} MiB are needed, {available >> 20} MiB are available"
            )
        region = Region(memoryview(memory), addressof(c_char.from_buffer(memory)))
        try:
            self._agent.registerMem(self._registration(region), [])
        except Exception as error:
            raise PeerLostError(f"{size >> 20} MiB of memory cannot be registered (ulimit -l?): {error}") from error
        return region

    def deregister(self, region: Region) -> None:
        """Nobody writes it from now on."""
        with contextlib.suppress(Exception):
            self._agent.deregisterMem(self._registration(region), [])

    def describe(self, region: Region) -> bytes:
        """What another agent needs to write into the region."""
        description: bytes = self._agent.getLocalPartialMD(self._registration(region), True, [])
        return description

    def meet(self, name: str, description: bytes) -> None:
        """Learns of a region of the agent ``name``; ``part`` follows once for each call.

        Raises:
            PeerLostError: this is no description of its, or there is no way to the peer.
        """
        if name != self.name:  # a transport may connect to itself
            try:
                described = self._agent.loadRemoteMD(description).decode()
            except Exception as error:
                raise PeerLostError(f"NIXL finds no way to the peer: {error}") from error
            if described != name:
                raise PeerLostError("the peer introduced itself as another")
        self._known[name] = self._known.get(name, 0) + 1

    def part(self, name: str) -> None:
        """One connection to the peer less."""
        self._known[name] -= 1
        if not self._known[name]:
            del self._known[name]
            if name != self.name:
                with contextlib.suppress(Exception):
                    self._agent.invalidateRemoteMD(name)

    def prepare(self, local: int, remote: int, size: int, peer: str) -> Request:
        """A request that writes ``size`` bytes from one address to the peer's other, as often as it is posted.

        Raises:
            PeerLostError: the peer has registered no such memory.
        """
        nixl = self._nixl
        try:
            request: Request = self._agent.createXferReq(
                nixl.NIXL_WRITE,
                nixl.nixlXferDList(nixl.DRAM_SEG, [(local, size, 0)]),
                nixl.nixlXferDList(nixl.DRAM_SEG, [(remote, size, 0)]),
                peer,
                b"",
                [],
            )
        except Exception as error:
            raise PeerLostError(f"the peer's memory cannot be written: {error}") from error
        return request

    def post(self, request: Request, notification: bytes) -> bool:
        """Begins to write; the peer is notified after the last byte. Answers whether the write is complete.

        Raises:
            PeerLostError: the way to the peer is broken.
        """
        try:
            return self._is_done(self._agent.postXferReq(request, notification))
        except Exception as error:
            raise PeerLostError(f"a write failed: {error}") from error

    def is_done(self, request: Request) -> bool:
        """Whether a posted write is complete. The peer may be notified only when this has been called.

        Raises:
            PeerLostError: the way to the peer is broken.
        """
        try:
            return self._is_done(self._agent.getXferStatus(request))
        except Exception as error:
            raise PeerLostError(f"a write failed: {error}") from error

    def release(self, request: Request) -> None:
        """Gives a request up, even if it is under way."""
        with contextlib.suppress(Exception):
            self._agent.releaseXferReq(request)

    def notifications(self) -> list[bytes]:
        """What has come since the last call, from all peers; of one peer in any order."""
        try:
            by_peer: dict[str, list[bytes]] = self._agent.getNotifs({}, [])
        except Exception:
            return []  # a peer has broken off, which its socket tells
        return [notification for of_peer in by_peer.values() for notification in of_peer] if by_peer else []

    def close(self) -> None:
        """Ends everything; what is registered is so no more. Nothing may follow."""
        del self._agent

    def _registration(self, region: Region) -> object:
        return self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(region.address, len(region.data), 0, "")])

    def _is_done(self, status: object) -> bool:
        if status == self._nixl.NIXL_SUCCESS:
            return True
        if status != self._nixl.NIXL_IN_PROG:
            raise PeerLostError(str(status))
        return False
