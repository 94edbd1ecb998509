"""A process at the other end of a shm connection: ``shm_peer.py SOCKET_PATH MODE``.

It prints its address once it listens. ``echo`` sends every message back; ``flood`` sends to everyone who connects until
that breaks the window.
"""

import contextlib
import sys
from pathlib import Path

from services.core.errors import PeerLostError
from services.dataplane.shm import ShmTransport
from services.dataplane.transport import Accepted, Received


def main(path, mode):
    transport = ShmTransport(Path(path))
    print(transport.listen(), flush=True)
    guests = []
    while True:
        for event in transport.poll(0.0 if mode == "flood" and guests else 60.0):
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
