"""Backends for the conformance suite, and what drives transports in tests.

To add a backend: write a class with ``new`` and ``nowhere`` and enter it in ``BACKENDS``.
"""

import socket
import time

import pytest
from authority import Authority, mutual_tls

from services.dataplane.collective import CollectiveTransport
from services.dataplane.collective_group import GlooBackend
from services.dataplane.composite import CompositeTransport
from services.dataplane.link import EmulatedLink
from services.dataplane.link_spec import LinkSpec
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.rdma import RdmaTransport
from services.dataplane.shm import ShmTransport
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_tls import TlsTcpTransport
from services.dataplane.transport import Accepted, Connected, Limits, Lost, Received

DEADLINE_S = 20.0
LIMITS = Limits(max_message_bytes=64 << 10, window_bytes=256 << 10)


class LoopbackBackend:
    def __init__(self, directory):
        self.hub = LoopbackHub()

    def new(self, name):
        return LoopbackTransport(self.hub, name)

    def nowhere(self):
        return "loopback:nobody"


class ShmBackend:
    def __init__(self, directory):
        self.directory = directory

    def new(self, name):
        return ShmTransport(self.directory / name)

    def nowhere(self):
        return f"shm:{self.directory}/nobody"

    def listen_at(self, name):
        return f"shm:{self.directory / name}"


class TcpBackend:
    def __init__(self, directory):
        pass

    def new(self, name):
        return TcpTransport("127.0.0.1:0")

    def nowhere(self):
        with socket.socket() as taken:  # a port that was free a moment ago
            taken.bind(("127.0.0.1", 0))
            return f"tcp:127.0.0.1:{taken.getsockname()[1]}"

    def listen_at(self, name):
        return "tcp:127.0.0.1:0"


class RdmaBackend(TcpBackend):
    def __init__(self, directory):
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed: pip install infinite-llm[rdma]")

    def new(self, name):
        return RdmaTransport("127.0.0.1:0")

    def nowhere(self):
        return super().nowhere().replace("tcp:", "rdma:")

    def listen_at(self, name):
        return "rdma:127.0.0.1:0"


class TlsBackend(TcpBackend):
    """All stations have a daemon's identity, which may listen and connect."""

    def __init__(self, directory):
        self.directory = directory / "tls"
        self.tls = mutual_tls(self.directory, Authority(), "kvdaemon.infinite-llm")

    def new(self, name):
        return TlsTcpTransport(self.tls, "127.0.0.1:0")

    def listen_at(self, name):
        return f"tls:{self.directory}"


class CollectiveBackend:
    """torch.distributed on CPUs: what nccl runs, with gloo."""

    def __init__(self, directory):
        self.nobody = TcpBackend(directory)

    def new(self, name):
        return CollectiveTransport(GlooBackend(), "127.0.0.1:0")

    def nowhere(self):
        return self.nobody.nowhere().replace("tcp:", "gloo:")

    def listen_at(self, name):
        return "gloo:127.0.0.1:0"


class CompositeBackend:
    """Two transports at once; all connections are of the first one's kind."""

    def __init__(self, first, second):
        self.first, self.second = first, second
        self.nowhere = first.nowhere

    def new(self, name):
        return CompositeTransport([self.first.new(name), self.second.new(name)])


class EmulatedBackend:
    """A link that takes no time."""

    def __init__(self, inner):
        self.inner = inner
        self.nowhere = inner.nowhere

    def new(self, name):
        return EmulatedLink(self.inner.new(name), LinkSpec(float("inf"), 0.0))


BACKENDS = {
    "loopback": LoopbackBackend,
    "shm": ShmBackend,
    "tcp": TcpBackend,
    "tls": TlsBackend,
    "gloo": CollectiveBackend,
    "rdma": RdmaBackend,
    "composite-shm": lambda directory: CompositeBackend(ShmBackend(directory), TcpBackend(directory)),
    "composite-tcp": lambda directory: CompositeBackend(TcpBackend(directory), ShmBackend(directory)),
    "composite-tls": lambda directory: CompositeBackend(TlsBackend(directory), ShmBackend(directory)),
    "composite-rdma": lambda directory: CompositeBackend(RdmaBackend(directory), ShmBackend(directory)),
    "emulated": lambda directory: EmulatedBackend(LoopbackBackend(directory)),
    "emulated-tcp": lambda directory: EmulatedBackend(TcpBackend(directory)),
    "emulated-tls": lambda directory: EmulatedBackend(TlsBackend(directory)),
}


class Station:
    """A transport and every event it has answered."""

    def __init__(self, transport):
        self.transport = transport
        self.address = transport.listen()
        self.events = []

    def poll(self, timeout=0.0):
        new = self.transport.poll(timeout)
        self.events += new
        return new

    def of(self, kind, connection=None):
        return [e for e in self.events if isinstance(e, kind) and (connection is None or e.connection is connection)]

    def messages(self, connection=None):
        return [event.message for event in self.of(Received, connection)]

    def take(self, connection=None):
        """Contents of what has arrived, released and forgotten."""
        taken = self.of(Received, connection)
        contents = []
        for event in taken:
            contents.append(bytes(event.message.data))
            event.message.release()
        self.events = [e for e in self.events if not any(e is t for t in taken)]
        return contents


class Net:
    """Stations of one backend, all driven by the test's thread."""

    def __init__(self, backend):
        self.backend = backend
        self.stations = []

    def station(self, name):
        station = Station(self.backend.new(name))
        self.stations.append(station)
        return station

    def pump(self, until, only=None):
        """Polls all stations (or only some) until the condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not until():
            assert time.monotonic() < deadline, "the transports did not get there in time"
            for station in only or self.stations:
                station.poll(0.001)

    def settle(self):
        """Polls until nothing happens any more."""
        quiet = 0
        while quiet < 3:
            happened = sum(len(station.poll(0.001)) for station in self.stations)
            quiet = 0 if happened else quiet + 1

    def arrive(self, station, connection, count):
        """Waits until ``count`` messages of a connection lie there unreleased."""
        self.pump(lambda: len(station.messages(connection)) == count)

    def send_until_lost(self, station, connection, content, most):
        """Breaks the window: sends until that ends the connection."""
        for _ in range(most):
            connection.send([content])
            station.poll()

    def link(self, client, server, limits=LIMITS, hello=b"hello"):
        """A connection, accepted: both its ends."""
        near = client.transport.connect(server.address, hello, limits)
        before = len(server.of(Accepted))
        self.pump(lambda: client.of(Connected, near) and len(server.of(Accepted)) > before)
        return near, server.of(Accepted)[-1].connection

    def lost(self, station, connection):
        """Waits for the end of a connection."""
        self.pump(lambda: station.of(Lost, connection))
        return station.of(Lost, connection)[0].reason

    def close(self):
        for station in self.stations:
            station.transport.close()
