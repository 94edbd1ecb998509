"""NIXL, as far as the rdma transport needs it: memory that others write, and requests that write others' memory.

NIXL is an optional dependency (``pip install infinite-llm[rdma]``) and is imported when the first agent is made. UCX
below it chooses the way for each peer: InfiniBand or RoCE, shared memory, TCP. Where a way has no hardware that writes
remote memory, NIXL's progress thread does it, which sleeps while nothing comes.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import uuid
from ctypes import addressof, c_char
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.memfd import available_bytes

if TYPE_CHECKING:
    from nixl_cu12 import nixl_agent, nixl_xfer_handle

_MEMORY = "DRAM"
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory. The bytes live for as long as anybody has a view of them, registered or not."""

    data: memoryview
    address: int
    registration: object


class NixlAgent:
    """One process's end of all its RDMA connections. Owned by one thread.

    Raises:
        ConfigError: NIXL is not installed, or cannot start.
    """

    def __init__(self) -> None:
        try:
            from nixl_cu12 import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise ConfigError(f"the rdma transport needs NIXL: pip install infinite-llm[rdma] ({error})") from error
        if "NIXL_LOG_LEVEL" not in os.environ:
            logging.getLogger("nixl").setLevel(logging.WARNING)  # it would greet on stdout
        self.name = uuid.uuid4().hex
        try:
            self._agent: nixl_agent = nixl_agent(self.name, nixl_agent_config(backends=["UCX"]))
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
            if size > available:
                raise PeerLostError(
                    f"no memory for messages: {size >> 20} MiB are needed, {available >> 20} MiB are available"
                )
            memory = mmap.mmap(-1, size)
            address = addressof(c_char.from_buffer(memory))
            registration = self._agent.register_memory([(address, size, 0, "")], _MEMORY)
        except (ConfigError, OSError) as error:
            raise PeerLostError(f"no memory for messages: {error}") from error
        except PeerLostError:
            raise
        except Exception as error:
            raise PeerLostError(f"{size >> 20} MiB of memory cannot be registered (ulimit -l?): {error}") from error
        return Region(memoryview(memory), address, registration)

    def deregister(self, region: Region) -> None:
        """Nobody writes it from now on."""
        with contextlib.suppress(Exception):
            self._agent.deregister_memory(region.registration)

    def describe(self, region: Region) -> bytes:
        """What another agent needs to write into the region."""
        description: bytes = self._agent.get_partial_agent_metadata(region.registration, inc_conn_info=True)
        return description

    def meet(self, description: bytes) -> str:
        """Learns of a peer's region and answers the peer's name; ``part`` follows once for each call.

        Raises:
            PeerLostError: this is no description, or there is no way to the peer.
        """
        try:
            # An agent is its own peer where a transport connects to itself, and refuses to be introduced.
            name = self._agent.add_remote_agent(description) if self.name.encode() not in description else self.name
        except Exception as error:
            raise PeerLostError(f"NIXL finds no way to the peer: {error}") from error
        name = name.decode() if isinstance(name, bytes) else name
        self._known[name] = self._known.get(name, 0) + 1
        return name

    def part(self, name: str) -> None:
        """One connection to the peer less."""
        self._known[name] -= 1
        if not self._known[name]:
            del self._known[name]
            if name != self.name:
                with contextlib.suppress(Exception):
                    self._agent.remove_remote_agent(name)

    def prepare(self, local: int, remote: int, size: int, peer: str) -> nixl_xfer_handle:
        """A request that writes ``size`` bytes from one address to the peer's other, as often as it is posted.

        Raises:
            PeerLostError: the peer has registered no such memory.
        """
        try:
            return self._agent.initialize_xfer(
                "WRITE",
                self._agent.get_xfer_descs([(local, size, 0)], _MEMORY),
                self._agent.get_xfer_descs([(remote, size, 0)], _MEMORY),
                peer,
            )
        except Exception as error:
            raise PeerLostError(f"the peer's memory cannot be written: {error}") from error

    def post(self, request: nixl_xfer_handle, notification: bytes) -> bool:
        """Begins to write; the peer is notified after the last byte. Answers whether the write is complete.

        Raises:
            PeerLostError: the way to the peer is broken.
        """
        try:
            return _is_done(self._agent.transfer(request, notification))
        except PeerLostError:
            raise
        except Exception as error:
            raise PeerLostError(f"a write failed: {error}") from error

    def is_done(self, request: nixl_xfer_handle) -> bool:
        """Whether a posted write is complete. NIXL may notify the peer only when this is called.

        Raises:
            PeerLostError: the way to the peer is broken.
        """
        try:
            return _is_done(self._agent.check_xfer_state(request))
        except PeerLostError:
            raise
        except Exception as error:
            raise PeerLostError(f"a write failed: {error}") from error

    def release(self, request: nixl_xfer_handle) -> None:
        """Gives a request up, even if it is under way."""
        with contextlib.suppress(Exception):
            request.release()

    def notifications(self) -> list[bytes]:
        """What has come since the last call, from all peers; of one peer in any order."""
        try:
            by_peer = self._agent.get_new_notifs()
        except Exception:
            return []  # a peer has broken off, which its socket tells
        return [notification for list_ in by_peer.values() for notification in list_]

    def close(self) -> None:
        """Ends everything; what is registered is so no more. Nothing may follow."""
        del self._agent


def _is_done(state: str) -> bool:
    if state == "ERR":
        raise PeerLostError("a write failed")
    return state == "DONE"
