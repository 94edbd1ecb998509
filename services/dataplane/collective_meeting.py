"""Where the two sides of a connection meet to form its groups: a store that the connecting side keeps.

A connection has two groups, one for each direction, because NCCL runs the operations of a group in order: two members
that both send first would wait for each other for ever. Their keys hold the connection's generation, so a member that
comes late, for a connection that has ended, finds nobody.
"""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore

from services.dataplane.collective_group import FORM_TIMEOUT_S, PairBackend, PairGroup

_FIRST_PAUSE_S, _LAST_PAUSE_S = 1e-3, 0.05  # between two looks for the other member


class Meeting:
    """One side of it. Its lanes share it: the first to come forms both groups, in the order of the other side.

    So one connection to the store will do. Torch looks up the names of its ends, which may take as long as the resolver
    likes, so neither is it opened, nor the store, before a lane's thread comes.

    Args:
        rank: 0 for the side that has connected and keeps the store, 1 for the one that has accepted.
        host: numeric address of the store; one of IPv4 may be written as one of IPv6.
        port: its port.
        listener: what the store is to listen on, if it is kept here.
    """

    def __init__(self, rank: int, host: str, port: int, generation: int, listener: socket.socket | None = None) -> None:
        self.rank = rank
        self.host = host.removeprefix("::ffff:") if "." in host else host
        self.port = port
        self.generation = generation
        self._listener = listener
        self._lock = threading.Lock()
        self._store: TCPStore | None = None
        self._groups: dict[int, PairGroup] = {}  # formed and not taken, by the sender's rank

    @classmethod
    def called(cls, peer_host: str, peer_port: int, generation: int) -> Meeting:
        """One whose store this side keeps, at the address by which it reaches the peer, and at no other.

        Raises:
            OSError: there is no way to the peer.
        """
        host = _local_host(peer_host, peer_port)
        listener = socket.create_server((host, 0), family=_family(host))
        return cls(0, host, listener.getsockname()[1], generation, listener)

    def group(self, sender: int, backend: PairBackend, aborted: threading.Event) -> PairGroup:
        """The group that the member of this rank sends to. Each is taken once.

        Raises:
            RuntimeError: the other side did not come, or the store is gone, or this was aborted.
            OSError: there is no way to the store.
        """
        with self._lock:
            if sender not in self._groups:
                self._form(backend, aborted)
            return self._groups.pop(sender)

    def _form(self, backend: PairBackend, aborted: threading.Event) -> None:
        host = _local_host(self.host, self.port)
        if self._store is None:
            self._store = TCPStore(
                self.host,
                self.port,
                is_master=self._listener is not None,
                timeout=timedelta(seconds=FORM_TIMEOUT_S),
                wait_for_workers=False,
                master_listen_fd=None if self._listener is None else self._listener.detach(),
            )
        store = PrefixStore(f"pair/{self.generation}", self._store)
        store.set(f"side{self.rank}", "here")
        pause_s = _FIRST_PAUSE_S
        while not store.check([f"side{1 - self.rank}"]):  # until both are there, nothing waits that cannot be aborted
            if aborted.wait(pause_s):
                raise RuntimeError("the meeting has been aborted")
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        for sender in (0, 1):
            self._groups[sender] = backend.join(PrefixStore(f"from{sender}", store), self.rank, host)


def _local_host(host: str, port: int) -> str:
    """Numeric address of this machine on the way to a peer's."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((host, port))
        own: str = probe.getsockname()[0]
        return own


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
