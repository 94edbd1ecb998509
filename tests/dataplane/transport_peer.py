"""A process at the other end of a connection: ``transport_peer.py LISTEN_AT MODE [PEER_TIMEOUT_S]``.

LISTEN_AT is ``shm:/path/of/socket``, ``tcp:HOST:PORT``, ``rdma:HOST:PORT``, ``gloo:HOST:PORT`` for torch.distributed
with gloo, or ``tls:/directory/of/its/identity`` for tcp with TLS, at a free port of this host.

It prints its address once it listens. ``echo`` sends every message back; ``flood`` sends to everyone who connects, a
message each millisecond, until that breaks the window.
"""

import contextlib
import sys
from pathlib import Path

from services.core.errors import PeerLostError
from services.dataplane.collective import CollectiveTransport
from services.dataplane.collective_group import GlooBackend
from services.dataplane.rdma import RdmaTransport
from services.dataplane.shm import ShmTransport
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_tls import TlsTcpTransport
from services.dataplane.transport import Accepted, Received
from services.runtime.tls import MutualTls


def main(listen_at, mode, peer_timeout_s="10"):
    scheme, _, place = listen_at.partition(":")
    if scheme == "shm":
        transport = ShmTransport(Path(place))
    elif scheme == "rdma":
        transport = RdmaTransport(place, peer_timeout_s=float(peer_timeout_s))
    elif scheme == "tls":
        identity = (Path(place) / name for name in ("ca.crt", "tls.crt", "tls.key"))
        transport = TlsTcpTransport(MutualTls(*identity), "127.0.0.1:0", peer_timeout_s=float(peer_timeout_s))
    elif scheme == "gloo":
        transport = CollectiveTransport(GlooBackend(), place, peer_timeout_s=float(peer_timeout_s))
    else:
        transport = TcpTransport(place, allow_insecure=True, peer_timeout_s=float(peer_timeout_s))
    print(transport.listen(), flush=True)
    guests = []
    while True:
        for event in transport.poll(0.001 if mode == "flood" and guests else 60.0):
            if isinstance(event, Accepted):
                guests.append(event.connection)
            elif isinstance(event, Received):
                if mode == "echo":
                    with contextlib.suppress(PeerLostError):
                        event.connection.send([event.message.data])
                event.message.release()
        if mode == "flood":
            for guest in list(guests):
                try:
                    guest.send([b"flood" * 1000])
                except PeerLostError:
                    guests.remove(guest)


if __name__ == "__main__":
    main(*sys.argv[1:])
