"""tcp between two hosts: two network namespaces and a link that is cut, where the machine allows them.

Elsewhere between two loopback addresses, and the peer is killed instead.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from stations import LIMITS, Station

from services.dataplane.tcp import TcpTransport
from services.dataplane.transport import Connected, Lost

PEER = Path(__file__).with_name("transport_peer.py")
PEER_TIMEOUT_S = 2.0
DEADLINE_S = 30.0


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, timeout=10, check=False).returncode == 0


class OtherAddress:
    """This host under its other loopback address."""

    here, there = "127.0.0.1", "127.0.0.2"
    command = ()

    def close(self):
        pass


class OtherHost:
    """A network namespace, tied to this one by a pair of virtual Ethernet devices."""

    def __init__(self):
        self.name = f"iflm{os.getpid()}"
        self.device = f"{self.name}a"
        net = f"10.{os.getpid() % 251}.{os.getpid() // 251 % 251}"
        self.here, self.there = f"{net}.1", f"{net}.2"
        self.command = ("ip", "netns", "exec", self.name)

    def open(self):
        """Answers whether the machine allows it."""
        inside = f"{self.name}b"
        return (
            ip("netns", "add", self.name)
            and ip("link", "add", self.device, "type", "veth", "peer", "name", inside, "netns", self.name)
            and ip("addr", "add", f"{self.here}/24", "dev", self.device)
            and ip("link", "set", self.device, "up")
            and ip("-n", self.name, "addr", "add", f"{self.there}/24", "dev", inside)
            and ip("-n", self.name, "link", "set", inside, "up")
        )

    def cut(self):
        assert ip("link", "set", self.device, "down")

    def close(self):
        ip("link", "del", self.device)
        ip("netns", "del", self.name)


@pytest.fixture
def hosts():
    with ExitStack() as stack:
        host = OtherHost()
        stack.callback(host.close)
        yield host if os.geteuid() == 0 and host.open() else OtherAddress()


@pytest.fixture
def peer(hosts):
    """A process on the other host that echoes: itself and its address."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [*hosts.command, sys.executable, PEER, f"tcp:{hosts.there}:0", "echo", str(PEER_TIMEOUT_S)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait(10)
    process.stdout.close()


@pytest.fixture
def client(hosts):
    transport = TcpTransport(f"{hosts.here}:0", allow_insecure=True, peer_timeout_s=PEER_TIMEOUT_S)
    yield Station(transport)
    transport.close()


def until(client, condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        client.poll(0.1)


def test_two_hosts(hosts, peer, client):
    process, address = peer
    assert address.startswith(f"tcp:{hosts.there}:")
    idle, busy = (client.transport.connect(address, b"", LIMITS) for _ in range(2))
    until(client, lambda: len(client.of(Connected)) == 2)
    for number in range(50):
        content = number.to_bytes(2, "little") * (number * 600)
        busy.send([content])
        until(client, lambda: client.messages(busy))
        assert client.take(busy) == [content]
    # Idle for longer than the timeout, but both hosts are there: nothing ends.
    deadline = time.monotonic() + 2 * PEER_TIMEOUT_S
    while time.monotonic() < deadline:
        client.poll(0.1)
    assert client.of(Lost) == []
    if isinstance(hosts, OtherHost):
        hosts.cut()
        busy.send([b"into the void"])  # unacknowledged; the idle connection has only its keepalive
    else:
        process.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    until(client, lambda: len(client.of(Lost)) == 2)
    assert time.monotonic() - begin < 5 * PEER_TIMEOUT_S
    assert {event.connection for event in client.of(Lost)} == {idle, busy}


def test_a_host_that_does_not_answer(hosts, peer, client):
    """The connection that cannot be made ends by itself, and poll goes on meanwhile."""
    _, address = peer
    if isinstance(hosts, OtherHost):
        assert ip("neigh", "replace", hosts.there, "lladdr", "02:00:00:00:00:01", "dev", hosts.device)  # nobody's
        connection = client.transport.connect(address, b"", LIMITS)
        connection.send([b"never arrives"])
        until(client, lambda: client.of(Lost, connection))
        assert client.of(Connected) == []
    own = client.transport.connect(client.address, b"", LIMITS)
    until(client, lambda: client.of(Connected, own))
